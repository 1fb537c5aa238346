//! The Node's own HTTPS API, as a kubelet serves it: kubectl logs, exec, attach, cp and port-forward, metrics.
//!
//! [`bind`] takes the port before the Node is registered; [`serve`] answers on it. Every request is authenticated and
//! authorized before its path is looked at, since every user of the host can reach the port.

mod body;
mod exec;
mod find;
mod forward;
pub mod identity;
mod logs;
pub mod metrics;
mod pages;
pub mod rights;
mod route;
pub mod streams;
pub mod tls;
mod usage;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::io::Errno;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;

use self::body::{Answer, text};
use self::find::Refused;
use self::identity::{Authenticator, Unknown, User};

use self::rights::{Authorizer, forbidden};
use self::route::{PodPath, Route, attributes, route};
use crate::container::log_watch::LogWatch;
use crate::pod::roster::Roster;

pub use self::pages::{About, Pages};

/// Connections of those who are known: some hundred followers of logs, and as many for metrics and people. A process has 1024 descriptors by default; a follower takes two, a session four, a container one.
const CONNECTIONS: usize = 300;

/// Connections of which nobody is known yet: an honest one is known within milliseconds.
const STRANGERS: usize = 64;

/// How long one of them stays when others want its place. 64 handshakes at once on cores that the pods keep busy take more
/// than half a second; and who opens connections and says nothing holds up others by a few times this at the most.
const STRANGER_STAYS: Duration = Duration::from_secs(2);

/// How often a place is looked for while all are taken.
const STRANGER_LOOK: Duration = Duration::from_millis(5);

/// Sessions of exec, attach and port-forward at once.
const SESSIONS: usize = 80;

/// Connections that wait to be taken: std's own.
const BACKLOG: i32 = 128;

/// How long a client may take for its TLS handshake. An honest one takes milliseconds.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// How long a client may take for the head of a request, or leave its connection idle.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

/// The head of a request: a token of 16 KiB, and as much again.
const HEAD_BYTES: usize = 64 * 1024;

/// Refusals that are logged in a minute; of more, only their number: any user of the host can cause them.
const REFUSALS: u32 = 10;

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
    refusals: Refusals,
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
            sessions: Arc::new(Semaphore::new(SESSIONS)),
            places: Arc::new(Semaphore::new(CONNECTIONS)),
            strangers: Strangers::default(),
        }
    }
}

