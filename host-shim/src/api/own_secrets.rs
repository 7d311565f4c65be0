//! The parts `secret.<id>` of POST `/builds`: values for that build alone.

use kiln_protocol::secret::{MAX_SECRET_VALUE, MAX_SECRETS, SecretId, SecretSpec};
use zeroize::Zeroizing;

use super::error::ApiError;
use super::multipart::Part;
use super::secrets::bad_id;
use crate::build::BuildId;
use crate::secrets::{Owner, Sealed, Vault};

/// What the name of such a part begins with.
pub(super) const PREFIX: &str = "secret.";
/// Most bytes of all values of one build: they wait in memory until the build is stored.
const MAX_TOTAL: usize = 8 * 1024 * 1024;

/// The values that have come so far.
#[derive(Default)]
pub(super) struct OwnSecrets {
    values: Vec<(SecretId, Zeroizing<Vec<u8>>)>,
    total: usize,
}

impl OwnSecrets {
    /// Takes a part whose name has the prefix.
    pub(super) async fn insert(&mut self, id: &str, mut part: Part<'_>) -> Result<(), ApiError> {
        // No build declares more, and each is compared with all before it.
        if self.values.len() == MAX_SECRETS {
            let message = format!(
                "the request has more than {MAX_SECRETS} parts {PREFIX}*; a build declares at most so many secrets"
            );
            return Err(ApiError::too_large(message));
        }
        let id = SecretId::new(id).map_err(|_| bad_id(id))?;
        if self.values.iter().any(|(earlier, _)| *earlier == id) {
            return Err(super::fields::duplicate(&format!("{PREFIX}{id}")));
        }
        let mut value = Zeroizing::new(Vec::new());
        while let Some(chunk) = part.chunk().await? {
            self.total += chunk.len();
            if value.len() + chunk.len() > MAX_SECRET_VALUE {
                let message = format!("the secret {id} has more than {MAX_SECRET_VALUE} bytes");
                return Err(ApiError::too_large(message));
            }
            if self.total > MAX_TOTAL {
                let message = format!(
                    "the secrets of the build have more than {MAX_TOTAL} bytes together; set some with PUT /secrets"
                );
                return Err(ApiError::too_large(message));
            }
            value.extend_from_slice(&chunk);
        }
        self.values.push((id, value));
        Ok(())
    }

    /// Of ids and values, under the vault's key; `None` without any.
    pub(super) fn fingerprint(&self, vault: &Vault) -> Option<[u8; 32]> {
        if self.values.is_empty() {
            return None;
        }
        let mut sorted: Vec<_> = self.values.iter().collect();
        sorted.sort_by_key(|(id, _)| id);
        Some(vault.fingerprint(sorted.iter().map(|(id, value)| (id.as_str(), value.as_slice()))))
    }

    /// Seals them for a build. One that the build does not declare would never be used.
    pub(super) fn seal(
        self,
        vault: &Vault,
        build: &BuildId,
        declared: &[SecretSpec],
    ) -> Result<Vec<(SecretId, Sealed)>, ApiError> {
        self.values
            .into_iter()
            .map(|(id, value)| {
                if !declared.iter().any(|spec| spec.id == id) {
                    let message = format!(
                        "there is a value {PREFIX}{id}, but the field secrets does not declare {id}"
                    );
                    return Err(ApiError::bad_request("undeclared_secret", message));
                }
                let sealed = vault.seal(Owner::Build(build), id.as_str(), value.to_vec());
                Ok((id, sealed.map_err(|error| ApiError::internal(&error))?))
            })
            .collect()
    }
}
