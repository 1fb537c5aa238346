//! Whose a connection within this host is: the user of the socket at its other end, out of the kernel's tables.
//!
//! [`owner`] looks it up; [`row`] reads one line.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The tables of proc(5). The second too: a socket of IPv6 reaches 127.0.0.1 as ::ffff:127.0.0.1.
const TABLES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];

/// How often the tables are read: they may change under a reader, who then misses a line.
const LOOKS: usize = 2;

/// The user whose socket is bound to `peer` and connected to `own`; none where the kernel shows no such socket.
///
/// # Errors
/// When a table cannot be read.
pub fn owner(peer: SocketAddr, own: SocketAddr) -> io::Result<Option<u32>> {
    for table in TABLES.repeat(LOOKS) {
        let lines = match File::open(table) {
            Ok(file) => BufReader::new(file).lines(),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for line in lines {
            if let Some(uid) = row(&line?).filter(|row| row.is_of(peer, own)).map(|row| row.uid) {
                return Ok(Some(uid));
            }
        }
    }
    Ok(None)
}

/// A connection as one of its ends has it, while a process holds that end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    local: SocketAddr,
    remote: SocketAddr,
    uid: u32,
}

impl Row {
    fn is_of(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        let plain = |address: SocketAddr| (address.ip().to_canonical(), address.port());
        plain(self.local) == plain(local) && plain(self.remote) == plain(remote)
    }
}

/// Reads a line of a table: number, local address, remote address, state, queues, timer, retransmits, uid, timeout, inode, …
/// What no process holds any more has the inode 0, and the uid 0, which is not its user's.
fn row(line: &str) -> Option<Row> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote) = (address(fields.next()?)?, address(fields.next()?)?);
    let uid = fields.nth(4)?.parse().ok()?;
    fields.nth(1).filter(|inode| *inode != "0")?;
    Some(Row { local, remote, uid })
}

/// Reads `0100007F:9C40`: words of 32 bits as they lie in memory, then the port.
fn address(field: &str) -> Option<SocketAddr> {
    let (ip, port) = field.split_once(':')?;
    let word =
        |index: usize| u32::from_str_radix(ip.get(8 * index..8 * index + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for (index, four) in bytes.chunks_exact_mut(4).enumerate() {
                four.copy_from_slice(&word(index)?);
            }
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    /// Lines of a little-endian host.
    #[cfg(target_endian = "little")]
    #[test]
    fn both_tables_are_read() {
        let line = "   3: 0100007F:9C40 0100007F:192B 01 00000000:00000000 02:0000078F 00000000  1000        0 81532 2 0 20 4 30 10 -1";
        let found = row(line).unwrap();
        assert_eq!((found.local.to_string().as_str(), found.uid), ("127.0.0.1:40000", 1000));
        assert!(found.is_of("127.0.0.1:40000".parse().unwrap(), "127.0.0.1:6443".parse().unwrap()));
        assert!(!found.is_of("127.0.0.1:6443".parse().unwrap(), "127.0.0.1:40000".parse().unwrap()));
        let mapped = "  12: 0000000000000000FFFF00000100007F:9C40 0000000000000000FFFF00000100007F:192B 01 00000000:00000000 \
                      00:00000000 00000000 65534        0 90 1 0 20 4 30 10 -1";
        let found = row(mapped).unwrap();
        assert!(found.is_of("127.0.0.1:40000".parse().unwrap(), "127.0.0.1:6443".parse().unwrap()));
        assert_eq!(found.uid, 65534);
        let six = "   0: B80D0120000000000000000001000000:0016 00000000000000000000000001000000:0017 01 0:0 0:0 0 7 0 1";
        assert_eq!(row(six).unwrap().local.to_string(), "[2001:db8::1]:22");
    }

    #[test]
    fn what_nobody_holds_and_what_is_no_row_is_none() {
        for line in [
            "",
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
            // It waits for the last of a connection that is over.
            "   1: 0100007F:9C40 0100007F:192B 06 00000000:00000000 03:00000E29 00000000     0        0 0 3 0",
            "   1: 0100007F:9C40 0100007F:192B 01 00000000:00000000 03:00000E29 00000000",
            "   1: 0100007F:9C40 0100007F:192B 01 00000000:00000000 03:00000E29 00000000 -1 0 7",
            "   1: 0100007F:9C40 0100007F:192B 01 00000000:00000000 03:00000E29 00000000 1000 0",
            "   1: 0100007F:19C40 0100007F:192B 01 0:0 0:0 0 1000 0 7",
            "   1: 0100007:9C40 0100007F:192B 01 0:0 0:0 0 1000 0 7",
            "   1: 010000é:9C40 0100007F:192B 01 0:0 0:0 0 1000 0 7",
        ] {
            assert_eq!(row(line), None, "{line}");
        }
    }

    #[test]
    fn a_connection_of_this_process_is_its_users() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let own = listener.local_addr().unwrap();
        let us = Some(nix::unistd::geteuid().as_raw());
        let near = TcpStream::connect(own).unwrap();
        assert_eq!(owner(listener.accept().unwrap().1, own).unwrap(), us);
        assert_eq!(owner("127.0.0.1:1".parse().unwrap(), own).unwrap(), None);
        drop(near);
        // By a socket of IPv6, where this host has it.
        if let Ok(_near) = TcpStream::connect((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), own.port())) {
            assert_eq!(owner(listener.accept().unwrap().1, own).unwrap(), us);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_line_is_read_or_left(line in "[ -~é]{0,200}") {
            let _ = row(&line);
        }
    }
}
