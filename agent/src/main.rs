//! Kiln's agent: PID 1 of a VM, or the OCI runtime's wrapper when called as one.

mod engine;
mod events;
mod init;
mod runtime;
mod session;
mod source;
mod tunnel;

fn main() {}
