//! Registry tokens: short JWTs by the distribution token spec. They open `/v2/*` and nothing else.
//!
//! One algorithm (ES256), one key, one issuer, one audience. Whatever else a token's header or
//! claims say, it is refused: unknown header fields, `crit` among them, too.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use super::path::Name;
use super::rights::Action;
use crate::build::Tenant;
use crate::staging::Digest;

/// How long a token holds. Long enough for one large blob's request to start, short enough that a
/// revoked API token soon opens nothing.
pub const LIFETIME: Duration = Duration::from_mins(5);
/// Who signs, and whom tokens are for (`service` in the challenge).
pub const SERVICE: &str = "kiln";
/// Longest token that is looked at. One with the most scopes has about 8 KiB.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// Clocks that disagree: none, since the same host signs and verifies.
const LEEWAY_SECONDS: u64 = 0;
/// Largest key file: a PKCS #8 document of a P-256 key has 138 bytes.
const MAX_KEY_BYTES: u64 = 4096;

/// What a token allows in one repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// `repository`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The repository.
    pub name: String,
    /// What may be done there.
    pub actions: BTreeSet<Action>,
}

/// The claims of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    iss: String,
    aud: String,
    /// The tenant.
    pub sub: String,
    exp: u64,
    nbf: u64,
    iat: u64,
    jti: String,
    /// What it allows, and nothing beside.
    pub access: Vec<Access>,
}

impl Claims {
    /// Whether the token allows this.
    pub fn allow(&self, name: &Name, action: Action) -> bool {
        self.access.iter().any(|access| {
            access.kind == "repository"
                && access.name == name.as_str()
                && access.actions.contains(&action)
        })
    }
}

/// A token that opens nothing. Why is for the log, not for who sent it.
#[derive(Debug, thiserror::Error)]
#[error("the registry token is not valid: {0}")]
pub struct BadToken(String);

/// The keys could not be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file failed.
    #[error("cannot {operation} the registry's signing key {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file holds something else, or the system has no randomness.
    #[error("{0} holds no usable signing key; move it away, and Kiln makes a new one")]
    Unusable(String),
    /// Signing failed.
    #[error("cannot sign a registry token")]
    Sign(#[source] jsonwebtoken::errors::Error),
}

/// The key pair that signs and verifies.
pub struct TokenKeys {
    encoding: EncodingKey,
    decoding: DecodingKey,
    kid: String,
}

impl std::fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenKeys").field("kid", &self.kid).finish_non_exhaustive()
    }
}

impl TokenKeys {
    /// Reads the key from a file, which is made with a new one when there is none.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        let io = |operation| {
            let path = path.display().to_string();
            move |source| KeyError::Io { operation, path, source }
        };
        let unusable = || KeyError::Unusable(path.display().to_string());
        let document = match read_key(path) {
            Ok(document) => document,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let rng = SystemRandom::new();
                let new = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &rng);
                let new = new.map_err(|_| unusable())?;
                write_key(path, new.as_ref()).map_err(io("write"))?;
                // Another process may have been faster: what is in the file counts.
                read_key(path).map_err(io("read"))?
            }
            Err(error) => return Err(io("read")(error)),
        };
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &document);
        let pair = pair.map_err(|_| unusable())?;
        let public = pair.public_key().as_ref();
        Ok(Self {
            encoding: EncodingKey::from_ec_der(&document),
            decoding: DecodingKey::from_ec_der(public),
            kid: Digest::of(public).hex()[..16].to_owned(),
        })
    }

    /// Signs a token.
    pub fn sign(&self, tenant: &Tenant, access: Vec<Access>) -> Result<(String, u64), KeyError> {
        let now = now();
        let claims = Claims {
            iss: SERVICE.into(),
            aud: SERVICE.into(),
            sub: tenant.to_string(),
            exp: now + LIFETIME.as_secs(),
            nbf: now,
            iat: now,
            jti: uuid::Uuid::new_v4().simple().to_string(),
            access,
        };
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.kid.clone());
        let token = jsonwebtoken::encode(&header, &claims, &self.encoding);
        Ok((token.map_err(KeyError::Sign)?, now))
    }

    /// What a token allows, if it is one of ours and holds now.
    pub fn verify(&self, token: &str) -> Result<Claims, BadToken> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(BadToken("it is too long".into()));
        }
        let header = token.split_once('.').map_or("", |(header, _)| header);
        let header = URL_SAFE_NO_PAD.decode(header).map_err(|e| BadToken(e.to_string()))?;
        let header: StrictHeader =
            serde_json::from_slice(&header).map_err(|e| BadToken(e.to_string()))?;
        if header.kid != self.kid {
            return Err(BadToken("it was signed by another key".into()));
        }
        let mut validation = Validation::new(Algorithm::ES256);
        validation.leeway = LEEWAY_SECONDS;
        validation.validate_nbf = true;
        validation.set_audience(&[SERVICE]);
        validation.set_issuer(&[SERVICE]);
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
        let data = jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation);
        data.map(|data| data.claims).map_err(|e| BadToken(e.to_string()))
    }
}

