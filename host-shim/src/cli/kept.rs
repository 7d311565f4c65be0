//! `kiln kept`: failed builds that can still be entered.

use clap::builder::NonEmptyStringValueParser;
use serde::Deserialize;
use serde_json::json;

use super::client::Client;
use super::error::{CliError, print_line};
use super::format::{Format, print_json};
use super::table::table;

/// Failed builds that can still be entered
#[derive(Debug, clap::Args)]
pub struct KeptArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List them, the oldest first
    Ls {
        /// A table, or a JSON array of the API's leases
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Let one stay for so many seconds from now
    Extend {
        /// The build
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        id: String,
        /// From now
        #[arg(value_parser = clap::value_parser!(u32).range(1..))]
        seconds: u32,
    },
    /// Let one go now
    Release {
        /// The build
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        id: String,
    },
}

#[derive(Debug, Deserialize)]
struct Lease {
    id: String,
    tenant: String,
    memory_mb: u32,
    until: String,
    sessions: usize,
}

/// Runs the command.
pub async fn run(client: &Client, args: KeptArgs) -> Result<(), CliError> {
    match args.verb {
        Verb::Ls { format: Format::Json } => print_json(&client.get(&["kept"]).await?),
        Verb::Ls { format: Format::Table } => {
            let leases: Vec<Lease> = client.get(&["kept"]).await?;
            print_line(&listing(&leases)).map(drop)
        }
        Verb::Extend { id, seconds } => {
            let body = json!({ "seconds": seconds }).to_string().into_bytes();
            Ok(client.put(&["kept", &id], body).await?)
        }
        Verb::Release { id } => Ok(client.delete(&["kept", &id]).await?),
    }
}

fn listing(leases: &[Lease]) -> String {
    let rows = leases.iter().map(|lease| {
        [
            lease.id.clone(),
            lease.tenant.clone(),
            lease.until.clone(),
            format!("{} MB", lease.memory_mb),
            if lease.sessions == 0 { "paused".into() } else { format!("{} in it", lease.sessions) },
        ]
    });
    table(["ID", "TENANT", "UNTIL", "MEMORY", "STATE"], rows)
}
