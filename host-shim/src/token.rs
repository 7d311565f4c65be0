//! API tokens: `kiln_` and 32 random bytes in base64url. The store knows only their SHA-256.
//!
//! A token is found by its hash, so how long a look-up takes says nothing about the tokens that
//! exist; with 256 random bits a slow hash would add nothing. An API token opens the API and the
//! token endpoint of the registry, never the registry itself.

mod uses;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

pub use self::uses::Uses;
use crate::build::{Millis, Tenant};
use crate::store::{Role, Store, StoreError, TokenRecord};

/// What every API token begins with, so that people and scanners know one.
pub const PREFIX: &str = "kiln_";
/// Random bytes of a token.
const SECRET_BYTES: usize = 32;
/// Length of those in base64url.
const SECRET_TEXT: usize = 43;
/// Longest name of a token, in characters.
pub const MAX_NAME: usize = 128;
/// Longest life of a token: 10 years, so that no sum of times overflows.
pub const MAX_TTL_SECONDS: u64 = 10 * 366 * 24 * 60 * 60;

/// Who makes a request, by the token it showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The token's public id.
    pub token_id: String,
    /// The token's name, where it has one.
    pub token_name: Option<String>,
    /// Whose builds it sees.
    pub tenant: Tenant,
    /// What it may do.
    pub role: Role,
}

impl Caller {
    /// Whether this caller may see and change what belongs to a tenant.
    pub fn owns(&self, tenant: &Tenant) -> bool {
        self.role == Role::Admin || self.tenant == *tenant
    }
}

/// Why a token opens nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lapse {
    /// It was revoked.
    Revoked,
    /// Its time is over.
    Expired,
}

impl Lapse {
    /// Why this one opens nothing, if that is so.
    pub fn of(token: &TokenRecord, now: Millis) -> Option<Self> {
        if token.revoked {
            Some(Self::Revoked)
        } else if token.expires_at.is_some_and(|end| end <= now) {
            Some(Self::Expired)
        } else {
            None
        }
    }
}

/// Why a request has no caller.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// No token was shown.
    #[error("this needs an API token: send `Authorization: Bearer kiln_…`")]
    Missing,
    /// What was shown is not a token that is valid now. It is not said why.
    #[error("the API token is not valid: it is unknown, expired or revoked")]
    Invalid,
    /// The store failed.
    #[error("the API token cannot be checked now")]
    Store(#[from] StoreError),
}

/// Why a token cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// It would never be valid, or for too long.
    #[error("a token lives for 1 to {MAX_TTL_SECONDS} seconds, not {0}")]
    Ttl(u64),
    /// Its name is no name.
    #[error("a token's name has 1 to {MAX_NAME} characters and no control characters")]
    Name,
    /// The system has no random bytes.
    #[error("the system gives no random bytes")]
    Random,
    /// The store failed.
    #[error("the token cannot be stored")]
    Store(#[from] StoreError),
}

/// The caller that an `Authorization` header's value shows.
pub async fn authenticate(
    store: &dyn Store,
    header: Option<&str>,
    now: Millis,
) -> Result<Caller, AuthError> {
    let header = header.ok_or(AuthError::Missing)?;
    let (scheme, token) = header.split_once(' ').ok_or(AuthError::Invalid)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(AuthError::Missing);
    }
    verify(store, token.trim_start_matches(' '), now).await
}

/// The caller that a bare token shows.
pub async fn verify(store: &dyn Store, token: &str, now: Millis) -> Result<Caller, AuthError> {
    if !looks_like_one(token) {
        return Err(AuthError::Invalid);
    }
    let record = store.token_by_hash(&hash(token)).await?.ok_or(AuthError::Invalid)?;
    if Lapse::of(&record, now).is_some() {
        return Err(AuthError::Invalid);
    }
    let TokenRecord { id: token_id, name: token_name, tenant, role, .. } = record;
    Ok(Caller { token_id, token_name, tenant, role })
}

/// Makes a token and stores it. The text is shown once and kept nowhere.
pub async fn create(
    store: &dyn Store,
    tenant: Tenant,
    role: Role,
    ttl_seconds: Option<u64>,
    name: Option<String>,
    now: Millis,
) -> Result<(String, TokenRecord), CreateError> {
    if name.as_ref().is_some_and(|n| {
        n.is_empty() || n.chars().count() > MAX_NAME || n.chars().any(char::is_control)
    }) {
        return Err(CreateError::Name);
    }
    let expires_at = match ttl_seconds {
        None => None,
        Some(seconds @ 1..=MAX_TTL_SECONDS) => {
            Some(now.saturating_add_unsigned(seconds.saturating_mul(1000)))
        }
        Some(seconds) => return Err(CreateError::Ttl(seconds)),
    };
    let mut secret = [0; SECRET_BYTES];
    aws_lc_rs::rand::fill(&mut secret).map_err(|_| CreateError::Random)?;
    let token = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(secret));
    let record = TokenRecord {
        id: uuid::Uuid::now_v7().simple().to_string(),
        hash: hash(&token),
        name,
        tenant,
        role,
        created_at: now,
        expires_at,
        revoked: false,
        last_used_at: None,
    };
    store.insert_token(&record).await?;
    Ok((token, record))
}

