//! The credential for an external registry: Basic, or the tokens that it is exchanged for
//! (distribution spec, "Token Authentication"). It leaves this process only towards that registry
//! and its token service.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use tokio::time::Instant;
use url::Url;

use super::backing::{BackingError, PATIENCE};
use super::relay;

/// Longest answer of a token service. Tokens have a few KiB.
const MAX_TOKEN_ANSWER: usize = 256 * 1024;
/// A token without an `expires_in` holds this long (token spec).
const DEFAULT_TOKEN_SECONDS: u64 = 60;
/// A token is not used any more this long before its end: the request has to arrive in time.
const TOKEN_MARGIN: Duration = Duration::from_secs(15);
/// Most tokens kept. One is a few KiB, and one scope is wanted again and again.
const MAX_TOKENS: usize = 256;

pub(super) struct Credential {
    login: Option<(String, String)>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    challenge: Option<Challenge>,
    tokens: HashMap<String, (HeaderValue, Instant)>,
}

/// What goes with a request, as far as it is known.
pub(super) enum Wanted {
    /// The registry has not said yet.
    Unknown,
    /// Nothing, or what Kiln does not have.
    Nothing,
    Header(HeaderValue),
    /// A token of this service, which nobody has judged yet.
    Exchange {
        realm: String,
        service: Option<String>,
    },
}

/// What the registry asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Challenge {
    Nothing,
    Basic,
    Bearer { realm: String, service: Option<String> },
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential(..)")
    }
}

impl Credential {
    /// Reads the login for a registry from a file in Docker's format. A file that does not name the
    /// registry means an anonymous login, as with Docker itself.
    pub fn load(base: &Url, config: Option<&Path>) -> Result<Self, BackingError> {
        let host = base.host_str().unwrap_or_default();
        let server = match base.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        Self::load_for(&server, config)
    }

    /// The same by the name that the file has for the registry.
    pub fn load_for(server: &str, config: Option<&Path>) -> Result<Self, BackingError> {
        let Some(path) = config else { return Ok(Self::new(None)) };
        let bad = |why: String| BackingError::Config { path: path.display().to_string(), why };
        let file = std::fs::File::open(path).map_err(|e| bad(e.to_string()))?;
        match docker_credential::get_credential_from_reader(file, server) {
            Ok(DockerCredential::UsernamePassword(user, password)) => {
                Ok(Self::new(Some((user, password))))
            }
            Ok(DockerCredential::IdentityToken(_)) => Err(bad(format!(
                "identity tokens are not supported; log in to {server} with a password"
            ))),
            Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(Self::new(None)),
            Err(error) => Err(bad(error.to_string())),
        }
    }

    fn new(login: Option<(String, String)>) -> Self {
        Self { login, state: Mutex::default() }
    }

    /// The header that the registry wants for these scopes.
    pub async fn header(
        &self,
        client: &reqwest::Client,
        base: &Url,
        scopes: &[String],
    ) -> Result<Option<HeaderValue>, BackingError> {
        if self.lock().challenge.is_none() {
            let challenge = ask(client, base).await?;
            self.lock().challenge = Some(challenge);
        }
        match self.wanted(scopes) {
            Wanted::Unknown | Wanted::Nothing => Ok(None),
            Wanted::Header(value) => Ok(Some(value)),
            Wanted::Exchange { realm, service } => {
                let realm = trusted_realm(base, &realm)?;
                self.exchange(client, realm, service, scopes).await.map(Some)
            }
        }
    }

    /// What the registry wants with a request of these scopes, by what it said last.
    pub fn wanted(&self, scopes: &[String]) -> Wanted {
        let state = self.lock();
        match &state.challenge {
            None => Wanted::Unknown,
            Some(Challenge::Nothing) => Wanted::Nothing,
            Some(Challenge::Basic) => self.basic().map_or(Wanted::Nothing, Wanted::Header),
            Some(Challenge::Bearer { realm, service }) => {
                match state.tokens.get(&scopes.join(" ")) {
                    Some((value, until)) if *until > Instant::now() => {
                        Wanted::Header(value.clone())
                    }
                    _ => Wanted::Exchange { realm: realm.clone(), service: service.clone() },
                }
            }
        }
    }

    /// Takes what the registry wants from a refusal of it.
    pub fn learn(&self, headers: &HeaderMap) -> Result<(), BackingError> {
        let challenge = challenge_of(headers)?;
        self.lock().challenge = Some(challenge);
        Ok(())
    }

    /// Drops what was refused: the token, and what is known about the registry's wishes.
    pub fn forget(&self, scopes: &[String]) {
        let mut state = self.lock();
        state.challenge = None;
        state.tokens.remove(&scopes.join(" "));
    }

