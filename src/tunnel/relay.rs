//! The way to the API server: a local port that stays, and behind it whichever tunnel is up.
//!
//! ssh's own end is a socket in a private directory, so that no other user of the host can take the port's place while a
//! tunnel is down, and several tunnels stand in for each other. The port itself is open to every user of the host, so
//! each connection is looked up ([`peer`]): one of another user is closed before anything is read of it.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use super::{Status, peer, ssh};

/// Connections at once. The pilot holds some ten: its watches, and 16 calls at most. The rest wait.
const CONNECTIONS: usize = 64;

/// How long a connection waits for a tunnel that is just coming back: half of what a call to the API server may take.
const UP_LIMIT: Duration = Duration::from_secs(5);

/// Pause after an accept that failed, for want of descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub struct Relay {
    listener: TcpListener,
    address: SocketAddr,
    /// The user whose connections are carried.
    user: u32,
    /// The tunnels that lead there.
    carriers: Vec<usize>,
    statuses: watch::Receiver<Vec<Status>>,
    directory: Arc<File>,
    /// Whether it was said that another user tried.
    told: bool,
}

impl Relay {
    pub async fn listen(
        carriers: Vec<usize>,
        statuses: watch::Receiver<Vec<Status>>,
        directory: Arc<File>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let user = nix::unistd::geteuid().as_raw();
        Ok(Self { listener, address, user, carriers, statuses, directory, told: false })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Until the task is aborted; connections end with their tunnel.
    pub async fn run(mut self) {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            match self.listener.accept().await {
                Ok((_, from)) if !self.is_ours(from) => {}
                Ok((near, _)) => {
                    // Never closed. Only what is ours takes a place.
                    let permit = Arc::clone(&room).acquire_owned().await.ok();
                    let (carriers, statuses) = (self.carriers.clone(), self.statuses.clone());
                    let directory = Arc::clone(&self.directory);
                    tokio::spawn(async move {
                        carry(near, &carriers, statuses, &directory).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection to the API server could not be taken");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Whether this user has the other end of a connection. That another one tries is said once: to try again costs
    /// nothing, and a line each time would.
    fn is_ours(&mut self, from: SocketAddr) -> bool {
        let problem = match peer::owner(from, self.address) {
            Ok(Some(uid)) if uid == self.user => return true,
            Ok(Some(uid)) => format!("it came from the user with the number {uid}"),
            // It is over already.
            Ok(None) => return false,
            Err(error) => format!("whose it is cannot be found out: {error}"),
        };
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!(
                problem,
                "a connection to this host's end of the tunnels was closed; further ones are closed without a word"
            );
        }
        false
    }
}

async fn carry(
    mut near: TcpStream,
    carriers: &[usize],
    mut statuses: watch::Receiver<Vec<Status>>,
    directory: &File,
) {
    let up =
        |all: &Vec<Status>| carriers.iter().copied().filter(|i| all.get(*i).is_some_and(|s| s.up)).collect();
    let waited = timeout(
        UP_LIMIT,
        statuses.wait_for(|all| carriers.iter().any(|i| all.get(*i).is_some_and(|s| s.up))),
    );
    let candidates: Vec<usize> = match waited.await {
        Ok(Ok(all)) => up(&all),
        _ => return,
    };
    for index in candidates {
        // A path of any length, although a socket's has 108 bytes at most (unix(7)).
        let path = format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), ssh::api_socket(index));
        if let Ok(mut far) = UnixStream::connect(path).await {
            let _ = near.set_nodelay(true);
            // Either end may go at any time: a tunnel that falls, a client that is done.
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    /// A relay whose tunnel is up and echoes, for the connections of this user.
    async fn echoing(directory: &std::path::Path, user: u32) -> SocketAddr {
        let settings = super::super::url::parse("ssh://login").unwrap();
        let (statuses, following) = watch::channel(vec![Status { up: true, ..settings.at_first() }]);
        let far = UnixListener::bind(directory.join(ssh::api_socket(0))).unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = far.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
            drop(statuses);
        });
        let directory = Arc::new(File::open(directory).unwrap());
        let mut relay = Relay::listen(vec![0], following, directory).await.unwrap();
        relay.user = user;
        let address = relay.address();
        tokio::spawn(relay.run());
        address
    }

    /// What comes back of a word.
    async fn said(address: SocketAddr) -> Vec<u8> {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut answer = Vec::new();
        // What is closed already may be reset by what is sent to it.
        let _ = stream.write_all(b"word").await;
        let _ = stream.shutdown().await;
        let _ = timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.expect("it ends");
        answer
    }

    #[tokio::test]
    async fn only_the_pilots_own_user_is_led_to_the_api_server() {
        let us = nix::unistd::geteuid().as_raw();
        for (user, wanted) in [(us, &b"word"[..]), (us + 1, b"")] {
            let directory = tempfile::tempdir().unwrap();
            let address = echoing(directory.path(), user).await;
            assert_eq!(said(address).await, wanted, "as {user}");
        }
    }
}
