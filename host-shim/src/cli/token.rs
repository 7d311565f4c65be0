//! `kiln token`: makes, lists and revokes API tokens, through the API or offline on a data directory.

mod offline;

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use self::offline::Offline;
use super::client::Client;
use super::error::{CliError, print_line};
use super::escape::escape;
use super::fields;
use super::format::{Format, print_json};
use super::table::table;
use crate::build::Tenant;

/// Manage API tokens
#[derive(Debug, clap::Args)]
pub struct TokenArgs {
    /// Work on this data directory of a `kiln serve` of this host instead of asking the server
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: TokenCommand,
}

impl TokenArgs {
    /// Runs the command where the tokens are.
    pub async fn run(
        self,
        client: impl FnOnce() -> Result<Client, CliError>,
    ) -> Result<(), CliError> {
        match self.data_dir {
            Some(dir) => {
                let may_make = matches!(self.command, TokenCommand::Create(_));
                run(&Offline::open(&dir, may_make).await?, self.command).await
            }
            None => run(&client()?, self.command).await,
        }
    }
}

/// What to do with tokens.
#[derive(Debug, clap::Subcommand)]
pub enum TokenCommand {
    /// Make a token and print it; it is shown only now
    Create(NewToken),
    /// List tokens
    List {
        /// A table, or a JSON array of the API's tokens
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Revoke a token at once
    Revoke {
        /// The token's id, as `kiln token list` shows it
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        id: String,
    },
}

/// A token to make.
#[derive(Clone, Debug, clap::Args)]
pub struct NewToken {
    /// Whose it is
    #[arg(long, value_name = "T", value_parser = |name: &str| Tenant::new(name))]
    pub tenant: Tenant,
    /// What it may do
    #[arg(long, value_name = "R", value_parser = ["admin", "tenant", "reader"])]
    pub role: String,
    /// How long it is valid: a number of seconds (s), minutes (m), hours (h) or days (d), such as 30m or 7d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = fields::ttl)]
    pub ttl: u64,
    /// What it is for, for people
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
}

/// A token that was made.
#[derive(Debug, Deserialize)]
pub struct MadeToken {
    /// Its id, for revoking.
    pub id: String,
    /// The token itself.
    pub token: String,
}

/// A token in a list; the token itself is not known any more.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the API's field names")]
pub struct KnownToken {
    pub id: String,
    pub tenant: String,
    pub role: String,
    pub name: Option<String>,
    pub created_at: Option<String>,
    pub expires_at: Option<String>,
    pub revoked: bool,
    pub last_used_at: Option<String>,
}

impl KnownToken {
    /// Whether it opens anything now.
    fn state(&self, now: Timestamp) -> &'static str {
        let end = self.expires_at.as_ref().and_then(|end| end.parse::<Timestamp>().ok());
        if self.revoked {
            "revoked"
        } else if end.is_some_and(|end| end <= now) {
            "expired"
        } else {
            "valid"
        }
    }
}

/// Where tokens are kept: behind the API ([`Client`]), or in a data directory that is at hand.
#[expect(async_fn_in_trait, reason = "used here, where nothing asks for Send")]
pub trait Tokens {
    /// Makes one.
    async fn create(&self, new: &NewToken) -> Result<MadeToken, CliError>;
    /// All that the caller may see, as the API lists them.
    async fn list(&self) -> Result<Value, CliError>;
    /// Revokes one.
    async fn revoke(&self, id: &str) -> Result<(), CliError>;
}

/// Runs a command on tokens, wherever they are kept.
pub async fn run(tokens: &impl Tokens, command: TokenCommand) -> Result<(), CliError> {
    match command {
        TokenCommand::Create(new) => {
            let made = tokens.create(&new).await?;
            print_line(&escape(&made.token)).map(drop)
        }
        TokenCommand::List { format: Format::Json } => print_json(&tokens.list().await?),
        TokenCommand::List { format: Format::Table } => {
            let known = Vec::<KnownToken>::deserialize(tokens.list().await?).map_err(|error| {
                CliError::host(format!("the server's tokens are not understood: {error}"))
            })?;
            print_line(&listing(known, Timestamp::now())).map(drop)
        }
        TokenCommand::Revoke { id } => tokens.revoke(&id).await,
    }
}

fn listing(tokens: Vec<KnownToken>, now: Timestamp) -> String {
    let rows = tokens.into_iter().map(|token| {
        let state = token.state(now).to_owned();
        let text = Option::unwrap_or_default;
        let (name, created, expires) =
            (text(token.name), text(token.created_at), text(token.expires_at));
        let used = token.last_used_at.unwrap_or_else(|| "never".to_owned());
        [token.id, state, token.tenant, token.role, name, created, expires, used]
    });
    table(["ID", "STATE", "TENANT", "ROLE", "NAME", "CREATED", "EXPIRES", "LAST USED"], rows)
}

impl Tokens for Client {
    async fn create(&self, new: &NewToken) -> Result<MadeToken, CliError> {
        let mut body = json!({"tenant": new.tenant, "role": new.role, "ttl_seconds": new.ttl});
        if let Some(name) = &new.name {
            body["name"] = Value::from(name.as_str());
        }
        Ok(self.post(&["tokens"], &body).await?)
    }

    async fn list(&self) -> Result<Value, CliError> {
        Ok(self.get(&["tokens"]).await?)
    }

    async fn revoke(&self, id: &str) -> Result<(), CliError> {
        Ok(self.delete(&["tokens", id]).await?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_listing_says_which_tokens_still_open_something() {
        let token = |id: &str, revoked, expires_at: Option<&str>| KnownToken {
            id: id.into(),
            tenant: "dev".into(),
            role: "admin".into(),
            expires_at: expires_at.map(Into::into),
            revoked,
            ..KnownToken::default()
        };
        let past = "2026-01-01T00:00:00.000Z";
        let tokens = vec![
            token("a", false, None),
            token("b", false, Some("2026-01-01T00:00:00.001Z")),
            token("c", false, Some(past)),
            token("d", true, Some(past)),
            token("e", true, None),
        ];
        let listing = listing(tokens, past.parse().unwrap());
        let states = listing.lines().map(|line| line.split_whitespace().nth(1).unwrap());
        let expected = ["STATE", "valid", "valid", "expired", "revoked", "revoked"];
        assert_eq!(states.collect::<Vec<_>>(), expected);
    }
}
