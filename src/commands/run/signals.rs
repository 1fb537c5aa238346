//! Signals that the pilot understands.
//!
//! SIGTERM and SIGHUP mean the end, however often they come: Slurm sends SIGTERM twice at the limit to what srun started.
//! SIGINT means the end too, and a second one means hurry. SIGUSR1 means: ask the batch system now.

use std::io;

use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// A signal, by what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// The batch system ends the job.
    Terminate,
    /// Somebody at a terminal ends it.
    Interrupt,
    /// Something about the job may have changed.
    Ask,
}

/// The signals that come in.
pub struct Signals {
    term: Stream,
    hup: Stream,
    int: Stream,
    usr1: Stream,
}

impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            hup: signal(SignalKind::hangup())?,
            int: signal(SignalKind::interrupt())?,
            usr1: signal(SignalKind::user_defined1())?,
        })
    }

    /// The next signal.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.term.recv() => Signal::Terminate,
            _ = self.hup.recv() => Signal::Terminate,
            _ = self.int.recv() => Signal::Interrupt,
            _ = self.usr1.recv() => Signal::Ask,
        }
    }

    /// The next signal that means the end.
    pub async fn until_end(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            if signal != Signal::Ask {
                return signal;
            }
        }
    }
}
