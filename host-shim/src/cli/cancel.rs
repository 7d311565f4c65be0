//! `kiln cancel`: ends a build.

use clap::builder::NonEmptyStringValueParser;

use super::client::Client;
use super::error::CliError;

/// Cancel a build; returns once it has ended
#[derive(Debug, clap::Args)]
pub struct CancelArgs {
    /// The build
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: String,
}

/// Runs the command.
pub async fn run(client: &Client, args: CancelArgs) -> Result<(), CliError> {
    Ok(client.cancel(&args.id).await?)
}