    /// Gets a token of a service that may have the login, and keeps it.
    pub async fn exchange(
        &self,
        client: &reqwest::Client,
        mut realm: Url,
        service: Option<String>,
        scopes: &[String],
    ) -> Result<HeaderValue, BackingError> {
        {
            let mut query = realm.query_pairs_mut();
            query.extend_pairs(service.iter().map(|service| ("service", service)));
            query.extend_pairs(scopes.iter().map(|scope| ("scope", scope)));
        }
        let mut request = client.get(realm);
        if let Some(basic) = self.basic() {
            request = request.header(header::AUTHORIZATION, basic);
        }
        let response = request.timeout(PATIENCE).send().await;
        let response = response.map_err(|e| BackingError::Token(e.without_url().to_string()))?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(BackingError::TokenRefused(status));
        }
        let bytes = relay::collect(response, MAX_TOKEN_ANSWER).await?;
        let bad = || BackingError::Token("it answered no token".into());
        let answer: TokenAnswer = serde_json::from_slice(&bytes).map_err(|_| bad())?;
        let token = answer.token.or(answer.access_token).ok_or_else(bad)?;
        let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| bad())?;
        value.set_sensitive(true);
        let lasts = Duration::from_secs(answer.expires_in.unwrap_or(DEFAULT_TOKEN_SECONDS));
        // A year bounds what a wrong answer could overflow.
        let lasts = lasts.min(Duration::from_hours(24 * 365)).saturating_sub(TOKEN_MARGIN);
        let mut state = self.lock();
        if state.tokens.len() >= MAX_TOKENS {
            state.tokens.clear();
        }
        state.tokens.insert(scopes.join(" "), (value.clone(), Instant::now() + lasts));
        Ok(value)
    }

    fn basic(&self) -> Option<HeaderValue> {
        let (user, password) = self.login.as_ref()?;
        let text = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        let mut value = HeaderValue::try_from(text).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// Asks the registry what it wants.
async fn ask(client: &reqwest::Client, base: &Url) -> Result<Challenge, BackingError> {
    let url = base.join("/v2/").map_err(|_| BackingError::Location)?;
    let response = client.get(url).timeout(PATIENCE).send().await.map_err(|source| {
        let (method, path) = (http::Method::GET, "/v2/".to_owned());
        BackingError::Send { method, path, source: source.without_url() }
    })?;
    if response.status() != StatusCode::UNAUTHORIZED {
        return Ok(Challenge::Nothing);
    }
    challenge_of(response.headers())
}

fn challenge_of(headers: &HeaderMap) -> Result<Challenge, BackingError> {
    let challenges = headers.get_all(header::WWW_AUTHENTICATE);
    let known = challenges.iter().filter_map(|v| parse_challenge(v.to_str().ok()?));
    known
        .max_by_key(|c| matches!(c, Challenge::Bearer { .. }))
        .ok_or_else(|| BackingError::Token("it asks for an unknown kind of login".into()))
}

/// Parses one `WWW-Authenticate` header (RFC 9110, 11.6.1) with one challenge in it.
fn parse_challenge(text: &str) -> Option<Challenge> {
    let (scheme, mut rest) = text.split_once(' ').unwrap_or((text, ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service) = (None, None);
    while let Some((key, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').map_or((after, ""), |(value, rest)| (value, rest)),
        };
        match key.trim_matches([' ', ',']).to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value.to_owned()),
            "service" => service = Some(value.to_owned()),
            _ => {}
        }
        rest = after;
    }
    Some(Challenge::Bearer { realm: realm?, service })
}

/// The password goes over TLS wherever the registry itself does.
fn trusted_realm(base: &Url, realm: &str) -> Result<Url, BackingError> {
    let url = Url::parse(realm).map_err(|_| BackingError::Token("its realm is no URL".into()))?;
    if url.scheme() == "https" || (url.scheme() == "http" && base.scheme() == "http") {
        Ok(url)
    } else {
        Err(BackingError::Token("its realm is not an https URL".into()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer { realm: realm.into(), service: service.map(Into::into) })
        };
        assert_eq!(
            parse_challenge(
                r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a:pull,push""#
            ),
            bearer("https://auth.example/token", Some("reg"))
        );
        assert_eq!(parse_challenge(r#"bearer realm="x""#), bearer("x", None));
        assert_eq!(parse_challenge("Bearer realm=x, service=y"), bearer("x", Some("y")));
        assert_eq!(parse_challenge(r#"Basic realm="x""#), Some(Challenge::Basic));
        assert_eq!(parse_challenge("Bearer"), None);
        assert_eq!(parse_challenge(r#"Bearer realm="open"#), None);
        assert_eq!(parse_challenge("Negotiate"), None);
    }

    #[test]
    fn a_password_is_not_sent_in_the_clear_for_an_https_registry() {
        let (plain, tls) = (Url::parse("http://r").unwrap(), Url::parse("https://r").unwrap());
        assert!(trusted_realm(&plain, "http://auth/token").is_ok());
        assert!(trusted_realm(&tls, "https://auth/token").is_ok());
        assert!(trusted_realm(&tls, "http://auth/token").is_err());
        assert!(trusted_realm(&plain, "file:///etc/passwd").is_err());
        assert!(trusted_realm(&plain, "token").is_err());
    }

    #[test]
    fn a_login_comes_from_dockers_file_and_is_not_printed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let auth = STANDARD.encode("user:secret");
        let config = serde_json::json!({"auths": {"registry.example:5000": {"auth": auth}}});
        std::fs::write(&file, config.to_string()).unwrap();
        let load = |url: &str| Credential::load(&Url::parse(url).unwrap(), Some(&file)).unwrap();
        let known = load("https://registry.example:5000");
        assert_eq!(known.basic().unwrap(), format!("Basic {auth}"));
        assert!(!format!("{known:?}").contains("secret"));
        assert!(load("https://other.example").basic().is_none());
        let missing = dir.path().join("missing");
        assert!(Credential::load(&Url::parse("http://r").unwrap(), Some(&missing)).is_err());
    }
}
