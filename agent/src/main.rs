//! Kiln's agent: PID 1 of a VM, or the OCI runtime's wrapper when called as one.
mod events;
mod source;
mod tunnel;
mod vsock;

fn main() {}
