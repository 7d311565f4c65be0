//! What a peer sends on the control connection, or on a session's: a stream of frames of any of the six kinds.
//!
//! The first byte chooses the kind, the rest is the stream. Nothing may panic, and a value that
//! decodes must encode to a frame that decodes to the same value.
//! `scripts/fuzz` runs it.

#![no_main]

use std::fmt::Debug;

use kiln_protocol::exec::{HostToSession, SessionToHost};
use kiln_protocol::frame::{self, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply};
use kiln_protocol::message::{AgentToHost, HostToAgent};
use kiln_protocol::preamble::{self, Preamble};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Length of a frame's prefix.
const PREFIX: usize = 4;

fuzz_target!(|data: &[u8]| {
    let Some((kind, stream)) = data.split_first() else { return };
    match kind % 7 {
        0 => frames::<Hello>(stream),
        1 => frames::<HelloReply>(stream),
        2 => frames::<HostToAgent>(stream),
        3 => frames::<AgentToHost>(stream),
        4 => frames::<HostToSession>(stream),
        5 => frames::<SessionToHost>(stream),
        _ => opening(stream),
    }
});

fn frames<T>(stream: &[u8])
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    // As one value without a length, so that the fuzzer does not have to find the length first.
    if let Ok(value) = frame::decode::<T>(stream) {
        again(&value);
    }
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    runtime.block_on(async {
        let mut reader = FrameReader::new(stream);
        loop {
            match reader.read::<T>().await {
                Ok(value) => again(&value),
                // The reader is at the next frame after these two.
                Err(frame::FrameError::Malformed(_) | frame::FrameError::Trailing(_)) => {}
                Err(_) => break,
            }
        }
    });
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) {
    let frame = frame::encode(value).expect("a value that came in a frame fits into one");
    assert_eq!(&frame::decode::<T>(&frame[PREFIX..]).expect("it decodes again"), value);
}

fn opening(stream: &[u8]) {
    let Some(Ok(bytes)) = stream.get(..preamble::LEN).map(<[u8; preamble::LEN]>::try_from) else {
        return;
    };
    if let Ok(preamble) = Preamble::decode(&bytes) {
        assert_eq!(preamble.encode(), bytes);
    }
}
