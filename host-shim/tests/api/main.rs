//! The HTTP API over loopback, with a real store, a real client and a small scheduler.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../support/agent.rs"]
mod agent;
#[path = "../support/bundle.rs"]
mod bundle;
#[path = "../support/mod.rs"]
mod real;

mod builds;
mod certificates;
mod cp_cli;
mod events;
mod exec;
mod exec_cli;
mod files;
mod gc;
mod instances;
mod kept;
mod limits;
mod log;
mod metrics;
mod openapi;
mod refusals;
mod registry;
mod secrets;
mod support;
mod tls;
mod tokens;
mod traces;
