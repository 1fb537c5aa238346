//! Signals that the pilot understands.
//!
//! SIGTERM and SIGHUP mean the end, however often they come: Slurm sends SIGTERM twice at the limit to what srun started.
//! SIGINT means the end too, and a second one means hurry. SIGUSR1 and SIGUSR2 mean: ask the batch system now. Which of
//! them warns is the job script's choice (sbatch --signal=USR2@180).

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
    usr2: Stream,
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
            usr2: signal(SignalKind::user_defined2())?,
        })
    }

    /// The next signal.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.term.recv() => Signal::Terminate,
            _ = self.hup.recv() => Signal::Terminate,
            _ = self.int.recv() => Signal::Interrupt,
            _ = self.usr1.recv() => Signal::Ask,
            _ = self.usr2.recv() => Signal::Ask,
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{SIGUSR1, SIGUSR2, raise};

    #[tokio::test]
    async fn both_warning_signals_mean_ask_and_none_kills() {
        let mut signals = Signals::listen().unwrap();
        for warning in [SIGUSR1, SIGUSR2] {
            raise(warning).unwrap();
            assert_eq!(signals.next().await, Signal::Ask, "{warning}");
        }
    }
}
