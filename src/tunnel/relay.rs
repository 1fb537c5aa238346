//! The way to the API server: a local port that stays, and behind it whichever tunnel is up.
//!
//! ssh's own end is a socket in a private directory, so that no other user of the host can take the port's place while a
//! tunnel is down, and several tunnels stand in for each other.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use super::{Status, ssh};

/// Connections at once. The pilot holds some ten: its watches, and 16 calls at most. The rest wait.
const CONNECTIONS: usize = 64;

/// How long a connection waits for a tunnel that is just coming back: half of what a call to the API server may take.
const UP_LIMIT: Duration = Duration::from_secs(5);

/// Pause after an accept that failed, for want of descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub struct Relay {
    listener: TcpListener,
    address: SocketAddr,
    /// The tunnels that lead there.
    carriers: Vec<usize>,
    statuses: watch::Receiver<Vec<Status>>,
    directory: Arc<File>,
}

impl Relay {
    pub async fn listen(
        carriers: Vec<usize>,
        statuses: watch::Receiver<Vec<Status>>,
        directory: Arc<File>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, carriers, statuses, directory })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Until the task is aborted; connections end with their tunnel.
    pub async fn run(self) {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            // Never closed.
            let permit = Arc::clone(&room).acquire_owned().await.ok();
            match self.listener.accept().await {
                Ok((near, _)) => {
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
