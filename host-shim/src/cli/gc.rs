//! `kiln gc`: what the server is not to keep any more goes now.

use serde::Deserialize;
use serde_json::Value;

use super::client::Client;
use super::error::{CliError, print_line};
use super::escape::escape_json;
use super::view::{count, size};

/// Remove what the server is not to keep any more, now (administrators)
#[derive(Debug, clap::Args)]
pub struct GcArgs {
    /// A text, or the API's JSON
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

/// What a server says that it has removed. An older or newer one may not say all of it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Collected {
    log_events_removed: u64,
    log_bytes_removed: u64,
    builds_removed: u64,
    sessions_removed: u64,
    sources_removed: u64,
    images_removed: u64,
    blobs_removed: u64,
    blob_bytes_removed: u64,
}

/// Runs the command.
pub async fn run(client: &Client, args: GcArgs) -> Result<(), CliError> {
    let answer: Value = client.collect_garbage().await?;
    let text = match args.format {
        Format::Json => escape_json(&answer.to_string()).into_owned(),
        Format::Text => {
            let collected = Collected::deserialize(&answer).map_err(|error| {
                CliError::host(format!("the server's answer is not understood: {error}"))
            })?;
            summary(&collected)
        }
    };
    print_line(&text).map(drop)
}

fn summary(collected: &Collected) -> String {
    let logs = format!("log line{{s}} ({})", size(collected.log_bytes_removed));
    let blobs = format!("blob{{s}} ({})", size(collected.blob_bytes_removed));
    let parts = [
        (collected.log_events_removed, logs.as_str()),
        (collected.builds_removed, "build{s}"),
        (collected.sessions_removed, "session{s}"),
        (collected.sources_removed, "source{s} of no build"),
        (collected.images_removed, "image{s} without a name"),
        (collected.blobs_removed, blobs.as_str()),
    ];
    let some = parts.into_iter().filter(|(n, _)| *n > 0);
    let some: Vec<_> = some
        .map(|(n, what)| {
            format!("{} {}", count(n), what.replacen("{s}", if n == 1 { "" } else { "s" }, 1))
        })
        .collect();
    if some.is_empty() {
        return "there is nothing to remove".to_owned();
    }
    format!("removed {}", some.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_has_what_there_was() {
        let mut collected = Collected::default();
        assert_eq!(summary(&collected), "there is nothing to remove");
        collected.sessions_removed = 1;
        assert_eq!(summary(&collected), "removed 1 session");
        collected = Collected {
            log_events_removed: 12_345,
            log_bytes_removed: 1536,
            builds_removed: 2,
            sessions_removed: 3,
            sources_removed: 1,
            images_removed: 2,
            blobs_removed: 5,
            blob_bytes_removed: 2048,
        };
        let expected = "removed 12,345 log lines (1.5 KiB), 2 builds, 3 sessions, 1 source of no build, 2 images without a name, 5 blobs (2.0 KiB)";
        assert_eq!(summary(&collected), expected);
    }
}
