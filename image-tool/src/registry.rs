//! The way to a registry: references, credentials, a client with deadlines, and retries.
//!
//! Credentials come from the caller, or from Docker's configuration. oci-client does not retry and, given
//! a bad token endpoint, goes on without a token; so [`Registry::connect`] authenticates first and
//! says what the registry said.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};

use crate::credentials::{self, CredentialsError};
use crate::text;

/// Credentials from the environment, so that they need not be in a command line.
pub const CREDS_VARIABLE: &str = "KILN_IMAGE_CREDS";

/// A registry on another continent answers in a second.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// For a request without a large body.
const REQUEST_LIMIT: Duration = Duration::from_mins(1);
/// The slowest transfer that is waited for; slower ones have stalled.
const MIN_BYTES_PER_SECOND: u64 = 128 * 1024;
/// Tries of one request, the first included.
const TRIES: u32 = 4;
/// Before the second try; doubled before each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// How to reach registries.
#[derive(Clone, Default)]
pub struct Options {
    /// HTTP without TLS.
    pub plain_http: bool,
    /// User and password; Docker's configuration is used otherwise.
    pub creds: Option<(String, String)>,
    /// A token that the registry takes as it is, in place of user and password.
    pub bearer: Option<String>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let creds = self.creds.as_ref().map(|(user, _)| format!("{user}:***"));
        f.debug_struct("Options")
            .field("plain_http", &self.plain_http)
            .field("creds", &creds)
            .field("bearer", &self.bearer.as_ref().map(|_| "***"))
            .finish()
    }
}

/// Something between us and a registry.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No `HOST[:PORT]/REPOSITORY[:TAG]`.
    #[error("{text:?} is not a reference of the form HOST[:PORT]/REPOSITORY[:TAG]: {why}")]
    Reference {
        /// What was given.
        text: String,
        /// What is wrong.
        why: String,
    },
    /// Docker's configuration cannot be used.
    #[error(
        "cannot take the credentials for {registry} from Docker's configuration; repair it or use --creds"
    )]
    Credentials {
        /// The host.
        registry: String,
        /// Why.
        #[source]
        source: CredentialsError,
    },
    /// 401 or 403.
    #[error(
        "{registry} refused the credentials to {action} (use --creds USER:PASS or docker login): {detail}"
    )]
    Refused {
        /// The host.
        registry: String,
        /// What was tried.
        action: String,
        /// The registry's words.
        detail: String,
    },
    /// 404.
    #[error("{registry} does not have what is needed to {action}: {detail}")]
    NotFound {
        /// The host.
        registry: String,
        /// What was tried.
        action: String,
        /// The registry's words.
        detail: String,
    },
    /// It took too long.
    #[error("{registry} did not finish within {} s to {action}", limit.as_secs())]
    TooSlow {
        /// The host.
        registry: String,
        /// What was tried.
        action: String,
        /// What it was given.
        limit: Duration,
    },
    /// Anything else.
    #[error("cannot {action} at {registry}: {detail}")]
    Other {
        /// The host.
        registry: String,
        /// What was tried.
        action: String,
        /// With all causes.
        detail: String,
        /// The error itself, for what it is worth to a program.
        #[source]
        source: Box<OciDistributionError>,
    },
    /// The client could not be made.
    #[error("cannot set up the HTTP client")]
    Client(#[source] Box<OciDistributionError>),
}

/// Parses a reference whose host must be written: nothing goes to a public registry by omission.
pub fn parse_reference(given: &str) -> Result<Reference, RegistryError> {
    let wrong = |why: String| RegistryError::Reference { text: text::printable(given), why };
    let host = given.split_once('/').map(|(host, _)| host);
    if !host.is_some_and(|h| h == "localhost" || h.contains(['.', ':'])) {
        return Err(wrong("it names no host".to_owned()));
    }
    given.parse().map_err(|e: oci_client::ParseError| wrong(e.to_string()))
}

/// A client for one reference's registry.
pub struct Registry {
    pub(crate) client: Client,
    pub(crate) reference: Reference,
    pub(crate) auth: RegistryAuth,
}

impl Registry {
    /// Makes a client and authenticates.
    pub async fn connect(
        reference: &Reference,
        options: &Options,
        operation: RegistryOperation,
    ) -> Result<Self, RegistryError> {
        let registry = reference.resolve_registry().to_owned();
        let auth = if let Some(token) = &options.bearer {
            RegistryAuth::Bearer(token.clone())
        } else if let Some((user, password)) = &options.creds {
            RegistryAuth::Basic(user.clone(), password.clone())
        } else {
            let failed = |source| RegistryError::Credentials { registry, source };
            credentials::for_registry(reference.resolve_registry()).await.map_err(failed)?
        };
        let protocol =
            if options.plain_http { ClientProtocol::Http } else { ClientProtocol::Https };
        // No read timeout: reqwest's would also cut long uploads. Each request has its own limit here.
        let config = ClientConfig {
            protocol,
            use_monolithic_push: true,
            connect_timeout: Some(CONNECT_LIMIT),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|e| RegistryError::Client(Box::new(e)))?;
        let connected = Self { client, reference: reference.clone(), auth };
        let authenticate = || connected.client.auth(reference, &connected.auth, operation);
        connected.retry("authenticate", 0, authenticate).await?;
        Ok(connected)
    }

