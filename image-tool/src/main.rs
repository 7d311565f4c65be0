//! `kiln-image`: wiring only; the verbs are in the library's `cli`.

use std::process::ExitCode;

use clap::Parser as _;
use kiln_image::{cli, text};

/// Failed; wrong usage is clap's own 2.
const FAILED: u8 = 1;
const USAGE: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        eprintln!("kiln-image: another TLS provider was installed already");
        return ExitCode::from(FAILED);
    }
    match cli::run(cli).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Parts of it are words of registries and of other programs.
            eprintln!("kiln-image: {}", text::printable(&format!("{error:#}")));
            ExitCode::from(if cli::is_usage(&error) { USAGE } else { FAILED })
        }
    }
}
