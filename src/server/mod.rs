//! The Node's own HTTPS API, as a kubelet serves it: kubectl logs, exec, attach, cp and port-forward, metrics.
//!
//! [`bind`] takes the port before the Node is registered; [`serve`] answers on it. Every request is authenticated and
//! authorized before its path is looked at, since every user of the host can reach the port.

mod body;
mod exec;
mod find;
mod forward;
pub mod identity;
mod listener;
mod logs;
pub mod metrics;
mod pages;
mod refusals;
pub mod rights;
mod route;
pub mod streams;
pub mod tls;
mod usage;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use self::body::{Answer, text};
use self::find::Refused;
use self::identity::{Authenticator, Unknown, User};
use self::listener::{Guest, Strangers, keep_alive};
use self::refusals::Refusals;
use self::rights::{Authorizer, authorization_error, forbidden};
use self::route::{PodPath, Route, attributes, route};
use self::streams::{port_forward, remote_command};
use crate::container::log_watch::LogWatch;
use crate::pod::roster::Roster;

pub use self::listener::bind;
pub use self::pages::{About, Pages};

/// Connections of those who are known: some hundred followers of logs, and as many for metrics and people. A process has 1024 descriptors by default; a follower takes two, a session four, a container one.
const CONNECTIONS: usize = 300;

/// Sessions of exec, attach and port-forward at once.
const SESSIONS: usize = 80;

/// How long a client may take for its TLS handshake. An honest one takes milliseconds.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// How long a client may take for the head of a request, or leave its connection idle.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

/// The head of a request. The command of an exec is in it, of which a single argument can have 128 KiB (execve(2)). A Go
/// server takes 1 MiB; but of those who send one here, 64 may be anybody, and what waits for a slow client is held in as much.
const HEAD_BYTES: usize = 192 * 1024;

/// Who answers.
pub struct Server {
    /// The pods.
    pub roster: Arc<Roster>,
    /// Tells followers of logs.
    pub watch: Arc<LogWatch>,
    /// Who asks.
    pub authenticator: Authenticator,
    /// Who may.
    pub authorizer: Authorizer,
    /// Whether anybody may read `/metrics/resource`.
    pub anonymous_metrics: bool,
    /// What is shown of this pilot.
    pub pages: Pages,
    /// Of those whom the cluster knows.
    refusals: Refusals,
    /// Of those whom nobody knows: their noise hides none of the others.
    noise: Refusals,
    /// Room for sessions that outlive their requests.
    sessions: Arc<Semaphore>,
    /// Room for the connections of those who are known.
    places: Arc<Semaphore>,
    strangers: Strangers,
}

impl Server {
    /// A server of these pods.
    #[must_use]
    pub fn new(
        roster: Arc<Roster>,
        authenticator: Authenticator,
        authorizer: Authorizer,
        anonymous_metrics: bool,
        pages: Pages,
    ) -> Self {
        let watch = LogWatch::new();
        Self {
            roster,
            watch,
            authenticator,
            authorizer,
            anonymous_metrics,
            pages,
            refusals: Refusals::default(),
            noise: Refusals::default(),
            sessions: Arc::new(Semaphore::new(SESSIONS)),
            places: Arc::new(Semaphore::new(CONNECTIONS)),
            strangers: Strangers::default(),
        }
    }
}

