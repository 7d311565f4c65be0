//! `kiln`: the client commands.

use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::Parser;
use kiln::cli::{ClientCommand, Global};

/// Builds container images, each in a microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "kiln", version)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    #[command(flatten)]
    Client(ClientCommand),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kiln: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow!("another TLS provider is installed already"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let code = match cli.command {
        Command::Client(command) => runtime.block_on(command.run(&cli.global)),
    };
    // A thread that waits for standard input must not keep a command that was interrupted.
    runtime.shutdown_background();
    Ok(code)
}
