//! Other registries than Kiln's own, as builds pull from them: with the host's login, and kept by digest.
//!
//! ```text
//! upstream/quay.io/org/name ─▶ spec: which upstream ─▶ cache: is it here? ─▶ flight: one fetch for all
//!                                                                              └▶ reach, credential ─▶ the upstream
//! ```
//! A manifest by tag is asked for each time (`HEAD`), by digest only once; a blob is fetched once, and checked each time
//! that it is served. **Invariant**: whatever comes out of here is what its digest says, or the body breaks off before
//! its end; nothing else is kept; no login goes anywhere but to the upstream and its token service.

mod blob;
mod cache;
mod error;
mod flight;
mod reach;
mod spec;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, header};
use kiln_protocol::name;

use self::cache::{Cache, Key, Kind};
use self::flight::Flights;
use self::reach::Reach;
use super::backing::{BackingError, Target};
use super::credential::{Credential, Wanted};
use super::path::{Name, Reference, Route};
use super::relay;
use crate::build::Tenant;
use crate::staging::{Digest, MAX_MANIFEST_BYTES};

pub use self::blob::Blob;
pub use self::error::UpstreamError;
pub use self::reach::Guard;
pub use self::spec::{BadSpec, Spec};

/// Longest time that one body may take: an upstream that sends a byte now and then holds nothing for ever.
const MAX_FETCH: Duration = Duration::from_hours(2);
/// What Docker's registry calls repositories that have no namespace.
const OFFICIAL: &str = "library";
/// Longest media type of a manifest.
const MAX_MEDIA_TYPE: usize = 255;

/// Every upstream of this server. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Upstreams(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    list: Vec<Arc<Upstream>>,
    cache: Option<Arc<Cache>>,
    flights: Arc<Flights>,
}

/// What upstreams are opened with.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Which there are.
    pub specs: Vec<Spec>,
    /// Their logins, in the format of Docker's `config.json`.
    pub logins: Option<PathBuf>,
    /// Where they may send Kiln.
    pub guard: Guard,
    /// Where the cache is.
    pub dir: PathBuf,
    /// What it may hold.
    pub cache_bytes: u64,
}

/// One registry that builds may pull from.
#[derive(Debug)]
pub struct Upstream {
    spec: Spec,
    /// Its name as it is in a repository's, and the name of its directory.
    registry: Arc<str>,
    reach: Reach,
    credential: Credential,
}

/// A manifest that is what its digest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Of its content.
    pub digest: Digest,
    /// As the upstream gives it.
    pub media_type: String,
    /// Byte for byte.
    pub bytes: Bytes,
}

/// A repository of an upstream.
#[derive(Clone, Debug)]
pub struct Place {
    /// Which.
    pub upstream: Arc<Upstream>,
    /// As names of images have it: `library/debian`.
    pub name: Name,
}

/// A name at the gateway that leads to no upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Nowhere {
    /// The operator named no such upstream.
    Unknown(String),
    /// It is no name of a registry and a repository.
    NoName,
}

impl Upstreams {
    /// There are none.
    pub fn none() -> Self {
        Self(Arc::new(Inner { list: vec![], cache: None, flights: Arc::default() }))
    }

    /// Reads the logins and sweeps the cache. It blocks.
    pub fn open(settings: &Settings) -> Result<Self, UpstreamError> {
        let Settings { specs, logins, guard, dir, cache_bytes } = settings;
        let open = |spec: &Spec| Upstream::open(spec.clone(), logins.as_deref(), guard.clone());
        let list = specs.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let registries: Vec<_> = list.iter().map(|up| Arc::clone(&up.registry)).collect();
        // Also without an upstream: what an earlier server kept goes.
        let cache = if list.is_empty() && !dir.exists() {
            None
        } else {
            Some(Arc::new(Cache::open(dir, *cache_bytes, &registries)?))
        };
        let list = list.into_iter().map(Arc::new).collect();
        Ok(Self(Arc::new(Inner { list, cache, flights: Arc::default() })))
    }

    /// Forgets the least recently used of what is kept, so many bytes at least, if there are so many; how many. It blocks.
    pub fn give_up(&self, bytes: u64) -> u64 {
        self.0.cache.as_ref().map_or(0, |cache| cache.give_up(bytes))
    }

    /// Whether nothing is kept.
    pub fn keep_nothing(&self) -> bool {
        self.0.cache.as_ref().is_none_or(|cache| cache.kept() == 0)
    }

