//! `kiln instances rm`: stops and deletes one.

use clap::builder::NonEmptyStringValueParser;

use super::still_there;
use crate::cli::client::Client;
use crate::cli::error::{CliError, Exit};

/// Delete an instance with its log, stopping it first; returns once nothing of it is left
#[derive(Debug, clap::Args)]
pub struct RmArgs {
    /// The instance
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: String,
}

/// Runs the command.
pub async fn run(client: &Client, args: RmArgs) -> Result<(), CliError> {
    client.delete_instance(&args.id).await.map_err(|error| {
        let error = CliError::from(error);
        // What to do about a server that is not there is said already.
        match error.exit {
            Exit::Host if error.hint.is_none() => error.hint(still_there(&args.id)),
            _ => error,
        }
    })
}
