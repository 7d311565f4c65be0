//! `kiln`: the server, and the client commands.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::Parser;
use kiln::cli::{ClientCommand, Global};
use kiln::serve::ServeCommand;

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
    /// Run the server: queue, API, registry gateway, VMs
    Serve(Box<ServeCommand>),
    /// Remove what a server that was killed left: VMs, sockets, cgroups
    #[command(hide = true)]
    Sweep(Box<kiln::config::ServeArgs>),
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
        Command::Serve(command) => {
            log_to_stderr();
            runtime.block_on(command.run()).map(|()| ExitCode::SUCCESS)?
        }
        Command::Sweep(settings) => {
            log_to_stderr();
            runtime.block_on(kiln::serve::sweep(*settings)).map(|_| ExitCode::SUCCESS)?
        }
    };
    // A thread that waits for standard input must not keep a command that was interrupted.
    runtime.shutdown_background();
    Ok(code)
}

/// The server's log: its level by `RUST_LOG`, and "info" without.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
