//! Tokens in a data directory that is at hand: who can write there needs no token to make one. Works
//! while the server runs.

use std::path::Path;

use serde_json::{Value, json};

use super::{MadeToken, NewToken, Tokens};
use crate::api::types::Token;
use crate::causes::chain;
use crate::cli::error::CliError;
use crate::clock;
use crate::store::sqlite::{FILE_NAME, SqliteStore};
use crate::store::{Role, Store};
use crate::token::{self, CreateError};

/// A data directory.
pub struct Offline(SqliteStore);

impl Offline {
    /// Opens the directory's database. Only `create` makes one, and its directory, as it may come before
    /// the first `kiln serve`; a path that was mistyped before its last part is told, not made.
    pub async fn open(dir: &Path, may_make: bool) -> Result<Self, CliError> {
        let (wanted, what) = if may_make {
            // Of a name without a parent that is the current directory.
            (Path::new(".").join(dir.parent().unwrap_or(dir)), "directory")
        } else {
            (dir.join(FILE_NAME), "Kiln database")
        };
        // Whether it can be used is found out by using it.
        if matches!(wanted.try_exists(), Ok(false)) {
            return Err(CliError::failed(format!("there is no {what} {}", wanted.display()))
                .hint("give the --data-dir of a `kiln serve` of this host"));
        }
        let store = SqliteStore::open(dir).await;
        store.map(Self).map_err(because(format!("cannot open the database in {}", dir.display())))
    }
}

impl Tokens for Offline {
    async fn create(&self, new: &NewToken) -> Result<MadeToken, CliError> {
        let role = Role::from_name(&new.role)
            .ok_or_else(|| CliError::usage(format!("{:?} is not a role", new.role)))?;
        let (tenant, name, now) = (new.tenant.clone(), new.name.clone(), crate::clock::now());
        let made = token::create(&self.0, tenant, role, Some(new.ttl), name, now).await;
        let (token, record) = made.map_err(|error| match error {
            // The API answers these with 422.
            CreateError::Ttl(_) | CreateError::Name => CliError::usage(error.to_string()),
            error => because("cannot make the token")(error),
        })?;
        Ok(MadeToken { id: record.id, token })
    }

    async fn list(&self) -> Result<Value, CliError> {
        let tokens = self.0.tokens().await;
        let tokens = tokens.map_err(because("cannot list the tokens"))?;
        Ok(tokens.iter().map(|token| json!(Token::new(token, clock::now()))).collect())
    }

    async fn revoke(&self, id: &str) -> Result<(), CliError> {
        let revoked = self.0.revoke_token(id).await;
        revoked.map_err(because(format!("cannot revoke the token {id:?}")))
    }
}

fn because<E: std::error::Error>(what: impl Into<String>) -> impl FnOnce(E) -> CliError {
    let what = what.into();
    move |error| CliError::failed(format!("{what}: {}", chain(&error)))
}
