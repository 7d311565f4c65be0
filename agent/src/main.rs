//! Kiln's agent: PID 1 of a VM, or the OCI runtime's wrapper when called as one.

use std::process::ExitCode;

mod engine;
mod events;
mod init;
mod runtime;
mod session;
mod source;
mod tunnel;

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    if runtime::is_wrapper_call(&name) {
        return runtime::wrapper_main();
    }
    ExitCode::FAILURE
}