    /// Runs a request, again after a failure that may pass, each time within a limit that fits `bytes`.
    pub(crate) async fn retry<T, F>(
        &self,
        action: &str,
        bytes: u64,
        mut request: impl FnMut() -> F,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, OciDistributionError>>,
    {
        let limit = REQUEST_LIMIT + Duration::from_secs(bytes / MIN_BYTES_PER_SECOND);
        let registry = || self.reference.resolve_registry().to_owned();
        let mut pause = FIRST_PAUSE;
        for attempt in 1..=TRIES {
            let Ok(result) = tokio::time::timeout(limit, request()).await else {
                let action = action.to_owned();
                return Err(RegistryError::TooSlow { registry: registry(), action, limit });
            };
            match result {
                Ok(value) => return Ok(value),
                Err(error) if attempt < TRIES && may_pass(&error) => {
                    tracing::warn!(attempt, action, detail = %detail(&error), "trying again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                Err(error) => return Err(explain(registry(), action.to_owned(), error)),
            }
        }
        // TRIES is not zero, so the last round returned.
        Err(RegistryError::TooSlow { registry: registry(), action: action.to_owned(), limit })
    }
}

/// The HTTP status, where the error has one.
fn status(error: &OciDistributionError) -> Option<u16> {
    use oci_client::errors::OciErrorCode as Code;
    match error {
        OciDistributionError::ServerError { code, .. } => Some(*code),
        OciDistributionError::UnauthorizedError { .. }
        | OciDistributionError::AuthenticationFailure(_) => Some(401),
        OciDistributionError::ImageManifestNotFoundError(_) => Some(404),
        OciDistributionError::RequestError(e) => e.status().map(|s| s.as_u16()),
        OciDistributionError::RegistryError { envelope, .. } => {
            envelope.errors.iter().find_map(|e| match e.code {
                Code::Unauthorized => Some(401),
                Code::Denied => Some(403),
                Code::NotFound | Code::NameUnknown | Code::ManifestUnknown | Code::BlobUnknown => {
                    Some(404)
                }
                Code::Toomanyrequests => Some(429),
                _ => None,
            })
        }
        _ => None,
    }
}

fn may_pass(error: &OciDistributionError) -> bool {
    match status(error) {
        Some(code) => matches!(code, 408 | 429 | 500 | 502 | 503 | 504),
        // Without a status: the connection was refused or broke.
        None => {
            matches!(error, OciDistributionError::RequestError(e) if !e.is_builder() && !e.is_decode())
        }
    }
}

fn explain(registry: String, action: String, error: OciDistributionError) -> RegistryError {
    let detail = detail(&error);
    match status(&error) {
        Some(401 | 403) => RegistryError::Refused { registry, action, detail },
        Some(404) => RegistryError::NotFound { registry, action, detail },
        _ => RegistryError::Other { registry, action, detail, source: Box::new(error) },
    }
}

/// The message with all causes, safe to print: part of it is the registry's.
fn detail(error: &OciDistributionError) -> String {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        message = format!("{message}: {next}");
        cause = next.source();
    }
    text::printable(&message).replace('\n', " ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_needs_a_host() {
        for bad in
            ["debian", "library/debian", "base/debian:trixie", "", "127.0.0.1:5000", "a.b/UPPER"]
        {
            assert!(parse_reference(bad).is_err(), "{bad}");
        }
        let good = parse_reference("127.0.0.1:5000/base/debian:trixie").unwrap();
        assert_eq!(
            (good.resolve_registry(), good.repository(), good.tag()),
            ("127.0.0.1:5000", "base/debian", Some("trixie"))
        );
        parse_reference("localhost/x").unwrap();
        parse_reference("registry.kiln/base/debian").unwrap();
    }

    #[test]
    fn what_may_pass_is_tried_again_and_the_rest_is_not() {
        let server = |code| OciDistributionError::ServerError {
            code,
            url: String::new(),
            message: String::new(),
        };
        for code in [429, 500, 502, 503, 504] {
            assert!(may_pass(&server(code)), "{code}");
        }
        for code in [400, 401, 403, 404, 413] {
            assert!(!may_pass(&server(code)), "{code}");
        }
        assert!(!may_pass(&OciDistributionError::AuthenticationFailure(String::new())));
    }

    #[test]
    fn a_registrys_words_do_not_steer_the_terminal() {
        let error = OciDistributionError::ServerError {
            code: 403,
            url: "u".into(),
            message: "\u{1b}]0;x\nno".into(),
        };
        let text = explain("r".into(), "publish".into(), error).to_string();
        assert!(
            text.starts_with("r refused the credentials to publish")
                && !text.contains(['\u{1b}', '\n']),
            "{text}"
        );
    }

    #[test]
    fn passwords_are_not_shown() {
        let creds = Some(("user".into(), "hunter2".into()));
        let options = Options { plain_http: true, creds, bearer: Some("hunter3".into()) };
        assert!(!format!("{options:?}").contains("hunter"));
    }
}