    /// The names of all, as names of images begin with them.
    pub fn hosts(&self) -> Vec<String> {
        self.0.list.iter().map(|upstream| upstream.spec.host.clone()).collect()
    }

    /// Where a repository's name at the gateway leads, `upstream/quay.io/org/name`.
    pub(crate) fn find(&self, full: &Name) -> Result<Place, Nowhere> {
        let (name::UPSTREAM_SPACE, Some(rest)) = full.split_first() else {
            return Err(Nowhere::NoName);
        };
        let (host, repository) = name::upstream_of(rest).ok_or(Nowhere::NoName)?;
        let name = Name::parse(repository).ok_or(Nowhere::NoName)?;
        self.place(&host, name).ok_or(Nowhere::Unknown(host))
    }

    /// The repository that an image's name begins with, `quay.io/org/name`.
    pub fn named(&self, text: &str) -> Option<Place> {
        let (host, repository) = text.split_once('/')?;
        self.place(host, Name::parse(repository)?)
    }

    fn place(&self, host: &str, name: Name) -> Option<Place> {
        let upstream = self.0.list.iter().find(|upstream| upstream.spec.host == host)?;
        let official = host == name::DEFAULT_UPSTREAM && name.split_first().1.is_none();
        let name = if official { Name::parse(&format!("{OFFICIAL}/{name}"))? } else { name };
        Some(Place { upstream: Arc::clone(upstream), name })
    }

    /// A manifest, which the upstream has now where it is named by a tag.
    pub async fn manifest(
        &self,
        place: &Place,
        reference: &Reference,
    ) -> Result<Manifest, UpstreamError> {
        let known = match reference {
            Reference::Digest(digest) => Some(*digest),
            Reference::Tag(_) => self.look(place, reference).await?,
        };
        let key = |digest| Key {
            registry: Arc::clone(&place.upstream.registry),
            kind: Kind::Manifest,
            digest,
        };
        if let Some(digest) = known
            && let Some(kept) = self.kept_manifest(key(digest)).await
        {
            return Ok(kept);
        }
        let from = place.send(Method::GET, |name| Route::Manifest(name, reference.clone())).await?;
        let from = expect_ok(from)?;
        let media_type = from.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let media_type = media_type.filter(|text| text.len() <= MAX_MEDIA_TYPE);
        let media_type = media_type.unwrap_or_default().to_owned();
        let collected = tokio::time::timeout(MAX_FETCH, relay::collect(from, MAX_MANIFEST_BYTES));
        let bytes = collected.await.map_err(|_| UpstreamError::Slow)?;
        let bytes = bytes.map_err(UpstreamError::Body)?;
        let digest = Digest::of(&bytes);
        if let Reference::Digest(wanted) = reference
            && *wanted != digest
        {
            return Err(UpstreamError::Changed(*wanted));
        }
        tracing::info!(upstream = place.upstream.host(), name = %place.name, %digest, "fetched a manifest");
        let manifest = Manifest { digest, media_type, bytes };
        self.keep_manifest(key(digest), &manifest).await;
        Ok(manifest)
    }

    /// The digest that a tag has, where the upstream says it.
    async fn look(
        &self,
        place: &Place,
        reference: &Reference,
    ) -> Result<Option<Digest>, UpstreamError> {
        let from =
            place.send(Method::HEAD, |name| Route::Manifest(name, reference.clone())).await?;
        match from.status() {
            StatusCode::OK => {
                let digest = from.headers().get(&relay::CONTENT_DIGEST);
                Ok(digest.and_then(|value| Digest::parse(value.to_str().ok()?).ok()))
            }
            // To a registry that does not take HEAD.
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Ok(None),
            status => Err(UpstreamError::Status(status)),
        }
    }

    async fn kept_manifest(&self, key: Key) -> Option<Manifest> {
        let cache = self.0.cache.clone()?;
        let read = tokio::task::spawn_blocking(move || {
            let (mut file, size) = cache.get(&key)?;
            let most = (MAX_MANIFEST_BYTES + MAX_MEDIA_TYPE + 1) as u64;
            let mut bytes = Vec::new();
            if size <= most {
                std::io::Read::read_to_end(&mut file, &mut bytes).ok()?;
            }
            let line = bytes.iter().position(|b| *b == b'\n');
            let found = line.map(|at| (String::from_utf8_lossy(&bytes[..at]), &bytes[at + 1..]));
            match found {
                Some((media_type, content)) if Digest::of(content) == key.digest => {
                    let (media_type, bytes) = (media_type.into_owned(), content.to_vec().into());
                    Some(Manifest { digest: key.digest, media_type, bytes })
                }
                _ => {
                    tracing::warn!(?key, "a manifest in the cache of upstreams has changed");
                    cache.forget(&key);
                    None
                }
            }
        });
        read.await.ok().flatten()
    }

