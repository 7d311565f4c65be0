//! Secrets: what a build declares, asks for, and gets.
//!
//! The job names them and never holds a value. The agent asks for each by [`crate::message::AgentToHost::SecretRequest`]
//! while the build runs, and the host answers by [`crate::message::HostToAgent::Secret`]: only what the build declared.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::job::{JobTooLarge, at_most};

/// Most secrets of a job.
pub const MAX_SECRETS: usize = 64;
/// Longest id of a secret, in bytes.
pub const MAX_SECRET_ID: usize = 128;
/// Longest name of the variable that holds a secret, in bytes.
pub const MAX_SECRET_VARIABLE: usize = 256;
/// Longest value of a secret, in bytes.
pub const MAX_SECRET_VALUE: usize = 512 * 1024;

/// Identifies a secret of a build. Letters, digits, `.`, `_` and `-`, the first no `.`; 1 to 128 bytes. So it is
/// a file's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretId(String);

/// A text that cannot be a secret's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret's id is 1 to 128 of A-Z, a-z, 0-9, `.`, `_` and `-`, the first no `.`")]
pub struct BadSecretId;

impl SecretId {
    /// Checks the text and takes it as an id.
    pub fn new(id: impl Into<String>) -> Result<Self, BadSecretId> {
        let id = id.into();
        let fits = (1..=MAX_SECRET_ID).contains(&id.len())
            && !id.starts_with('.')
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if fits { Ok(Self(id)) } else { Err(BadSecretId) }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SecretId {
    type Error = BadSecretId;
    fn try_from(id: String) -> Result<Self, BadSecretId> {
        Self::new(id)
    }
}

impl From<SecretId> for String {
    fn from(id: SecretId) -> Self {
        id.0
    }
}

impl fmt::Display for SecretId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A secret that a build declares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSpec {
    /// What the Dockerfile calls it.
    pub id: SecretId,
    /// A variable of every step that is to hold it.
    pub variable: Option<String>,
}

impl SecretSpec {
    pub(crate) fn check_all(all: &[Self]) -> Result<(), JobTooLarge> {
        at_most("secrets count", all.len(), MAX_SECRETS)?;
        all.iter().try_for_each(|one| {
            let length = one.variable.as_ref().map_or(0, String::len);
            at_most("secret's variable", length, MAX_SECRET_VARIABLE)
        })
    }
}

/// The value of a secret. It is never shown, and its memory is overwritten when it goes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretValue(#[serde(with = "serde_bytes")] Vec<u8>);

impl SecretValue {
    /// Takes the bytes.
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(..)")
    }
}

impl Drop for SecretValue {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

/// Host → guest: the answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecretAnswer {
    /// The value.
    Value(SecretValue),
    /// The build has declared it, but nobody has given a value.
    Missing,
    /// The build has not declared it.
    Denied,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_files() {
        for good in ["a", "npm.token", "A_b-9", &"a".repeat(MAX_SECRET_ID)] {
            assert!(SecretId::new(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".a", "a/b", "a b", "a=b", "é", &"a".repeat(MAX_SECRET_ID + 1)]
        {
            assert_eq!(SecretId::new(bad), Err(BadSecretId), "{bad:?}");
        }
        let bytes = postcard::to_stdvec("../etc").unwrap();
        assert!(postcard::from_bytes::<SecretId>(&bytes).is_err());
    }

    #[test]
    fn a_value_is_not_shown() {
        let answer = SecretAnswer::Value(SecretValue::new(b"hunter2".to_vec()));
        assert_eq!(format!("{answer:?}"), "Value(SecretValue(..))");
    }

    #[test]
    fn the_largest_value_fits_into_one_frame() {
        let id = SecretId::new("a".repeat(MAX_SECRET_ID)).unwrap();
        let answer = SecretAnswer::Value(SecretValue::new(vec![0xff; MAX_SECRET_VALUE]));
        let message = crate::message::HostToAgent::Secret { id, answer };
        assert!(crate::frame::encode(&message).is_ok());
    }
}
