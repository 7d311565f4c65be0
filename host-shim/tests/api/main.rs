//! The HTTP API over loopback, with a real store, a real client and a small scheduler.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../support/agent.rs"]
mod agent;

mod builds;
mod cp_cli;
mod events;
mod exec;
mod exec_cli;
mod files;
mod instances;
mod kept;
mod limits;
mod metrics;
mod openapi;
mod refusals;
mod registry;
mod secrets;
mod support;
mod tokens;
