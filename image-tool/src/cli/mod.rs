//! The program's verbs, one file each. Progress goes to standard error, results to standard output.

mod build;
mod disk;
mod inspect;
mod publish;
mod verify;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use oci_client::Reference;
use tokio::signal::unix::{SignalKind, signal};

use crate::registry::{self, CREDS_VARIABLE, Options, RegistryError};

/// Makes, publishes and checks the images that Kiln's VMs run.
#[derive(Debug, Parser)]
#[command(name = "kiln-image", version, about)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a builder bundle or a base image from a recipe directory (needs root)
    Build(build::Build),
    /// Push a result of `build`, or any OCI layout with one image, to a registry
    Publish(publish::Publish),
    /// Show what a directory or a reference holds
    Inspect(inspect::Inspect),
    /// Make a disk that a VM can boot from of an image; needs no root
    Disk(disk::Disk),
    /// Check every digest of a directory or a reference, and a bundle's protocol
    Verify(verify::Verify),
}

/// Options of all verbs that may talk to a registry.
#[derive(Debug, Args)]
struct RegistryOptions {
    /// HTTP without TLS
    #[arg(long)]
    plain_http: bool,
    /// Credentials; Docker's configuration file otherwise
    #[arg(long, value_name = "USER:PASS", env = CREDS_VARIABLE, hide_env_values = true, value_parser = parse_creds)]
    creds: Option<Creds>,
}

/// User and password, apart, with a `Debug` that hides the second.
#[derive(Clone)]
struct Creds(String, String);

impl std::fmt::Debug for Creds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:***", self.0)
    }
}

fn parse_creds(text: &str) -> Result<Creds, &'static str> {
    match text.split_once(':') {
        Some((user, password)) if !user.is_empty() => Ok(Creds(user.into(), password.into())),
        _ => Err("expected USER:PASS"),
    }
}

impl From<RegistryOptions> for Options {
    fn from(options: RegistryOptions) -> Self {
        let creds = options.creds.map(|Creds(user, password)| (user, password));
        Self { plain_http: options.plain_http, creds, bearer: None }
    }
}

/// `DIR|REF`: a directory that exists, else a reference.
#[derive(Debug)]
enum Subject {
    Dir(PathBuf),
    Ref(Box<Reference>),
}

impl Subject {
    fn parse(text: &str) -> Result<Self, RegistryError> {
        let path = Path::new(text);
        if path.is_dir() || text.starts_with(['/', '.']) {
            return Ok(Self::Dir(path.to_owned()));
        }
        Ok(Self::Ref(Box::new(registry::parse_reference(text)?)))
    }
}

/// Interrupted by a signal.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; nothing was changed")]
struct Interrupted;

/// Runs a verb until it ends or a signal does. Dropping the verb ends the programs that it started and
/// removes what it had not finished.
pub async fn run(cli: Cli) -> anyhow::Result<()> {
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let verb = async {
        match cli.verb {
            Verb::Build(verb) => verb.run().await,
            Verb::Publish(verb) => verb.run().await,
            Verb::Inspect(verb) => verb.run().await,
            Verb::Disk(verb) => verb.run().await,
            Verb::Verify(verb) => verb.run().await,
        }
    };
    tokio::select! {
        result = verb => result,
        _ = interrupt.recv() => Err(Interrupted.into()),
        _ = terminate.recv() => Err(Interrupted.into()),
    }
}

/// Whether the error is in how the program was called.
pub fn is_usage(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(RegistryError::Reference { .. }))
}

/// A line on standard error, made safe: parts of it are words of registries and of other programs.
/// Nobody is left to tell when that is closed or full.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "kiln-image: {}", crate::text::printable(line));
}

fn progress(line: &str) {
    say(line);
}

/// Writes a result to standard output. A reader that has gone (`kiln-image inspect … | head`) is no
/// error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_subject_is_a_directory_if_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Subject::parse(dir.path().to_str().unwrap()).unwrap(), Subject::Dir(_)));
        assert!(matches!(Subject::parse("./missing").unwrap(), Subject::Dir(_)));
        assert!(matches!(Subject::parse("localhost:5000/a:b").unwrap(), Subject::Ref(_)));
        assert!(is_usage(&Subject::parse("missing").unwrap_err().into()));
    }

    #[test]
    fn passwords_may_have_colons_and_are_not_shown() {
        let creds = parse_creds("user:a:b").unwrap();
        assert_eq!((creds.0.as_str(), creds.1.as_str()), ("user", "a:b"));
        assert_eq!(format!("{creds:?}"), "user:***");
        assert!(parse_creds("user").is_err() && parse_creds(":x").is_err());
    }
}
