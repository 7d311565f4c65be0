//! The registry gateway against a real docker-registry and real clients.
#![allow(clippy::unwrap_used)]

mod clients;
mod containers;
mod counter;
mod external;
mod garbage;
mod guests;
mod managed;
mod matrix;
mod publish;
mod support;
mod upstream;
