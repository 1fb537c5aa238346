//! kube's client on connections of our own: [`client`].
//!
//! kube opens its sockets as the kernel gives them. There a new TLS connection's first request waits for the other end's
//! delayed acknowledgement (some 40 ms), and a connection that a firewall has forgotten stays open for ever. What is above
//! the sockets is kube's: credentials, certificates, headers, retries.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, Uri};
use hyper::rt::{Read, Write};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::rt::TokioExecutor;
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ConfigExt as _};
use tower::retry::RetryLayer;
use tower::{BoxError, ServiceBuilder};
use tower_service::Service;

/// A quiet connection (a watch of a Node without pods) is tried after this, and given up after [`KEEP_ALIVE_TRIES`]:
/// client-go's transport does so after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const KEEP_ALIVE_TRIES: u32 = 4;

/// A client as kube makes it, on such connections.
///
/// # Errors
/// When certificates, keys or the proxy's URL are no good.
pub fn client(config: &kube::Config) -> Result<kube::Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(KEEP_ALIVE));
    tcp.set_keepalive_interval(Some(KEEP_ALIVE));
    tcp.set_keepalive_retries(Some(KEEP_ALIVE_TRIES));
    let Some(proxy) = &config.proxy_url else { return over(config, tcp) };
    match proxy.scheme_str() {
        Some("http") => over(config, through(proxy, tcp)),
        Some("https") => over(config, through(proxy, config.rustls_https_connector_with_connector(tcp)?)),
        _ => Err(kube::Error::ProxyProtocolUnsupported { proxy_url: Box::new(proxy.clone()) }),
    }
}

/// The way through an HTTP proxy, with the credentials in its URL.
fn through<C>(proxy: &Uri, connector: C) -> Tunnel<C> {
    let tunnel = Tunnel::new(proxy.clone(), connector);
    match credentials(proxy).and_then(|value| HeaderValue::from_str(&value).ok()) {
        Some(value) => tunnel.with_auth(value),
        None => tunnel,
    }
}

/// A URL's `user:password@` as a header (RFC 7617); in the URL they are percent-encoded.
fn credentials(url: &Uri) -> Option<String> {
    let (user, _) = url.authority()?.as_str().rsplit_once('@')?;
    let user: Vec<u8> = percent_encoding::percent_decode_str(user).collect();
    Some(format!("Basic {}", STANDARD.encode(user)))
}

fn over<C>(config: &kube::Config, connector: C) -> Result<kube::Client, kube::Error>
where
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: Connection + Read + Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: std::error::Error + Send + Sync + 'static,
{
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(connector)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    let client = Client::builder(TokioExecutor::new()).build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.default_retry.then(|| RetryLayer::new(RetryPolicy::server_retry())))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(client);
    Ok(kube::Client::new(service, config.default_namespace.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_credentials_are_decoded_before_they_are_sent() {
        let of = |url: &str| credentials(&url.parse().unwrap());
        assert_eq!(of("http://proxy.site.org:3128"), None);
        let value = of("http://user:pa%40ss%3Aword@proxy.site.org:3128").unwrap();
        let text = STANDARD.decode(value.strip_prefix("Basic ").unwrap()).unwrap();
        assert_eq!(text, b"user:pa@ss:word");
    }

    #[tokio::test]
    async fn a_proxy_of_another_kind_is_refused_by_name() {
        let mut config = kube::Config::new("https://api.site.org:6443".parse().unwrap());
        config.proxy_url = Some("socks5://127.0.0.1:1080".parse().unwrap());
        let error = client(&config).map(drop).unwrap_err();
        assert!(error.to_string().contains("socks5://127.0.0.1:1080"), "{error}");
    }
}