/// Takes a port on all addresses of this host; 0 takes a free one.
///
/// # Errors
/// When the port is taken.
pub fn bind(port: u16) -> io::Result<std::net::TcpListener> {
    // Both families where the kernel has both, whatever its default is (net.ipv6.bindv6only).
    let listener = both_families(port).or_else(|error| match error {
        Errno::ADDRINUSE | Errno::ACCESS => Err(io::Error::from(error)),
        _ => std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
    })?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn both_families(port: u16) -> Result<std::net::TcpListener, Errno> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
    let socket = socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_ipv6_v6only(&socket, false)?;
    // As std does: a port whose last connections are not forgotten yet can be taken again.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
    listen(&socket, BACKLOG)?;
    Ok(std::net::TcpListener::from(socket))
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
                if server.refusals.note(Instant::now()).is_some() {
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

/// A connection: nobody's until its first request that is allowed.
#[derive(Default)]
struct Guest {
    place: std::sync::OnceLock<OwnedSemaphorePermit>,
}

/// Connections of nobody. Any user of the host can open one and say nothing, so there are few of them, and the oldest goes
/// when it had its time: those of whom something is known are never crowded out.
#[derive(Default)]
struct Strangers(Mutex<VecDeque<Stranger>>);

struct Stranger {
    guest: Arc<Guest>,
    task: AbortHandle,
    since: Instant,
}

impl Strangers {
    fn enter(&self, guest: Arc<Guest>, task: AbortHandle, now: Instant) {
        self.all().push_back(Stranger { guest, task, since: now });
    }

    /// Whether one more can come; else, how long to wait before the next look.
    fn make_room(&self, now: Instant) -> Option<Duration> {
        let mut all = self.all();
        all.retain(|stranger| stranger.guest.place.get().is_none() && !stranger.task.is_finished());
        if all.len() < STRANGERS {
            return None;
        }
        let oldest = all.front()?;
        let stays = STRANGER_STAYS.saturating_sub(now.duration_since(oldest.since));
        if !stays.is_zero() {
            return Some(stays.min(STRANGER_LOOK));
        }
        oldest.task.abort();
        all.pop_front();
        None
    }

    fn all(&self) -> MutexGuard<'_, VecDeque<Stranger>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    let stream = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream))
        .await
        .map_err(|_| "no TLS handshake in time".to_owned())?
        .map_err(|error| error.to_string())?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let chain: Arc<[CertificateDer<'static>]> = chain.iter().map(|c| c.clone().into_owned()).collect();
    let service = service_fn(move |request| {
        let (server, chain, guest) = (Arc::clone(&server), Arc::clone(&chain), Arc::clone(&guest));
        async move { Ok::<_, Infallible>(server.answer(request, &chain, from, &guest).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await
        .map_err(|error| error.to_string())
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
        let answer = match self.admit(&request, route.as_ref(), chain, guest).await {
            Ok(user) => {
                who.clone_from(&user.name);
                self.dispatch(request, route, user).await
            }
            Err(refused) => Err(refused),
        };
        let mut response = answer.unwrap_or_else(|refused| {
            if let Some(suppressed) = self.refusals.note(Instant::now()) {
                tracing::warn!(
                    user = who,
                    %from,
                    %method,
                    path = path.escape_debug().to_string().chars().take(200).collect::<String>(),
                    status = refused.status.as_u16(),
                    suppressed,
                    "a request to the Node's API is refused: {}",
                    refused.message
                );
            }
            let mut response = refused.response();
            if who.is_empty() {
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

    /// Who asks, and whether they may.
    async fn admit(
        &self,
        request: &Request<Incoming>,
        route: Option<&Route>,
        chain: &[CertificateDer<'static>],
        guest: &Guest,
    ) -> Result<User, Refused> {
        let method = request.method();
        if self.anonymous_metrics && route == Some(&Route::ResourceMetrics) && *method == Method::GET {
            return Ok(User { name: "system:anonymous".to_owned(), ..User::default() });
        }
        let user = self.authenticator.authenticate(chain, request.headers()).await.map_err(|unknown| {
            match unknown {
                Unknown::Unauthorized => {}
                Unknown::TooMany => {
                    return Refused::new(StatusCode::TOO_MANY_REQUESTS, unknown.to_string());
                }
                // A kubelet that cannot ask knows nobody either.
                Unknown::Unavailable(problem) => {
                    if self.refusals.note(Instant::now()).is_some() {
                        tracing::warn!(problem, "the API server cannot be asked about a token");
                    }
                }
            }
            Refused::new(StatusCode::UNAUTHORIZED, "Unauthorized")
        })?;
        let wanted = attributes(method, request.uri().path());
        match self.authorizer.may(&user, &wanted).await {
            Ok(true) => self.seat(guest).map(|()| user),
            Ok(false) => Err(Refused::new(StatusCode::FORBIDDEN, forbidden(&user, &wanted))),
            Err(problem) => Err(Refused::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("Authorization error ({}): {problem}", forbidden(&user, &wanted)),
            )),
        }
    }

    /// Gives a connection whose first request is allowed its place.
    fn seat(&self, guest: &Guest) -> Result<(), Refused> {
        if guest.place.get().is_some() {
            return Ok(());
        }
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            let message = format!("{CONNECTIONS} connections to this Node's API are open already");
            Refused::new(StatusCode::SERVICE_UNAVAILABLE, message)
        })?;
        let _ = guest.place.set(place);
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
        if let Route::Exec(pod, container) | Route::Attach(pod, container) | Route::Run(pod, container) =
            &route
        {
            let (route, user) = (route.name(), &user.name);
            tracing::info!(
                user,
                route,
                namespace = pod.namespace,
                pod = pod.name,
                container,
                "a user joins a container"
            );
        }
        let query = request.uri().query().map(str::to_owned);
        match route {
            Route::Logs(path, name) => {
                let asked = logs::LogRequest::parse(query.as_deref(), jiff::Timestamp::now())?;
                let view = find::pod(&self.roster, &path)?;
                find::container(&view, &name)?;
                logs::answer(&self.roster, &self.watch, &view, &name, asked).await
            }
            Route::Exec(path, name) => exec::exec(request, self.run(&path, &name)?, user.name, self.room()?),
            Route::Attach(path, name) => exec::attach(request, self.run(&path, &name)?, self.room()?),
            Route::Run(path, name) => exec::run(query.as_deref(), &self.run(&path, &name)?).await,
            Route::PortForward(path) => {
                let view = find::pod(&self.roster, &path)?;
                let over = ended(Arc::clone(&self.roster), view.pod.metadata.uid.clone().unwrap_or_default());
                let (user, pod) = (user.name, &path.name);
                tracing::info!(user, namespace = path.namespace, pod, "a user forwards ports");
                Ok(forward::port_forward(request, self.room()?, over))
            }
            Route::Health => Ok(text(StatusCode::OK, "ok")),
            route => Ok(self.pages.page(&route, query.as_deref(), &self.roster).await),
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

    fn run(&self, path: &PodPath, container: &str) -> Result<crate::pod::session::RunHandle, Refused> {
        find::run(&*find::pod(&self.roster, path)?, container)
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

/// How many refusals were logged in this minute.
#[derive(Default)]
struct Refusals(Mutex<Option<(Instant, u32, u32)>>);

impl Refusals {
    /// Whether this one is logged: then, how many were not before it.
    fn note(&self, now: Instant) -> Option<u32> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (begin, logged, suppressed) = window.get_or_insert((now, 0, 0));
        if now.duration_since(*begin) >= Duration::from_secs(60) {
            (*begin, *logged) = (now, 0);
        }
        if *logged >= REFUSALS {
            *suppressed += 1;
            return None;
        }
        *logged += 1;
        Some(std::mem::take(suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_does_not_fill_the_jobs_output() {
        let refusals = Refusals::default();
        let now = Instant::now();
        let logged = (0..1000).filter(|_| refusals.note(now).is_some()).count();
        assert_eq!(logged, 10);
        assert_eq!(refusals.note(now + Duration::from_secs(61)), Some(990));
    }

    #[tokio::test]
    async fn a_stranger_has_its_time_before_it_goes_for_another_and_who_is_known_never_goes() {
        let strangers = Strangers::default();
        let begin = Instant::now();
        let places = Arc::new(Semaphore::new(1));
        let mut tasks = Vec::new();
        let mut guests = Vec::new();
        for _ in 0..STRANGERS {
            assert_eq!(strangers.make_room(begin), None);
            let (task, guest) = (tokio::spawn(std::future::pending::<()>()), Arc::new(Guest::default()));
            strangers.enter(Arc::clone(&guest), task.abort_handle(), begin);
            tasks.push(task);
            guests.push(guest);
        }
        assert_eq!(strangers.make_room(begin), Some(STRANGER_LOOK));
        // One is known: there is room, and the place is its own.
        guests[0].place.set(places.try_acquire_owned().unwrap()).unwrap();
        assert_eq!(strangers.make_room(begin), None);
        let task = tokio::spawn(std::future::pending::<()>());
        strangers.enter(Arc::default(), task.abort_handle(), begin);
        assert_eq!(strangers.make_room(begin + STRANGER_STAYS / 2), Some(STRANGER_LOOK));
        assert_eq!(strangers.make_room(begin + STRANGER_STAYS), None);
        assert!((&mut tasks[1]).await.unwrap_err().is_cancelled());
        assert!(!tasks[0].is_finished() && !tasks[2].is_finished());
    }
}
