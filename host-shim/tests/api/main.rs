//! The HTTP API over loopback, with a real store, a real client and a small scheduler.

#![allow(clippy::unwrap_used, missing_docs)]

mod builds;
mod events;
mod limits;
mod refusals;
mod support;
mod tokens;
