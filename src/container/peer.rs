//! One end of a socket as the supervisor sees it: never blocks, never grows without bound.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::descriptors;
use super::protocol::{LINE_BYTES, Order};

/// What may wait to be taken before output is held up.
const FULL: usize = 256 * 1024;

/// A pilot that takes nothing any more is let go at this; it comes back and is greeted anew.
const MOST: usize = 4 << 20;

/// Orders with descriptors that are taken at once; more of a burst wait in the socket.
const GIVEN: usize = 32;

/// A pilot at the other end of a socket.
pub(super) struct Peer {
    stream: UnixStream,
    incoming: Vec<u8>,
    /// Descriptors that came along, those of one order together.
    given: VecDeque<Vec<OwnedFd>>,
    outgoing: Vec<u8>,
    closed: bool,
}

impl Peer {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, incoming: Vec::new(), given: VecDeque::new(), outgoing: Vec::new(), closed: false })
    }

    /// Whether the other end is a process of the same user (unix(7), SO_PEERCRED).
    pub(super) fn is_same_user(&self) -> bool {
        getsockopt(&self.stream, PeerCredentials)
            .is_ok_and(|peer| peer.uid() == nix::unistd::geteuid().as_raw())
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn has_more(&self) -> bool {
        !self.outgoing.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.outgoing.len() > FULL
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        if self.outgoing.len() + bytes.len() > MOST {
            self.closed = true;
            return;
        }
        self.outgoing.extend_from_slice(bytes);
        self.flush();
    }

    pub(super) fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(0) => self.closed = true,
                Ok(n) => {
                    self.outgoing.drain(..n);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => self.closed = true,
            }
            return;
        }
    }

    pub(super) fn receive(&mut self) {
        let mut bytes = [0; 4096];
        // What waits for its order is taken first.
        while self.given.len() < GIVEN {
            let mut given = Vec::new();
            let read = descriptors::receive(self.stream.as_fd(), &mut bytes, &mut given);
            if let Ok((_, true)) = read {
                self.given.push_back(given);
            }
            match read {
                Ok((0, _)) => self.closed = true,
                Ok((n, _)) if self.incoming.len() + n <= LINE_BYTES => {
                    self.incoming.extend_from_slice(&bytes[..n]);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(_) | Err(_) => self.closed = true,
            }
            return;
        }
    }

    /// The orders that have come in whole.
    pub(super) fn orders(&mut self) -> Vec<(Order, Vec<OwnedFd>)> {
        let Some(end) = self.incoming.iter().rposition(|byte| *byte == b'\n') else { return Vec::new() };
        let rest = self.incoming.split_off(end + 1);
        let whole = std::mem::replace(&mut self.incoming, rest);
        let orders = whole.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        orders
            .map(|order: Order| {
                // Fewer than were sent (a process that has none left takes no more) are for that order to fail by.
                let given = if order.takes_descriptors() { self.given.pop_front() } else { None };
                (order, given.unwrap_or_default())
            })
            .collect()
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Reads and writes of this file return at once.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
