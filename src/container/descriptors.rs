//! Descriptors that travel beside the text on a Unix socket (unix(7), SCM_RIGHTS): [`send`] and [`receive`].

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Standard input, output and error for a session; a container's program in namespaces gets six
/// (`isolation::Handed`).
pub(super) const MOST: usize = 6;

/// Sends some of `bytes`, with all of `descriptors` beside the first; how many bytes went.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other(format!("more than {MOST} descriptors at once")));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL)?)
}

/// Reads once, and takes the descriptors that came beside what was read: how many bytes, and whether any descriptors were
/// sent, also where this process could take none of them. None of them is inherited by a child.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let read = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    let mut sent = read.flags.contains(ReturnFlags::CTRUNC);
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
            sent = true;
        }
    }
    Ok((read.bytes, sent))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_comes_with_its_text() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (read, write) = std::io::pipe().unwrap();
        assert_eq!(send(ours.as_fd(), b"before\n", &[]).unwrap(), 7);
        assert_eq!(send(ours.as_fd(), b"with\n", &[write.as_fd()]).unwrap(), 5);
        drop(write);
        let (mut bytes, mut got) = ([0; 64], Vec::new());
        let mut text = Vec::new();
        while text.len() < 12 {
            let (n, sent) = receive(theirs.as_fd(), &mut bytes, &mut got).unwrap();
            // What came before may be read with it, what comes after is not.
            assert_eq!(sent, bytes[..n].ends_with(b"with\n"));
            text.extend_from_slice(&bytes[..n]);
        }
        assert_eq!(text, b"before\nwith\n");
        assert_eq!(got.len(), 1);
        std::fs::File::from(got.remove(0)).write_all(b"through").unwrap();
        let mut through = String::new();
        std::fs::File::from(OwnedFd::from(read)).read_to_string(&mut through).unwrap();
        assert_eq!(through, "through");
    }
}
