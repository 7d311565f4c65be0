//! `kiln cp`: files out of a running build or instance or a kept build's failed step, or into one.
//!
//! ```text
//! ID:SRC ─▶ the API ─▶ fetch ─▶ unpack at DST, or - (standard output)
//! SRC, or - (standard input) ─▶ send ─▶ the API ─▶ ID:DST
//! ```
//! What comes from there is a stranger's archive: nothing is made but below the destination, and no link in it is
//! followed out of it.

mod fetch;
mod send;
mod side;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use reqwest::StatusCode;
use rustix::fs::{Mode, OFlags};
use serde_json::Value;

use self::side::{Copy, Remote};
use super::client::{CallError, Client};
use super::error::{CliError, note};

/// Copy files out of a running build or instance, or into one
///
/// One of the two is ID:PATH, a path in the step that runs, in the failed step of a kept build, or in the instance. `-`
/// is a tar archive on standard input or output. An existing directory gets the files inside it; otherwise they get the
/// destination's name. `DIR/.` is what is in a directory.
#[derive(Debug, clap::Args)]
pub struct CpArgs {
    /// In the VM itself, as root; for administrators
    #[arg(long)]
    vm: bool,
    /// Also when the step has secrets
    #[arg(long, conflicts_with = "vm")]
    with_secrets: bool,
    /// PATH or ID:PATH, or - for an archive on standard input
    #[arg(value_name = "[ID:]SRC")]
    from: OsString,
    /// PATH or ID:PATH, or - for an archive on standard output
    #[arg(value_name = "[ID:]DST")]
    to: OsString,
}

/// Copies.
pub async fn run(client: &Client, args: CpArgs) -> Result<(), CliError> {
    let CpArgs { vm, with_secrets, from, to } = args;
    let query = |path: &str| {
        let mut query = vec![("path", path.to_owned())];
        let flags = [("vm", vm), ("with_secrets", with_secrets)];
        query.extend(flags.iter().filter(|(_, on)| *on).map(|(name, _)| (*name, "true".into())));
        query
    };
    match side::parse(&from, &to).map_err(CliError::usage)? {
        Copy::Out { from: Remote { id, path }, to } => {
            fetch::run(client, &id, query(&path), to).await
        }
        Copy::In { from, to: Remote { id, path } } => {
            send::run(client, &id, query(&path), from).await
        }
    }
}

/// Where the files of that id are: builds and instances have one kind of id, and never the same one.
async fn files<'a>(client: &Client, id: &'a str) -> Result<[&'a str; 3], CliError> {
    for kind in ["builds", "instances"] {
        match client.get::<Value>(&[kind, id]).await {
            Ok(_) => return Ok([kind, id, "files"]),
            Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(CliError::failed(format!("there is no build or instance {id}")))
}

/// Says what did not come along.
fn note_left_out(what: &str) {
    note(&format!("left out {what}"));
}

/// What the server said of a copy.
fn refused(error: CallError) -> CliError {
    match error.status() {
        // The command line was fine; the files were not.
        Some(StatusCode::UNPROCESSABLE_ENTITY | StatusCode::BAD_GATEWAY) => {
            CliError::failed(error.to_string())
        }
        _ => error.into(),
    }
}

/// Opens a directory of this machine.
fn open_here(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}
