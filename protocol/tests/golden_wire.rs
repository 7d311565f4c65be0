//! The bytes of every message, held against files that are never edited: what an older release
//! sent is what those files say.
//!
//! A message without a file fails. `KILN_WRITE_GOLDEN=1` writes the files that are missing, and
//! only those.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeSet;
use std::path::PathBuf;

use kiln_protocol::preamble::{Channel, Preamble};
use support::{every_message, token};

/// Every name with the bytes that this crate sends.
fn every_wire() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = every_message()
        .into_iter()
        .map(|(name, message)| (name, message.encode().unwrap()))
        .collect();
    for channel in [Channel::Registry, Channel::Egress, Channel::Exec] {
        let name = match channel {
            Channel::Registry => "preamble-registry",
            Channel::Egress => "preamble-egress",
            Channel::Exec => "preamble-exec",
        };
        let step = (channel == Channel::Egress).then_some(0x0102);
        let preamble = Preamble::new(channel, token(0x80)).of_step(step);
        all.push((name.to_owned(), preamble.encode().to_vec()));
    }
    all
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

#[test]
fn every_message_has_the_bytes_of_its_golden_file() {
    let write = std::env::var_os("KILN_WRITE_GOLDEN").is_some_and(|v| v == "1");
    let mut wrong = vec![];
    for (name, bytes) in every_wire() {
        let path = directory().join(format!("{name}.hex"));
        if write && !path.exists() {
            std::fs::write(&path, to_lines(&bytes)).unwrap();
        }
        match std::fs::read_to_string(&path) {
            Ok(text) if from_lines(&text) == bytes => {}
            Ok(text) => wrong.push(format!("{name}:\n is {}was {text}", to_lines(&bytes))),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "bytes that changed, or have no golden file:\n{}", wrong.join("\n"));
}

#[test]
fn every_golden_file_belongs_to_a_message_and_decodes_to_it() {
    let mut left: BTreeSet<String> = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for (name, message) in every_message() {
        let file = format!("{name}.hex");
        assert!(left.remove(&file), "{file} is missing, or two messages have this name");
        let frame = from_lines(&std::fs::read_to_string(directory().join(&file)).unwrap());
        let (prefix, value) = frame.split_at(4);
        assert_eq!(prefix, u32::try_from(value.len()).unwrap().to_be_bytes(), "{name}");
        assert_eq!(message.kind().decode(value).unwrap(), message, "{name}");
    }
    for channel in ["registry", "egress", "exec"] {
        let file = format!("preamble-{channel}.hex");
        assert!(left.remove(&file), "{file} is missing");
        let bytes = from_lines(&std::fs::read_to_string(directory().join(&file)).unwrap());
        let preamble = Preamble::decode(bytes[..].try_into().unwrap()).unwrap();
        assert_eq!(preamble.nonce, token(0x80));
    }
    assert!(left.is_empty(), "golden files of no message: {left:?}");
}

/// 32 bytes a line, so that a difference is seen in review.
fn to_lines(bytes: &[u8]) -> String {
    bytes.chunks(32).map(|line| hex::encode(line) + "\n").collect()
}

fn from_lines(text: &str) -> Vec<u8> {
    hex::decode(text.split_ascii_whitespace().collect::<String>()).unwrap()
}
