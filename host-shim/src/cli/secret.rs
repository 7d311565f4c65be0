//! `kiln secret`: a tenant's secrets on the server.

use std::io::{IsTerminal, Read as _};
use std::path::PathBuf;

use kiln_protocol::secret::{MAX_SECRET_VALUE, SecretId};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::client::Client;
use super::error::{CliError, print_line};
use super::format::{Format, print_json};
use super::secret_flag;
use super::table::table;

/// Manage the tenant's secrets, which builds may ask for
#[derive(Debug, clap::Args)]
pub struct SecretArgs {
    #[command(subcommand)]
    command: SecretCommand,
}

/// What to do with secrets.
#[derive(Debug, clap::Subcommand)]
enum SecretCommand {
    /// Set a secret to the bytes of standard input, or of a file; it is never shown again
    Set {
        /// What builds call it
        #[arg(value_parser = |id: &str| SecretId::new(id))]
        id: SecretId,
        /// The file with the value [default: standard input]
        #[arg(long, value_name = "FILE")]
        src: Option<PathBuf>,
    },
    /// List secrets, without their values
    Ls {
        /// A table, or a JSON array of the API's secrets
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Remove a secret
    Rm {
        /// What builds call it
        #[arg(value_parser = |id: &str| SecretId::new(id))]
        id: SecretId,
    },
}

/// A secret as the server lists it.
#[derive(Deserialize)]
struct Known {
    id: String,
    created_at: String,
    updated_at: String,
}

/// Runs the command.
pub async fn run(client: &Client, args: SecretArgs) -> Result<(), CliError> {
    match args.command {
        SecretCommand::Set { id, src } => {
            let value = match src {
                Some(path) => secret_flag::read(&path)?,
                None => read_stdin()?,
            };
            if value.len() > MAX_SECRET_VALUE {
                return Err(CliError::usage(format!(
                    "the secret has more than {MAX_SECRET_VALUE} bytes"
                )));
            }
            Ok(client.put(&["secrets", id.as_str()], value.to_vec()).await?)
        }
        SecretCommand::Ls { format: Format::Json } => print_json(&client.get(&["secrets"]).await?),
        SecretCommand::Ls { format: Format::Table } => {
            let known: Vec<Known> = client.get(&["secrets"]).await?;
            let rows = known.into_iter().map(|one| [one.id, one.created_at, one.updated_at]);
            print_line(&table(["ID", "CREATED", "UPDATED"], rows)).map(drop)
        }
        SecretCommand::Rm { id } => Ok(client.delete(&["secrets", id.as_str()]).await?),
    }
}

fn read_stdin() -> Result<Zeroizing<Vec<u8>>, CliError> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        // It would be seen on the screen.
        return Err(CliError::usage(
            "the value is expected on standard input, which is a terminal",
        )
        .hint("like this: kiln secret set ID < FILE, or with --src FILE"));
    }
    let mut value = Zeroizing::new(Vec::new());
    stdin
        .lock()
        .take(MAX_SECRET_VALUE as u64 + 1)
        .read_to_end(&mut value)
        .map_err(|e| CliError::failed(format!("standard input: {e}")))?;
    Ok(value)
}
