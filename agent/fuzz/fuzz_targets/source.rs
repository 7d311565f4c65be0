//! A stranger's archive, unpacked on a memory disk. See `attempt.rs` for what must hold.
//!
//! `scripts/fuzz` runs it as the root of a user namespace, as the agent is root: what a mistake of the unpacker's would
//! let out must not hurt.

#![no_main]
#![allow(dead_code, unused_imports)]

#[path = "../attempt.rs"]
mod attempt;
#[path = "../../src/source/mod.rs"]
mod source;

use std::path::Path;
use std::sync::LazyLock;

use attempt::Place;
use libfuzzer_sys::fuzz_target;

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let dir = format!("/dev/shm/kiln-fuzz-{}", std::process::id());
    Place::new(Path::new(&dir)).expect("/dev/shm takes files")
});

fuzz_target!(|data: &[u8]| {
    PLACE.attempt(data);
});
