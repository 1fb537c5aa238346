//! Conversations for fuzzing to begin with (tests/fuzz/seeds): what a client like kubectl sends after its 101, in each protocol.
//! The first byte is the number of the protocol in tests/fuzz/src/conversation.rs.

use std::path::PathBuf;

use super::client::{compressor, control, data, syn_stream};
use super::hostile::message;

const BINARY: u8 = 2;
const TEXT: u8 = 1;

/// exec by SPDY: its streams, `hello` on standard input, and the end of it.
fn exec_by_spdy(kinds: &[&str]) -> Vec<u8> {
    let mut zlib = compressor();
    let mut bytes = Vec::new();
    for (kind, id) in kinds.iter().zip((1..).step_by(2)) {
        bytes.extend(syn_stream(&mut zlib, id, &[("streamtype", kind)]));
        match *kind {
            "stdin" => bytes.extend([data(id, b"hel", false), data(id, b"lo", true)].concat()),
            "resize" => bytes.extend(data(id, b"{\"Width\":101,\"Height\":33}\n", false)),
            _ => {}
        }
    }
    bytes.extend(control(6, 0, &1u32.to_be_bytes()));
    bytes
}

/// port-forward by SPDY: one connection that says `hello`, one to a port where nobody listens.
fn forward_by_spdy() -> Vec<u8> {
    let mut zlib = compressor();
    let mut bytes = Vec::new();
    for (request, port, id) in [("0", "80", 1), ("1", "81", 5)] {
        let mut open = |kind, id| {
            syn_stream(&mut zlib, id, &[("streamtype", kind), ("port", port), ("requestid", request)])
        };
        bytes.extend([open("error", id), data(id, b"", true), open("data", id + 2)].concat());
        bytes.extend(data(id + 2, if port == "80" { b"hello" } else { b"" }, true));
    }
    bytes
}

fn close() -> Vec<u8> {
    message(8, true, &1000u16.to_be_bytes())
}

fn seeds() -> Vec<(&'static str, &'static str, u8, Vec<u8>)> {
    let binary = |payload: &[u8]| message(BINARY, true, payload);
    let text = |payload: &[u8]| message(TEXT, true, payload);
    let size = b"\x04{\"Width\":101,\"Height\":33}";
    let split = |bytes: &[u8]| bytes.chunks(23).flat_map(&binary).collect::<Vec<u8>>();
    vec![
        ("remote_command", "spdy-v4", 0, exec_by_spdy(&["error", "stdin", "stdout", "stderr"])),
        ("remote_command", "spdy-v4-terminal", 1, exec_by_spdy(&["error", "stdin", "stdout", "resize"])),
        ("remote_command", "spdy-v1", 3, exec_by_spdy(&["stdin", "stdout", "error"])),
        (
            "remote_command",
            "websocket-v5",
            4,
            [binary(b"\0hel"), binary(b"\0lo"), binary(&[255, 0])].concat(),
        ),
        (
            "remote_command",
            "websocket-v5-terminal",
            5,
            [binary(size), message(9, true, b"ping"), binary(b"\0hello"), binary(&[255, 0])].concat(),
        ),
        ("remote_command", "websocket-base64", 6, [text(b"0aGVsbG8="), close()].concat()),
        ("port_forward", "spdy", 0, forward_by_spdy()),
        ("port_forward", "spdy-in-a-websocket", 1, split(&forward_by_spdy())),
        ("port_forward", "websocket-v4", 2, [binary(b"\0hello"), close()].concat()),
        ("port_forward", "websocket-base64", 3, [text(b"0aGVsbG8="), close()].concat()),
    ]
}

/// They are files for the fuzzer's sake. Where they are not what is made here, JIRIAF_WRITE_SEEDS=1 writes them anew.
#[test]
fn the_seeds_of_the_fuzz_targets_are_these_conversations() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds");
    for (target, name, choice, conversation) in seeds() {
        let (file, bytes) = (root.join(target).join(name), [vec![choice], conversation].concat());
        if std::env::var_os("JIRIAF_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, &bytes).unwrap();
        }
        let kept = std::fs::read(&file).unwrap_or_default();
        assert!(kept == bytes, "{} is another: write it with JIRIAF_WRITE_SEEDS=1", file.display());
    }
}
