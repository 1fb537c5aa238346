//! `/portForward`: connections to what listens on this host for a pod. Pods have the host's network, so a port is the
//! host's, by its loopback address. Source: cri-streaming `portforward`, kubelet's `server.go`.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::body::Answer;
use super::streams::Settings;
use super::streams::port_forward::{ForwardedStream, Negotiated};

/// One copy: what a kubelet's io.Copy moves at once.
const COPY_BYTES: usize = 32 * 1024;

/// What a client may still send to a server that has said all: containerd's time. kubectl before 1.32 closes its user's
/// connection only when the Node says that the forwarding is over.
const CLIENT_REST: Duration = Duration::from_secs(1);

/// Answers with 101 and forwards beside it until the client goes or the pod has ended.
pub fn port_forward(
    mut request: Request<Incoming>,
    negotiated: Negotiated,
    room: OwnedSemaphorePermit,
    over: impl Future<Output = ()> + Send + 'static,
) -> Response<Answer> {
    let response = negotiated.response();
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let _room = room;
        let connection = match upgraded.await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::info!(%error, "a port-forward could not begin");
                return;
            }
        };
        let mut forwarding = negotiated.accept(TokioIo::new(connection), Settings::PORT_FORWARD).await;
        // All connections end with the client and with the pod.
        let mut connections = JoinSet::new();
        tokio::pin!(over);
        loop {
            tokio::select! {
                stream = forwarding.streams.recv() => match stream {
                    Some(stream) => { connections.spawn(forward(stream)); }
                    None => break,
                },
                Some(_) = connections.join_next() => {}
                _ = forwarding.closed.wait() => break,
                () = &mut over => break,
            }
        }
    });
    response
}

/// Forwarded connections of all clients together: each takes a descriptor, of which a process has 1024 by default.
const FORWARDED: usize = 200;

static ROOM: Semaphore = Semaphore::const_new(FORWARDED);

async fn forward(stream: ForwardedStream) {
    let ForwardedStream { port, data, error } = stream;
    let Ok(_room) = ROOM.try_acquire() else {
        let _ = error.fail(&format!("{FORWARDED} connections are forwarded by this Node already")).await;
        return;
    };
    let mut server = match connect(port).await {
        Ok(server) => server,
        Err(problem) => {
            let _ = error.fail(&format!("port {port} of this pod's host: {problem}")).await;
            return;
        }
    };
    let _ = server.set_nodelay(true);
    match carry(data, &mut server).await {
        Ok(()) => {
            let _ = error.finish().await;
        }
        Err(problem) => {
            tracing::debug!(port, %problem, "a forwarded connection was broken off");
            let _ = error.break_off().await;
        }
    }
}

/// Until both sides have said all, or the server has and the client had its time after that.
async fn carry(data: impl AsyncRead + AsyncWrite, server: &mut TcpStream) -> std::io::Result<()> {
    let (from_client, mut to_client) = tokio::io::split(data);
    let (from_server, mut to_server) = server.split();
    let up = async {
        tokio::io::copy_buf(&mut BufReader::with_capacity(COPY_BYTES, from_client), &mut to_server).await?;
        to_server.shutdown().await
    };
    let down = async {
        tokio::io::copy_buf(&mut BufReader::with_capacity(COPY_BYTES, from_server), &mut to_client).await?;
        to_client.shutdown().await
    };
    tokio::pin!(up, down);
    tokio::select! {
        said = &mut down => {
            said?;
            // However that ends: the client has all that there is.
            let _ = tokio::time::timeout(CLIENT_REST, up).await;
            Ok(())
        }
        said = &mut up => {
            said?;
            down.await
        }
    }
}

/// To a server that listens by IPv4, or by IPv6 alone: containerd tries them in this order.
async fn connect(port: u16) -> std::io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(server) => Ok(server),
        // What IPv4 said is told: there may be no IPv6 at all.
        Err(problem) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.map_err(|_| problem),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    /// A forwarded connection: the client's end, the server's end, and how it went.
    async fn forwarded() -> (tokio::io::DuplexStream, TcpStream, tokio::task::JoinHandle<std::io::Result<()>>)
    {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let (client, data) = tokio::io::duplex(COPY_BYTES);
        let carried = tokio::spawn(async move { carry(data, &mut near).await });
        (client, server, carried)
    }

    #[tokio::test]
    async fn a_server_that_has_said_all_ends_it_though_its_client_never_does() {
        let (mut client, mut server, carried) = forwarded().await;
        server.write_all(b"all").await.unwrap();
        server.shutdown().await.unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"all");
        // The client still says something, and then holds its side open.
        client.write_all(b"thanks").await.unwrap();
        let mut heard = [0; 6];
        server.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"thanks");
        let soon = CLIENT_REST + Duration::from_secs(10);
        tokio::time::timeout(soon, carried).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_has_said_all_waits_for_its_answer_as_long_as_it_takes() {
        let (mut client, mut server, carried) = forwarded().await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"question");
        tokio::time::sleep(2 * CLIENT_REST).await;
        assert!(!carried.is_finished());
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let mut said = Vec::new();
        client.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"answer");
        carried.await.unwrap().unwrap();
    }
}
