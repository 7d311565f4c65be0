//! `kiln instances logs`: what an instance printed.

use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use tokio::sync::Notify;

use super::log::Log;
use crate::cli::client::Client;
use crate::cli::error::CliError;

/// Show what an instance printed: its stdout to stdout, its stderr to stderr
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// Go on until the instance ends
    #[arg(short, long)]
    follow: bool,
    /// The instance
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: String,
}

/// Runs the command. It succeeds when the log was shown, however the instance ended.
pub async fn run(client: &Client, patience: Duration, args: LogsArgs) -> Result<(), CliError> {
    let gone = Notify::new();
    let mut log = Log::new(client, &args.id, patience, &gone);
    let showing =
        async { if args.follow { log.follow().await.map(drop) } else { log.show_stored().await } };
    tokio::select! {
        biased;
        // Whoever read stdout has seen enough.
        () = gone.notified() => Ok(()),
        shown = showing => shown,
    }
}
