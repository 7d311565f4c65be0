//! The registry behind Kiln, as everybody here talks to it: managed or external, where it is, and
//! how it is reached. [`super::request`] does the talking.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, header};
use tokio::sync::OwnedRwLockReadGuard;
use url::Url;

use super::credential::Credential;
use super::gate::{Gate, Want};
use super::mapping::Mapping;
use super::path::{Name, Route};
use super::request::Request;
use crate::staging::Digest;

/// Longest wait for an answer, and longest pause in a body. docker-registry hashes an uploaded blob
/// again before it answers, and a disk may be slow: 100 GB take a minute.
pub const PATIENCE: Duration = Duration::from_mins(2);
/// Longest wait for a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// Longest query that an upload's `Location` may have. docker-registry's has about 300 bytes.
const MAX_QUERY_BYTES: usize = 8 * 1024;
/// Longest prefix of repositories: a tenant's and an image's name have to fit behind it.
const MAX_PREFIX_BYTES: usize = 100;
/// Redirects that an external registry may make, to its blobs' store for example.
const MAX_REDIRECTS: usize = 5;

/// A registry to keep images in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Backing(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub client: reqwest::Client,
    pub base: Url,
    pub credential: Option<Credential>,
    pub mapping: Mapping,
    /// Only of the managed one: of another's nothing is removed.
    gate: Option<Gate>,
    /// Keeps the directory that the Unix socket is reached through.
    _socket_dir: Option<OwnedFd>,
}

/// Where a request goes: a path of the API, and a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The path.
    pub route: Route,
    /// The query's pairs, decoded.
    pub query: Vec<(String, String)>,
}

/// The registry behind Kiln did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The operator's URL cannot be one of a registry.
    #[error("--registry {url:?}: {why}; write http(s)://HOST[:PORT]")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The operator's credentials cannot be read.
    #[error("cannot read registry credentials from {path}: {why}")]
    Config {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// The HTTP client could not be made.
    #[error("cannot make an HTTP client")]
    Client(#[source] reqwest::Error),
    /// The connection failed.
    #[error("{method} {path} failed")]
    Send {
        /// Of the request.
        method: Method,
        /// Of the request.
        path: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// Nothing moved for too long.
    #[error("{method} {path}: nothing moved for {} s", PATIENCE.as_secs())]
    Deadline {
        /// Of the request.
        method: Method,
        /// Of the request.
        path: String,
    },
    /// A body that broke off.
    #[error("the answer broke off")]
    Body(#[source] reqwest::Error),
    /// A body that should have been small.
    #[error("the answer is larger than {limit} bytes")]
    AnswerTooLarge {
        /// The limit.
        limit: usize,
    },
    /// Its token service does not work as the distribution spec says.
    #[error("its token service failed: {0}")]
    Token(String),
    /// Its token service refuses.
    #[error("its token service answered {0}")]
    TokenRefused(http::StatusCode),
    /// It sends an upload to where Kiln does not follow.
    #[error("it sends the upload to another host, or to no place at all")]
    Location,
    /// With the prefix of the operator's URL.
    #[error("the name of the repository is too long for the registry behind Kiln")]
    LongName,
}

impl BackingError {
    /// Whether the same request may go well a little later.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Send { .. }
                | Self::Deadline { .. }
                | Self::Body(_)
                | Self::Token(_)
                | Self::TokenRefused(_)
        )
    }
}

impl Backing {
    /// A registry that the operator named, with credentials from a file in Docker's format.
    pub fn external(url: &str, config: Option<&Path>) -> Result<Self, BackingError> {
        let bad = |why| BackingError::Url { url: url.to_owned(), why };
        let mut base = Url::parse(url).map_err(|_| bad("not a URL"))?;
        if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
            return Err(bad("not an http or https URL"));
        }
        if !base.username().is_empty() || base.password().is_some() {
            return Err(bad("credentials belong in --registry-config"));
        }
        if base.query().is_some() || base.fragment().is_some() {
            return Err(bad("a query means nothing here"));
        }
        let prefix = prefix_of(&base).ok_or_else(|| bad("its path is no name of a repository"))?;
        base.set_path("/");
        let credential = Credential::load(&base, config)?;
        let client = builder()
            .https_only(base.scheme() == "https")
            .redirect(reqwest::redirect::Policy::limited(MAX_REDIRECTS))
            .build()
            .map_err(BackingError::Client)?;
        let (credential, gate, mapping) = (Some(credential), None, Mapping::new(prefix));
        Ok(Self(Arc::new(Inner { client, base, credential, mapping, gate, _socket_dir: None })))
    }

    /// A registry that listens on the Unix socket `name` in a directory. It is reached through the
    /// directory's handle, so that neither a long path nor a renamed parent is in the way.
    pub(super) fn on_socket(dir: OwnedFd, name: &str, gate: Gate) -> Result<Self, BackingError> {
        let path = socket_path(&dir, name);
        let client = builder()
            .unix_socket(path)
            // No TLS on a Unix socket: without this the system's certificates are loaded.
            .tls_certs_only([])
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(BackingError::Client)?;
        let base = Url::parse("http://registry.local/")
            .map_err(|_| BackingError::Url { url: String::new(), why: "not a URL" })?;
        let (gate, dir, mapping) = (Some(gate), Some(dir), Mapping::new(None));
        let credential = None;
        Ok(Self(Arc::new(Inner { client, base, credential, mapping, gate, _socket_dir: dir })))
    }

    /// To be held from before a manifest is put or deleted until that is answered.
    pub async fn change(&self) -> Option<OwnedRwLockReadGuard<()>> {
        match &self.0.gate {
            Some(gate) => Some(gate.change().await),
            None => None,
        }
    }

    /// Keeps blobs from being removed, to be held from before the registry is asked for them.
    pub async fn want(&self, digests: Vec<Digest>) -> Option<Want> {
        match &self.0.gate {
            Some(gate) if !digests.is_empty() => Some(gate.want(digests).await),
            _ => None,
        }
    }

    /// A request for a path of the API.
    pub fn request(&self, method: Method, route: Route) -> Request<'_> {
        self.request_to(method, Target { route, query: vec![] })
    }

    /// A request for a path with a query, such as an upload's `Location`.
    pub fn request_to(&self, method: Method, target: Target) -> Request<'_> {
        Request::new(self, method, target)
    }

    /// Where the registry says that an upload to the repository goes on: anywhere on itself.
    pub fn location(
        &self,
        name: &Name,
        response: &reqwest::Response,
    ) -> Result<Target, BackingError> {
        let text = response.headers().get(header::LOCATION).and_then(|v| v.to_str().ok());
        let url = text.and_then(|t| response.url().join(t).ok()).ok_or(BackingError::Location)?;
        let same_place = url.origin() == self.0.base.origin();
        if !same_place || url.query().unwrap_or_default().len() > MAX_QUERY_BYTES {
            return Err(BackingError::Location);
        }
        self.0.mapping.upload(name, &url).ok_or(BackingError::Location)
    }
}

