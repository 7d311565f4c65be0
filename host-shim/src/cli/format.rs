//! How a list is shown: for people, or as the API gives it.

use serde_json::Value;

use super::error::{CliError, print_line};
use super::escape::escape_json;

/// What `--format` may be of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[expect(missing_docs, reason = "clap would take it for help")]
pub enum Format {
    Table,
    Json,
}

/// Prints what the server answered, with nothing in it that acts on a terminal.
pub fn print_json(answer: &Value) -> Result<(), CliError> {
    print_line(&escape_json(&answer.to_string())).map(drop)
}
