//! `kiln-image`: wiring only; the verbs are in the library's `cli`.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use kiln_image::cli;

/// Failed; wrong usage is clap's own 2.
const FAILED: u8 = 1;
const USAGE: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // Its complaint about a stderr that is full would be a panic.
        .log_internal_errors(false)
        .init();
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        cli::say("another TLS provider was installed already");
        return ExitCode::from(FAILED);
    }
    match cli::run(cli).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cli::say(&format!("{error:#}"));
            ExitCode::from(if cli::is_usage(&error) { USAGE } else { FAILED })
        }
    }
}
