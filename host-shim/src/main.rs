//! `kiln`: the server, and the client commands.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, FromArgMatches, Parser};
use kiln::cli::error::{CliError, Exit};
use kiln::cli::{ClientCommand, Global, json_line};
use kiln::config::LogFormat;
use kiln::serve::ServeCommand;
use tokio::runtime::Runtime;

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
    match run(parse()) {
        Ok(code) => code,
        Err(error) => {
            // Nobody is left to tell when stderr is closed or full.
            let _ = writeln!(std::io::stderr(), "kiln: {error:#}");
            let usage = kiln::serve::is_usage(&error);
            ExitCode::from(if usage { Exit::Usage } else { Exit::Failed } as u8)
        }
    }
}

fn parse() -> Cli {
    let parsed = command().try_get_matches().and_then(|found| Cli::from_arg_matches(&found));
    parsed.unwrap_or_else(|mut error| {
        // clap names hidden commands where one is missing.
        if let Some(ContextValue::Strings(names)) = error.get(ContextKind::ValidSubcommand) {
            let shown = names.iter().filter(|name| *name != "sweep").cloned().collect();
            error.insert(ContextKind::ValidSubcommand, ContextValue::Strings(shown));
        }
        if error.use_stderr() && json_line::is_asked_for(std::env::args_os()) {
            as_problem(&error).report_json();
            std::process::exit(Exit::Usage as i32);
        }
        error.exit()
    })
}

/// clap's words as an error of kiln's: first what is wrong, then how it would be right.
fn as_problem(error: &clap::Error) -> CliError {
    let text = error.render().to_string();
    let text = text.trim().trim_start_matches("error: ");
    match text.split_once('\n') {
        Some((message, hint)) => CliError::usage(message).hint(hint.trim()),
        None => CliError::usage(text),
    }
}

/// The command line. What every client command takes means nothing to those that serve, and is not in
/// their help.
fn command() -> clap::Command {
    let mut command = Cli::command();
    // Gives each command what is global.
    command.build();
    for server in ["serve", "sweep"] {
        command = command.mut_subcommand(server, |server| {
            server.mut_args(|arg| if arg.is_global_set() { arg.hide(true) } else { arg })
        });
    }
    command
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow!("another TLS provider is installed already"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    match cli.command {
        Command::Client(command) => {
            to_the_end(runtime, async { Ok(command.run(&cli.global).await) })
        }
        Command::Serve(command) => to_the_end(runtime, command.run()).map(|()| ExitCode::SUCCESS),
        Command::Sweep(settings) => {
            kiln::serve::log::start(LogFormat::Text);
            to_the_end(runtime, kiln::serve::sweep(*settings)).map(|_| ExitCode::SUCCESS)
        }
    }
}

/// Runs what a command does, however it ends. A thread that waits, for standard input or for work that nobody wants
/// any more, must not keep a command that was interrupted or has failed.
fn to_the_end<T>(
    runtime: Runtime,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let ended = runtime.block_on(work);
    runtime.shutdown_background();
    ended
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_keeps_no_command_however_it_ends() {
        for fails in [true, false] {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (release, wait) = std::sync::mpsc::channel::<()>();
            let ended = to_the_end(runtime, async {
                let (started, begun) = tokio::sync::oneshot::channel();
                tokio::task::spawn_blocking(move || {
                    let _ = started.send(());
                    wait.recv()
                });
                begun.await?;
                if fails { Err(anyhow!("it failed")) } else { Ok(()) }
            });
            // It is only here that the thread may end.
            assert_eq!(ended.is_err(), fails);
            drop(release);
        }
    }
}