    /// That it is not kept is no reason not to serve it.
    async fn keep_manifest(&self, key: Key, manifest: &Manifest) {
        let Some(cache) = self.0.cache.clone() else { return };
        let Manifest { media_type, bytes, .. } = manifest.clone();
        let kept = tokio::task::spawn_blocking(move || {
            let size = media_type.len() + 1 + bytes.len();
            match cache.place(size as u64)? {
                Some(place) => place.keep_bytes(&key, &[media_type.as_bytes(), b"\n", &bytes]),
                None => Ok(()),
            }
        });
        let kept = kept.await.unwrap_or(Err(UpstreamError::Broken));
        if let Err(error) = kept {
            tracing::warn!(error = %crate::causes::chain(&error), "a manifest was not kept");
        }
    }
}

impl Upstream {
    fn open(spec: Spec, logins: Option<&Path>, guard: Guard) -> Result<Self, UpstreamError> {
        let credential =
            Credential::load_for(&spec.login(), logins).map_err(UpstreamError::Login)?;
        let reach = Reach::new(&spec.url, guard)?;
        let repository = name::upstream_repository(&spec.host).unwrap_or_default();
        let registry = repository.rsplit('/').next().unwrap_or_default().into();
        Ok(Self { spec, registry, reach, credential })
    }

    /// Its name, as names of images begin with it.
    pub fn host(&self) -> &str {
        &self.spec.host
    }

    /// Whether builds of this tenant may pull from it.
    pub fn admits(&self, tenant: &Tenant) -> bool {
        self.spec.admits(tenant)
    }

    /// What the upstream wants with a request, as far as it has said so.
    async fn authorization(&self, scopes: &[String]) -> Result<Option<HeaderValue>, UpstreamError> {
        match self.credential.wanted(scopes) {
            Wanted::Unknown | Wanted::Nothing => Ok(None),
            Wanted::Header(value) => Ok(Some(value)),
            Wanted::Exchange { realm, service } => {
                let (client, realm) = self.reach.to_realm(&realm)?;
                let value = self.credential.exchange(client, realm, service, scopes).await;
                value.map(Some).map_err(|error| match error {
                    // As good as a refusal of the upstream's own: to whom it gives tokens, it may show nothing.
                    BackingError::TokenRefused(
                        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN,
                    ) => UpstreamError::Status(StatusCode::UNAUTHORIZED),
                    error => UpstreamError::Login(error),
                })
            }
        }
    }
}

impl Place {
    /// Asks the upstream; a second time where it refuses the first with what it wants. Any status is an answer.
    async fn send(
        &self,
        method: Method,
        route: impl FnOnce(Name) -> Route,
    ) -> Result<reqwest::Response, UpstreamError> {
        let upstream = &*self.upstream;
        let there = match upstream.spec.prefix() {
            Some(prefix) => Name::parse(&format!("{prefix}/{}", self.name)),
            None => Some(self.name.clone()),
        };
        let there = there.ok_or(UpstreamError::Status(StatusCode::NOT_FOUND))?;
        let target = Target { route: route(there), query: vec![] };
        let is_manifest = matches!(target.route, Route::Manifest(..));
        let accept = is_manifest.then_some(relay::ANY_MANIFEST);
        let accept = accept.as_ref();
        let scopes = target.scopes(&method);
        // From the root: the place's own path is the prefix.
        let path = target.to_path_and_query();
        let authorization = upstream.authorization(&scopes).await?;
        let first = upstream.reach.ask(&method, &path, accept, authorization.as_ref()).await?;
        if first.status() != StatusCode::UNAUTHORIZED {
            return Ok(first);
        }
        upstream.credential.forget(&scopes);
        if upstream.credential.learn(first.headers()).is_err() {
            return Ok(first);
        }
        match upstream.authorization(&scopes).await? {
            Some(value) => upstream.reach.ask(&method, &path, accept, Some(&value)).await,
            None => Ok(first),
        }
    }

    /// As names of images have it: `docker.io/library/debian`.
    pub fn image(&self) -> String {
        format!("{}/{}", self.upstream.host(), self.name)
    }
}

fn expect_ok(from: reqwest::Response) -> Result<reqwest::Response, UpstreamError> {
    match from.status() {
        StatusCode::OK => Ok(from),
        status => Err(UpstreamError::Status(status)),
    }
}
