//! A pseudoterminal (pty(7)) for what wants a terminal: [`open`] and [`resize`].

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Both ends of a new terminal: the one that is read and written here, and the one that programs have. Neither is
/// inherited, and neither becomes this process' own terminal.
///
/// # Errors
/// When there are no more terminals (`/proc/sys/kernel/pty/max`), or no `/dev/pts`.
pub fn open() -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    // Programs that read nothing must hold nobody up who types.
    super::peer::set_nonblocking(ours.as_fd())?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let name = name.into_string().map_err(|error| io::Error::other(error.to_string()))?;
    let theirs: File =
        OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(name)?;
    Ok((ours, OwnedFd::from(theirs)))
}

/// Tells the programs on a terminal how large it is, in characters.
///
/// # Errors
/// When it is no terminal.
pub fn resize(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}
