//! The port and who stands at it: [`bind`] takes it, [`Strangers`] keeps those of whom nothing is known from crowding out
//! the others, since every user of the host can connect.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::AbortHandle;

/// Connections of which nobody is known yet: an honest one is known within milliseconds.
const STRANGERS: usize = 64;

/// How long one of them stays when others want its place. 64 handshakes at once on cores that the pods keep busy take more
/// than half a second; and who opens connections and says nothing holds up others by a few times this at the most.
const STRANGER_STAYS: Duration = Duration::from_secs(2);

/// How often a place is looked for while all are taken.
const STRANGER_LOOK: Duration = Duration::from_millis(5);

/// Connections that wait to be taken: std's own.
const BACKLOG: i32 = 128;

/// A client that has vanished without a word (a firewall that forgot the connection, a host that is gone) is noticed after
/// nine tries of 15 s, and a quiet follower of a log stays known to the firewalls in between: Go's net.Listener does so.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const KEEP_ALIVE_TRIES: u32 = 9;

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

/// A connection lives on without it, only less long.
pub fn keep_alive(stream: &impl AsFd) {
    let _ = sockopt::set_socket_keepalive(stream, true)
        .and_then(|()| sockopt::set_tcp_keepidle(stream, KEEP_ALIVE))
        .and_then(|()| sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE))
        .and_then(|()| sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_TRIES));
}

/// A connection: nobody's until its first request that is allowed.
#[derive(Default)]
pub struct Guest {
    place: OnceLock<OwnedSemaphorePermit>,
}

impl Guest {
    /// Whether somebody is known of it.
    pub fn is_known(&self) -> bool {
        self.place.get().is_some()
    }

    /// Gives it the place of one who is known.
    pub fn seat(&self, place: OwnedSemaphorePermit) {
        let _ = self.place.set(place);
    }
}

/// Connections of nobody. Any user of the host can open one and say nothing, so there are few of them, and the oldest goes
/// when it had its time: those of whom something is known are never crowded out.
#[derive(Default)]
pub struct Strangers(Mutex<VecDeque<Stranger>>);

struct Stranger {
    guest: Arc<Guest>,
    task: AbortHandle,
    since: Instant,
}

impl Strangers {
    /// One more has come.
    pub fn enter(&self, guest: Arc<Guest>, task: AbortHandle, now: Instant) {
        self.all().push_back(Stranger { guest, task, since: now });
    }

    /// Whether one more can come; else, how long to wait before the next look.
    pub fn make_room(&self, now: Instant) -> Option<Duration> {
        let mut all = self.all();
        all.retain(|stranger| !stranger.guest.is_known() && !stranger.task.is_finished());
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

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    #[test]
    fn a_client_that_vanishes_is_noticed() {
        let listener = bind(0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let _client = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        listener.set_nonblocking(false).unwrap();
        let (stream, _) = listener.accept().unwrap();
        assert!(!sockopt::socket_keepalive(&stream).unwrap());
        keep_alive(&stream);
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), KEEP_ALIVE);
        assert_eq!(sockopt::tcp_keepintvl(&stream).unwrap(), KEEP_ALIVE);
        assert_eq!(sockopt::tcp_keepcnt(&stream).unwrap(), KEEP_ALIVE_TRIES);
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
