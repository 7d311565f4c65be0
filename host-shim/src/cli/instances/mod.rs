//! `kiln instances`: the instances that there are, one file for each verb; and what they share with `kiln run`.

pub mod log;
mod logs;
mod ls;
mod rm;

use std::time::Duration;

use super::client::Client;
use super::error::CliError;

/// Manage instances: images that run, or have run
#[derive(Debug, clap::Args)]
pub struct InstancesArgs {
    #[command(subcommand)]
    command: InstancesCommand,
}

#[derive(Debug, clap::Subcommand)]
enum InstancesCommand {
    Ls(ls::LsArgs),
    Logs(logs::LogsArgs),
    Rm(rm::RmArgs),
}

/// Runs the command.
pub async fn run(client: &Client, patience: Duration, args: InstancesArgs) -> Result<(), CliError> {
    match args.command {
        InstancesCommand::Ls(args) => ls::run(client, args).await,
        InstancesCommand::Logs(args) => logs::run(client, patience, args).await,
        InstancesCommand::Rm(args) => rm::run(client, args).await,
    }
}

/// What to do about an instance that was left alone.
pub fn still_there(id: &str) -> String {
    format!("it may still be there; delete it with: kiln instances rm {id}")
}