/// All that a header of ours has. `alg` is compared by the library, with the one that is allowed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StrictHeader {
    #[serde(rename = "alg")]
    _alg: String,
    #[serde(rename = "typ")]
    _typ: Option<String>,
    kid: String,
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn read_key(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(
        &mut io::Read::take(std::fs::File::open(path)?, MAX_KEY_BYTES),
        &mut bytes,
    )?;
    Ok(bytes)
}

/// Whole or not at all, and never over an existing key.
fn write_key(path: &Path, document: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("new-{}", uuid::Uuid::new_v4().simple()));
    let result = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(document)?;
            file.sync_all()
        })
        .and_then(|()| match std::fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        });
    let _ = std::fs::remove_file(&temporary);
    result
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use jsonwebtoken::encode;
    use serde_json::{Value, json};
    use std::os::unix::fs::PermissionsExt;

    fn keys() -> (tempfile::TempDir, TokenKeys) {
        let dir = tempfile::tempdir().unwrap();
        let keys = TokenKeys::load_or_create(&dir.path().join("key")).unwrap();
        (dir, keys)
    }

    fn access(name: &str, actions: &[Action]) -> Vec<Access> {
        let actions = actions.iter().copied().collect();
        vec![Access { kind: "repository".into(), name: name.into(), actions }]
    }

    fn valid_claims() -> Value {
        let now = now();
        json!({"iss": "kiln", "aud": "kiln", "sub": "a", "exp": now + 60, "nbf": now - 1, "iat": now,
               "jti": "x", "access": [{"type": "repository", "name": "a/x", "actions": ["pull"]}]})
    }

    fn part(value: &Value) -> String {
        URL_SAFE_NO_PAD.encode(value.to_string())
    }

    #[test]
    fn a_token_allows_what_was_granted_and_nothing_else() {
        let (_dir, keys) = keys();
        let tenant = Tenant::new("a").unwrap();
        let (token, _) = keys.sign(&tenant, access("a/x", &[Action::Pull])).unwrap();
        let claims = keys.verify(&token).unwrap();
        let name = |n| Name::parse(n).unwrap();
        assert!(claims.allow(&name("a/x"), Action::Pull));
        assert!(!claims.allow(&name("a/x"), Action::Push));
        assert!(!claims.allow(&name("a/xy"), Action::Pull));
        assert!(!claims.allow(&name("a/x/y"), Action::Pull));
        assert_eq!((claims.sub.as_str(), claims.exp - claims.iat), ("a", LIFETIME.as_secs()));
    }

    #[test]
    fn the_key_stays_the_same_and_is_private() {
        let (dir, first) = keys();
        let path = dir.path().join("key");
        let second = TokenKeys::load_or_create(&path).unwrap();
        let (token, _) = first.sign(&Tenant::new("a").unwrap(), vec![]).unwrap();
        assert!(second.verify(&token).is_ok());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
        std::fs::write(&path, b"nonsense").unwrap();
        assert!(matches!(TokenKeys::load_or_create(&path), Err(KeyError::Unusable(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"nonsense", "a bad key is not overwritten");
    }

    #[test]
    fn forged_and_stale_tokens_are_refused() {
        let (_dir, keys) = keys();
        let (_other_dir, other) = self::keys();
        let header = |kid: &str| {
            let mut header = Header::new(Algorithm::ES256);
            header.kid = Some(kid.into());
            header
        };
        let signed = |claims: &Value| encode(&header(&keys.kid), claims, &keys.encoding).unwrap();
        assert!(keys.verify(&signed(&valid_claims())).is_ok(), "the base of the table is valid");

        let with = |key: &str, value: Value| {
            let mut claims = valid_claims();
            claims[key] = value;
            signed(&claims)
        };
        let without = |key: &str| {
            let mut claims = valid_claims();
            claims.as_object_mut().unwrap().remove(key);
            signed(&claims)
        };
        let payload = part(&valid_claims());
        let unsigned = |header: Value| format!("{}.{payload}.", part(&header));
        // The public key as the secret of an HMAC.
        let public = keys.decoding.try_get_as_bytes().unwrap().to_vec();
        let mut hs = Header::new(Algorithm::HS256);
        hs.kid = Some(keys.kid.clone());
        let confused = encode(&hs, &valid_claims(), &EncodingKey::from_secret(&public)).unwrap();
        // Our signature under a header with something to understand in it.
        let resigned = |header: Value| {
            let message = format!("{}.{payload}", part(&header));
            let bytes = message.as_bytes();
            let signature =
                jsonwebtoken::crypto::sign(bytes, &keys.encoding, Algorithm::ES256).unwrap();
            format!("{message}.{signature}")
        };
        let plain = json!({"alg": "ES256", "typ": "JWT", "kid": keys.kid});
        assert!(keys.verify(&resigned(plain.clone())).is_ok());
        let extended = |key: &str, value: Value| {
            let mut header = plain.clone();
            header[key] = value;
            resigned(header)
        };
        let cut = signed(&valid_claims());
        let cut = &cut[..cut.len() - 4];
        let swapped = {
            let token = signed(&valid_claims());
            let mut parts = token.split('.');
            let (head, _, signature) =
                (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
            let mut claims = valid_claims();
            claims["access"][0]["name"] = json!("b/x");
            format!("{head}.{}.{signature}", part(&claims))
        };
        let soon = now();
        for (what, token) in [
            ("nothing", String::new()),
            ("text", "kiln_abc".into()),
            ("dots", "..".into()),
            ("too long", format!("{}.x.y", "a".repeat(MAX_TOKEN_BYTES))),
            ("expired", with("exp", json!(soon - 1))),
            ("exp as text", with("exp", json!("never"))),
            ("no exp", without("exp")),
            ("not yet valid", with("nbf", json!(soon + 60))),
            ("no nbf", without("nbf")),
            ("another audience", with("aud", json!("other"))),
            ("several audiences", with("aud", json!(["kiln", "other"]))),
            ("no audience", without("aud")),
            ("another issuer", with("iss", json!("other"))),
            ("no issuer", without("iss")),
            ("no subject", without("sub")),
            (
                "unknown action",
                with("access", json!([{"type":"repository","name":"a","actions":["*"]}])),
            ),
            ("another key", encode(&header(&other.kid), &valid_claims(), &other.encoding).unwrap()),
            (
                "another key, our kid",
                encode(&header(&keys.kid), &valid_claims(), &other.encoding).unwrap(),
            ),
            (
                "no kid",
                encode(&Header::new(Algorithm::ES256), &valid_claims(), &keys.encoding).unwrap(),
            ),
            ("alg none", unsigned(json!({"alg": "none", "typ": "JWT", "kid": keys.kid}))),
            ("alg None", unsigned(json!({"alg": "None", "kid": keys.kid}))),
            ("no signature", unsigned(plain.clone())),
            ("HMAC by the public key", confused),
            ("crit", extended("crit", json!(["exp"]))),
            ("empty crit", extended("crit", json!([]))),
            ("jwk", extended("jwk", json!({"kty": "EC"}))),
            ("jku", extended("jku", json!("https://example/keys"))),
            ("unknown field", extended("x", json!(1))),
            ("cut", cut.to_owned()),
            ("other claims under our signature", swapped),
        ] {
            assert!(keys.verify(&token).is_err(), "{what}");
        }
    }
}