/// SHA-256 of a token as the store keeps it: lower-case hex.
pub fn hash(token: &str) -> String {
    hex::encode(Sha256::digest(token))
}

fn looks_like_one(token: &str) -> bool {
    token.strip_prefix(PREFIX).is_some_and(|secret| {
        secret.len() == SECRET_TEXT
            && secret.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::sqlite::SqliteStore;

    async fn store() -> (tempfile::TempDir, SqliteStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        (dir, store)
    }

    fn acme() -> Tenant {
        Tenant::new("acme").unwrap()
    }

    #[tokio::test]
    async fn a_token_opens_until_it_expires_or_is_revoked() {
        let (_dir, store) = store().await;
        let (token, record) =
            create(&store, acme(), Role::Tenant, Some(10), Some("ci".into()), 1_000).await.unwrap();
        assert!(looks_like_one(&token), "{}", token.len());
        assert!(!record.hash.contains(&token[PREFIX.len()..]));

        let header = format!("Bearer {token}");
        let caller = authenticate(&store, Some(&header), 10_999).await.unwrap();
        assert_eq!(
            caller,
            Caller {
                token_id: record.id.clone(),
                token_name: Some("ci".into()),
                tenant: acme(),
                role: Role::Tenant
            }
        );
        assert!(authenticate(&store, Some(&format!("bEARER  {token}")), 1).await.is_ok());
        assert!(matches!(
            authenticate(&store, Some(&header), 11_000).await,
            Err(AuthError::Invalid)
        ));

        store.revoke_token(&record.id).await.unwrap();
        assert!(matches!(
            authenticate(&store, Some(&header), 1_000).await,
            Err(AuthError::Invalid)
        ));
    }

    #[tokio::test]
    async fn anything_else_opens_nothing() {
        let (_dir, store) = store().await;
        let (token, record) = create(&store, acme(), Role::Admin, None, None, 0).await.unwrap();
        let (short, long) = (&token[..token.len() - 1], format!("{token}A"));
        for header in [
            format!("Bearer {short}"),
            format!("Bearer {long}"),
            format!("Bearer {}", record.hash),
            format!("Bearer {PREFIX}{}", "A".repeat(SECRET_TEXT)),
            format!("Bearer {}", "\u{e9}".repeat(24)),
            "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.".into(),
            "Bearer ".into(),
            "Bearer".into(),
        ] {
            let refused = authenticate(&store, Some(&header), 0).await;
            assert!(matches!(refused, Err(AuthError::Invalid)), "{header:?}: {refused:?}");
        }
        for header in [None, Some("Basic a2lsbjp4"), Some("Digest x")] {
            assert!(matches!(authenticate(&store, header, 0).await, Err(AuthError::Missing)));
        }
    }

    #[tokio::test]
    async fn names_and_lives_are_bounded() {
        let (_dir, store) = store().await;
        let make = async |ttl, name: Option<&str>| {
            create(&store, acme(), Role::Reader, ttl, name.map(str::to_owned), 5).await
        };
        assert!(make(Some(MAX_TTL_SECONDS), Some(&"n".repeat(MAX_NAME))).await.is_ok());
        assert!(matches!(make(Some(0), None).await, Err(CreateError::Ttl(0))));
        assert!(matches!(make(Some(MAX_TTL_SECONDS + 1), None).await, Err(CreateError::Ttl(_))));
        for bad in ["", "a\nb", &"n".repeat(MAX_NAME + 1)] {
            assert!(matches!(make(None, Some(bad)).await, Err(CreateError::Name)), "{bad:?}");
        }
    }

    #[test]
    fn an_administrator_owns_all_and_others_their_own() {
        let caller = |role| Caller { token_id: "t".into(), token_name: None, tenant: acme(), role };
        let other = Tenant::new("other").unwrap();
        assert!(caller(Role::Admin).owns(&other));
        assert!(caller(Role::Tenant).owns(&acme()) && !caller(Role::Tenant).owns(&other));
    }
}