/// The name below which all repositories of a registry's URL are, `None` for all of it; nothing where its path cannot be one.
pub fn prefix_of(url: &Url) -> Option<Option<Name>> {
    match url.path().trim_end_matches('/') {
        "" => Some(None),
        path => {
            let name = path.strip_prefix('/').and_then(Name::parse);
            name.filter(|name| name.as_str().len() <= MAX_PREFIX_BYTES).map(Some)
        }
    }
}

impl Target {
    /// Path and query, as in a request line.
    pub fn to_path_and_query(&self) -> String {
        let path = self.route.to_path();
        if self.query.is_empty() {
            return path;
        }
        let query =
            url::form_urlencoded::Serializer::new(String::new()).extend_pairs(&self.query).finish();
        format!("{path}?{query}")
    }

    /// The same with one more pair.
    #[must_use]
    pub fn with(mut self, key: &str, value: &dyn ToString) -> Self {
        self.query.push((key.to_owned(), value.to_string()));
        self
    }

    /// What a token must allow for this, in the words of the distribution token spec.
    pub(super) fn scopes(&self, method: &Method) -> Vec<String> {
        let Some(name) = self.route.name() else { return vec![] };
        let actions = match *method {
            Method::GET | Method::HEAD => "pull",
            Method::DELETE if !matches!(self.route, Route::Upload(..) | Route::Elsewhere(..)) => {
                "delete"
            }
            _ => "pull,push",
        };
        let mut scopes = vec![format!("repository:{name}:{actions}")];
        let from = self.query.iter().find(|(key, _)| key == "from");
        if let Some(from) = from.and_then(|(_, from)| Name::parse(from)) {
            scopes.push(format!("repository:{from}:pull"));
        }
        scopes
    }
}

/// The path of a socket below an open directory, for this process.
pub(super) fn socket_path(dir: &OwnedFd, name: &str) -> std::path::PathBuf {
    format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).into()
}

pub(super) fn builder() -> reqwest::ClientBuilder {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // `main` has done so; without it reqwest panics, in tests of this module for example. The
        // error means that another thread was faster.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    }
    reqwest::Client::builder()
        .no_proxy()
        .referer(false)
        .connect_timeout(CONNECT_PATIENCE)
        .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_external_registry_is_an_origin_and_perhaps_a_prefix() {
        for good in [
            "http://127.0.0.1:5000",
            "https://registry.example/",
            "https://registry.example/acme",
            "https://registry.example/acme/kiln/",
        ] {
            assert!(Backing::external(good, None).is_ok(), "{good}");
        }
        for bad in [
            "registry.example",
            "ftp://registry.example",
            "https://registry.example/Prefix",
            "https://registry.example/a//b",
            "https://user:secret@registry.example",
            "https://registry.example/?q",
            "unix:/run/registry",
        ] {
            assert!(matches!(Backing::external(bad, None), Err(BackingError::Url { .. })), "{bad}");
        }
    }

    #[test]
    fn scopes_follow_method_and_mount() {
        let target = |path: &str| Target { route: Route::parse(path).unwrap(), query: vec![] };
        let scopes = |method, target: Target| target.scopes(&method);
        assert_eq!(scopes(Method::GET, target("/v2/")), Vec::<String>::new());
        assert_eq!(scopes(Method::HEAD, target("/v2/a/manifests/t")), ["repository:a:pull"]);
        assert_eq!(scopes(Method::DELETE, target("/v2/a/manifests/t")), ["repository:a:delete"]);
        let mount = target("/v2/a/blobs/uploads/").with("mount", &"x").with("from", &"b/c");
        assert_eq!(mount.to_path_and_query(), "/v2/a/blobs/uploads/?mount=x&from=b%2Fc");
        assert_eq!(scopes(Method::POST, mount), ["repository:a:pull,push", "repository:b/c:pull"]);
    }
}
