//! The recorded conversations with which fuzzing begins (tests/fuzz/seeds): each is taken for what it is, and so is much that is
//! near it. What the fuzz targets do is run here too, so that it stays right without a fuzzer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;

use conversation::Heard;

#[path = "fuzz/src/conversation.rs"]
mod conversation;

type Target = fn(&[u8]) -> Heard;

const TARGETS: [(&str, Target); 2] =
    [("remote_command", conversation::remote_command), ("port_forward", conversation::port_forward)];

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(target);
    let files = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
    let mut seeds: Vec<_> = files
        .map(|file| (file.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(file).unwrap()))
        .collect();
    seeds.sort();
    seeds
}

#[test]
fn each_recorded_conversation_is_understood() {
    for (target, converse) in TARGETS {
        let mut seeds = seeds(target);
        // What a fuzzer has found need only end.
        seeds.retain(|(name, _)| !name.starts_with("find-"));
        assert!(seeds.len() >= 4, "{target} has {} seeds", seeds.len());
        for (name, seed) in seeds {
            let heard = converse(&seed);
            assert!(heard.begun > 0, "{target}/{name}: {heard:?}");
            assert_eq!(String::from_utf8_lossy(&heard.input), "hello", "{target}/{name}");
            assert!(heard.sent > 0, "{target}/{name}: {heard:?}");
        }
    }
}

#[test]
fn what_is_near_a_recorded_conversation_ends_too() {
    for (target, converse) in TARGETS {
        for (_, seed) in seeds(target) {
            for at in 0..seed.len() {
                converse(&seed[..at]);
                let mut damaged = seed.clone();
                damaged[at] ^= 0xff;
                converse(&damaged);
            }
        }
    }
}
