//! A length inside a message is a hostile peer's word: decoding must not allocate by it.
//!
//! A counting allocator of this test binary sees every request of the thread.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unsafe_code, reason = "a global allocator cannot be written without")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use support::{Kind, every_message};

struct Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Not there while the thread ends: nothing is measured then.
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The largest single allocation while `f` runs.
fn largest_allocation(f: impl FnOnce()) -> usize {
    LARGEST.set(0);
    f();
    LARGEST.get()
}

/// serde takes a sequence's length with caution, up to this much ahead of its elements
/// (`MAX_PREALLOC_BYTES` of `serde_core`).
const CAUTIOUS: usize = 1024 * 1024;

#[test]
fn a_huge_length_in_a_message_allocates_little() {
    // The largest lengths that postcard can say, put in place of every byte of every message.
    let huge: [&[u8]; 3] = [
        &[0xff, 0xff, 0xff, 0xff, 0x0f],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    ];
    for (name, message) in every_message() {
        let frame = message.encode().unwrap();
        let value = &frame[4..];
        for at in 0..value.len() {
            for length in huge {
                let bytes = [&value[..at], length, &value[at + 1..]].concat();
                for kind in Kind::ALL {
                    let largest = largest_allocation(|| drop(kind.decode(&bytes)));
                    assert!(largest <= CAUTIOUS, "{name}, byte {at}, as {kind:?}: {largest} bytes");
                }
            }
        }
    }
}

#[test]
fn the_counter_counts() {
    assert!(largest_allocation(|| drop(std::hint::black_box(vec![0u8; 4096]))) >= 4096);
}