/// Answers until the pilot ends.
pub async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, server: Arc<Server>) {
    let acceptor = TlsAcceptor::from(tls);
    loop {
        // A burst of honest clients waits in the listener's queue; none is turned away for another.
        while let Some(wait) = server.strangers.make_room(Instant::now()) {
            tokio::time::sleep(wait).await;
        }
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // No descriptors are left, mostly: they come back when connections end.
                if server.noise.note(Instant::now()).is_some() {
                    tracing::warn!(%error, "a connection to the Node's API could not be taken");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let guest = Arc::new(Guest::default());
        let (acceptor, at, known) = (acceptor.clone(), Arc::clone(&server), Arc::clone(&guest));
        let task = tokio::spawn(async move {
            if let Err(problem) = connection(stream, from, &acceptor, at, known).await {
                tracing::debug!(%from, problem, "a connection to the Node's API has ended");
            }
        });
        server.strangers.enter(guest, task.abort_handle(), Instant::now());
    }
}

async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    acceptor: &TlsAcceptor,
    server: Arc<Server>,
    guest: Arc<Guest>,
) -> Result<(), String> {
    let _ = stream.set_nodelay(true);
    keep_alive(&stream);
    let stream = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream))
        .await
        .map_err(|_| "no TLS handshake in time".to_owned())?
        .map_err(|error| error.to_string())?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let chain: Arc<[CertificateDer<'static>]> = chain.iter().map(|c| c.clone().into_owned()).collect();
    let at = Arc::clone(&server);
    let service = service_fn(move |request| {
        let (server, chain, guest) = (Arc::clone(&at), Arc::clone(&chain), Arc::clone(&guest));
        async move { Ok::<_, Infallible>(server.answer(request, &chain, from, &guest).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await
        .map_err(|error| {
            if error.is_parse()
                && let Some(suppressed) = server.noise.note(Instant::now())
            {
                tracing::warn!(%from, %error, suppressed, "what came to the Node's API is no request, and is refused");
            }
            error.to_string()
        })
}

impl Server {
    async fn answer(
        &self,
        request: Request<Incoming>,
        chain: &[CertificateDer<'static>],
        from: SocketAddr,
        guest: &Guest,
    ) -> Response<Answer> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let route = route(&path);
        let name = route.as_ref().map_or("other", Route::name);
        let mut who = String::new();
        let answer = async {
            if self.is_open(&method, route.as_ref()) {
                return self.dispatch(request, route, User::default()).await;
            }
            let user = self.identify(&request, chain).await?;
            who.clone_from(&user.name);
            self.admit(&request, &user, guest).await?;
            self.dispatch(request, route, user).await
        };
        let answer = answer.await;
        let mut response = answer.unwrap_or_else(|refused| {
            let log = if who.is_empty() { &self.noise } else { &self.refusals };
            if let Some(suppressed) = log.note(Instant::now()) {
                tracing::warn!(
                    user = who,
                    %from,
                    %method,
                    path = path.escape_debug().to_string().chars().take(200).collect::<String>(),
                    status = refused.status.as_u16(),
                    detail = refused.detail,
                    suppressed,
                    "a request to the Node's API is refused: {}",
                    refused.message
                );
            }
            let mut response = refused.response();
            if !guest.is_known() {
                // Who is nobody does not keep a connection.
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        });
        if method == Method::HEAD {
            *response.body_mut() = Answer::default();
        }
        self.pages.metrics.request(name, response.status().as_u16());
        response
    }

    /// Whether anybody may ask this.
    fn is_open(&self, method: &Method, route: Option<&Route>) -> bool {
        self.anonymous_metrics && route == Some(&Route::ResourceMetrics) && *method == Method::GET
    }

    /// Who asks.
    async fn identify(
        &self,
        request: &Request<Incoming>,
        chain: &[CertificateDer<'static>],
    ) -> Result<User, Refused> {
        self.authenticator.authenticate(chain, request.headers()).await.map_err(|unknown| {
            let refused = Refused::new(StatusCode::UNAUTHORIZED, "Unauthorized");
            match unknown {
                Unknown::Unauthorized => refused,
                Unknown::TooMany => Refused::new(StatusCode::TOO_MANY_REQUESTS, unknown.to_string()),
                // A kubelet that cannot ask knows nobody either.
                Unknown::Unavailable(_) => refused.because(unknown.to_string()),
            }
        })
    }

    /// Whether they may.
    async fn admit(&self, request: &Request<Incoming>, user: &User, guest: &Guest) -> Result<(), Refused> {
        let wanted = attributes(request.method(), request.uri().path());
        match self.authorizer.may(user, &wanted).await {
            Ok(true) => self.seat(guest),
            Ok(false) => Err(Refused::new(StatusCode::FORBIDDEN, forbidden(user, &wanted))),
            Err(problem) => {
                let message = authorization_error(user, &wanted);
                Err(Refused::new(StatusCode::INTERNAL_SERVER_ERROR, message).because(problem))
            }
        }
    }

    /// Gives a connection whose first request is allowed its place.
    fn seat(&self, guest: &Guest) -> Result<(), Refused> {
        if guest.is_known() {
            return Ok(());
        }
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            let message = format!("{CONNECTIONS} connections to this Node's API are open already");
            Refused::new(StatusCode::SERVICE_UNAVAILABLE, message)
        })?;
        guest.seat(place);
        Ok(())
    }

    async fn dispatch(
        &self,
        request: Request<Incoming>,
        route: Option<Route>,
        user: User,
    ) -> Result<Response<Answer>, Refused> {
        let Some(route) = route else {
            return Err(Refused::new(StatusCode::NOT_FOUND, "404 page not found"));
        };
        if !route.takes(request.method()) {
            return Err(Refused::new(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed"));
        }
        let query = request.uri().query().map(str::to_owned);
        let query = query.as_deref();
        let (action, user) = (route.name(), user.name);
        let attach = matches!(route, Route::Attach(..));
        match route {
            Route::Logs(path, name) => {
                let asked = logs::LogRequest::parse(query, jiff::Timestamp::now())?;
                let view = find::logged(&self.roster, &path, &name)?;
                logs::answer(&self.roster, &self.watch, &view, &name, asked).await
            }
            Route::Exec(path, name) | Route::Attach(path, name) => {
                // In a kubelet's order.
                remote_command::streams(query)?;
                let run = find::run(&self.roster, &path, &name, attach)?;
                let command = if attach { Vec::new() } else { exec::command(query)? };
                let negotiated = remote_command::negotiate(request.method(), request.headers(), query)?;
                let room = self.room()?;
                let (transport, protocol) = (negotiated.transport(), negotiated.protocol());
                let PodPath { namespace, name: pod, .. } = &path;
                tracing::info!(
                    user,
                    action,
                    namespace,
                    pod,
                    container = name,
                    transport,
                    protocol,
                    "a user joins a container"
                );
                Ok(if attach {
                    exec::attach(request, negotiated, run, room)
                } else {
                    exec::exec(request, negotiated, run, command, user, room)
                })
            }
            Route::Run(path, name) => {
                let run = find::run(&self.roster, &path, &name, false)?;
                let _room = self.room()?;
                let PodPath { namespace, name: pod, .. } = &path;
                tracing::info!(user, action, namespace, pod, container = name, "a user joins a container");
                exec::run(query, &run).await
            }
            Route::PortForward(path) => {
                let view = find::joined(&self.roster, &path)?;
                let negotiated = port_forward::negotiate(request.method(), request.headers(), query)?;
                let room = self.room()?;
                let over = ended(Arc::clone(&self.roster), view.pod.metadata.uid.clone().unwrap_or_default());
                let (transport, protocol) = (negotiated.transport(), negotiated.protocol());
                let PodPath { namespace, name: pod, .. } = &path;
                tracing::info!(user, namespace, pod, transport, protocol, "a user forwards ports");
                Ok(forward::port_forward(request, negotiated, room, over))
            }
            Route::Health => Ok(text(StatusCode::OK, "ok")),
            route => Ok(self.pages.page(&route, query, &self.roster).await),
        }
    }

    /// Room for a session that outlives its request.
    fn room(&self) -> Result<OwnedSemaphorePermit, Refused> {
        Arc::clone(&self.sessions).try_acquire_owned().map_err(|_| {
            let message =
                format!("{SESSIONS} sessions of exec, attach and port-forward are open at this Node already");
            Refused::new(StatusCode::TOO_MANY_REQUESTS, message)
        })
    }
}

/// Waits until a pod has ended.
async fn ended(roster: Arc<Roster>, uid: String) {
    let mut changes = roster.changes();
    loop {
        let terminal = |view: &crate::pod::roster::PodView| {
            let phase = view.pod.status.as_ref().and_then(|status| status.phase.as_deref());
            matches!(phase, Some("Succeeded" | "Failed"))
        };
        if roster.get(&uid).is_none_or(|view| terminal(&view)) || changes.changed().await.is_err() {
            return;
        }
    }
}
