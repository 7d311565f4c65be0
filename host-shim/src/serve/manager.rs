//! What the service manager is told, where there is one: `NOTIFY_SOCKET` says whereto (sd_notify(3)).

use std::net::SocketAddr;
use std::time::Duration;

use sd_notify::NotifyState;

use super::drain::AFTER;

/// It serves.
pub(super) fn ready(address: SocketAddr) {
    let status = format!("serves on {address}");
    tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// It was told to stop, and ends within this and [`AFTER`]: until then it is not to be killed.
pub(super) fn draining(limit: Duration) {
    let more = format!("EXTEND_TIMEOUT_USEC={}", (limit + AFTER).as_micros());
    let status = NotifyState::Status("drains: builds that run may end");
    tell(&[NotifyState::Stopping, NotifyState::Custom(&more), status]);
}

/// It waits for builds no more.
pub(super) fn stopping() {
    tell(&[NotifyState::Status("stops")]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager cannot be told how the server is");
    }
}
