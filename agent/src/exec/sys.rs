//! The one call of sessions that Rust cannot check.
#![allow(unsafe_code, reason = "tokio cannot know that a descriptor stays open")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime watch a descriptor that does not block.
pub fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor, so that it stays open and the same as long as it is registered.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
