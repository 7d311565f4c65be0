//! The heap of the agent, through which every line of a build's log passes.
#![allow(unsafe_code, reason = "the C library's settings are its own")]

use nix::libc::{M_ARENA_MAX, M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD, c_int, mallopt};

const MIB: c_int = 1024 * 1024;

/// Keeps what is freed, up to 4 MiB, for what comes next: pieces of a log would otherwise be given back to the kernel and faulted in
/// again one by one, which costs a stream a tenth of its rate under emulation. Before there are threads.
pub fn keep() {
    for (setting, value) in
        [(M_TRIM_THRESHOLD, 4 * MIB), (M_TOP_PAD, MIB), (M_MMAP_THRESHOLD, MIB), (M_ARENA_MAX, 1)]
    {
        // SAFETY: it takes two numbers and changes nothing but the allocator's settings. What it refuses stays as it was.
        unsafe { mallopt(setting, value) };
    }
}
