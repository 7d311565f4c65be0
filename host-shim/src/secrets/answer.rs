//! What a guest gets for a request.

use kiln_protocol::secret::{SecretAnswer, SecretId};

use super::{Owner, Vault, VaultError};
use crate::build::Build;
use crate::store::{Store, StoreError};

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The value does not open.
    #[error(transparent)]
    Vault(#[from] VaultError),
}

/// The answer to a build's guest that asks for a secret: its own value, else its tenant's, and only of what it
/// has declared.
pub async fn answer(
    store: &dyn Store,
    vault: &Vault,
    build: &Build,
    id: &SecretId,
) -> Result<SecretAnswer, AnswerError> {
    if !build.request.secrets.iter().any(|declared| declared.id == *id) {
        return Ok(SecretAnswer::Denied);
    }
    if let Some(sealed) = store.build_secret(&build.id, id).await? {
        return Ok(SecretAnswer::Value(vault.open(
            Owner::Build(&build.id),
            id.as_str(),
            &sealed,
        )?));
    }
    let Some(sealed) = store.secret(&build.tenant, id).await? else {
        return Ok(SecretAnswer::Missing);
    };
    Ok(SecretAnswer::Value(vault.open(Owner::Tenant(&build.tenant), id.as_str(), &sealed)?))
}
