//! The OCI runtime's wrapper.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

/// Whether this program was called as the OCI runtime.
pub fn is_wrapper_call(argv0: &OsStr) -> bool {
    Path::new(argv0).file_name().is_some_and(|name| name == "kiln-oci-runtime")
}

/// Runs as the OCI runtime.
pub fn wrapper_main() -> ExitCode {
    eprintln!("kiln-oci-runtime: this agent was built without its runtime");
    ExitCode::FAILURE
}
