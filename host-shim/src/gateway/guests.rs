//! The registry as one VM sees it, over the connections that its tunnel hands in.
//!
//! ```text
//! GET  base/*, <its tenant>/*   ─▶ pull: streamed from the backing registry, with the host's credential
//! GET  upstream/<registry>/*    ─▶ upstream: from the cache, or another registry, with the host's credential
//! any  staging/image            ─▶ push: this build's staging area, once it pushes
//! ```
//! Who is asking is known from the socket that the connection came in on: nothing inside it says
//! so, and there is no login. What was pulled is written down here: it is the build's provenance,
//! and later saves the upload of base layers.

mod pull;
mod push;
mod room;
mod upstream;

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use kiln_protocol::name::{REGISTRY, STAGING_REPOSITORY};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::backing::Backing;
use super::error::Refusal;
use super::gate::Want;
use super::path::{Name, Route};
use super::relay;
use super::rights::Space;
use super::upstream::Upstreams;
use crate::build::{BuildId, Pulled, Tenant};
use crate::staging::{Digest, Staging};

/// Most different manifests of a build that are written down. One that pulls more is refused.
const MAX_PULLED: usize = 1024;
/// Most blobs whose source is remembered. Beyond, a base layer is uploaded instead of mounted.
const MAX_BLOBS: usize = 16 * 1024;
/// Between two requests of a connection. Engines keep connections open over long steps.
const IDLE_PATIENCE: Duration = Duration::from_hours(1);
/// Most headers of a request. Engines send about ten; several `Accept`s are among them.
const MAX_HEADERS: usize = 64;
/// Most bytes that one connection buffers.
const MAX_BUFFER: usize = 64 * 1024;

/// What one VM's registry connections share.
#[derive(Debug)]
pub struct GuestContext {
    build: BuildId,
    tenant: Tenant,
    staging: Arc<Staging>,
    backing: Backing,
    upstreams: Upstreams,
    pushing: watch::Sender<bool>,
    manifests: room::ManifestRoom,
    seen: Mutex<Seen>,
    wanted: Mutex<Vec<Want>>,
}

/// How long an upload may be ahead of the report that the build pushes: a batch of events is stored in far less.
const PHASE_PATIENCE: Duration = Duration::from_secs(2);

/// What a build has pulled so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    pulled: BTreeSet<(String, Digest)>,
    blobs: HashMap<Digest, PulledBlob>,
}

/// A blob that some manifest that the build pulled consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulledBlob {
    /// The repository that the build may pull it from, as the gateway has it.
    pub repository: Name,
    /// Its size as the manifest says.
    pub size: u64,
}

impl GuestContext {
    /// For a build that has pulled nothing and may not push yet.
    pub fn new(
        build: BuildId,
        tenant: Tenant,
        staging: Arc<Staging>,
        backing: Backing,
        upstreams: Upstreams,
    ) -> Self {
        Self {
            build,
            tenant,
            staging,
            backing,
            upstreams,
            pushing: watch::Sender::new(false),
            manifests: room::ManifestRoom::new(),
            seen: Mutex::default(),
            wanted: Mutex::default(),
        }
    }

    /// For a build that has pulled this already.
    #[must_use]
    pub fn having_seen(self, seen: Seen) -> Self {
        Self { seen: Mutex::new(seen), ..self }
    }

    /// All that it has pulled.
    pub fn all_seen(&self) -> Seen {
        self.seen().clone()
    }

    /// Whose VM it is.
    pub fn build(&self) -> &BuildId {
        &self.build
    }

    /// Where pushes go.
    pub fn staging(&self) -> &Arc<Staging> {
        &self.staging
    }

    /// The other registries.
    pub fn upstreams(&self) -> &Upstreams {
        &self.upstreams
    }

    /// Opens the staging area for pushes, or closes it.
    pub fn set_pushing(&self, pushing: bool) {
        self.pushing.send_replace(pushing);
    }

    /// Every manifest that was pulled, by the references that it was pulled with. A tag that was moved meanwhile is
    /// there with both.
    pub fn pulled(&self) -> Vec<Pulled> {
        let seen = self.seen();
        let pulled = seen.pulled.iter();
        pulled
            .map(|(reference, digest)| Pulled {
                reference: reference.clone(),
                digest: digest.to_string(),
            })
            .collect()
    }

    /// Where a blob can be had without the guest, if the build has pulled it.
    pub fn pulled_blob(&self, digest: &Digest) -> Option<PulledBlob> {
        self.seen().blobs.get(digest).cloned()
    }

    /// Whether the build may push; waits a moment for it. The agent says that it pushes on the
    /// control connection, and the engine's first upload may overtake that on this one.
    async fn may_push(&self) -> bool {
        let mut pushing = self.pushing.subscribe();
        let open = tokio::time::timeout(PHASE_PATIENCE, pushing.wait_for(|pushing| *pushing));
        matches!(open.await, Ok(Ok(_)))
    }

    /// The size of a blob that the pushed image may consist of: staged, or known by a pull.
    fn known_blob(&self, digest: &Digest) -> Option<u64> {
        self.staging.blob(digest).or_else(|| self.pulled_blob(digest).map(|blob| blob.size))
    }

    /// Whether the build may pull from there; if not, what it is told.
    fn check_pull(&self, name: &Name) -> Result<(), Refusal> {
        let unknown = |message: String| {
            Err(Refusal::new(http::StatusCode::NOT_FOUND, "NAME_UNKNOWN", message))
        };
        match Space::of(name) {
            Space::Base => Ok(()),
            Space::Named(first) if first == self.tenant.as_str() => Ok(()),
            _ => unknown(format!(
                "{REGISTRY}/{name}: a build may pull from {REGISTRY}/base/ and {REGISTRY}/{}/",
                self.tenant
            )),
        }
    }

    /// Writes down what was pulled: `at` is the image's name, `name` the repository's at the gateway; gives the blobs that were not
    /// known before. Refused when that is too much.
    fn record_pull(
        &self,
        at: String,
        name: &Name,
        digest: Digest,
        manifest: &[u8],
    ) -> Result<Vec<Digest>, Refusal> {
        let mut seen = self.seen();
        let pulled = (at, digest);
        if seen.pulled.len() >= MAX_PULLED && !seen.pulled.contains(&pulled) {
            return Err(Refusal::denied(format!(
                "the build pulled more than {MAX_PULLED} manifests"
            )));
        }
        seen.pulled.insert(pulled);
        // An index has no blobs of its own; whatever does not parse has none that are known.
        let blobs = serde_json::from_slice::<Blobs>(manifest).unwrap_or_default();
        let mut new = vec![];
        for blob in blobs.config.iter().chain(&blobs.layers) {
            if seen.blobs.len() >= MAX_BLOBS {
                break;
            }
            if let (Ok(digest), Some(size)) = (Digest::parse(&blob.digest), blob.size) {
                let source = PulledBlob { repository: name.clone(), size };
                seen.blobs.entry(digest).or_insert_with(|| {
                    new.push(digest);
                    source
                });
            }
        }
        Ok(new)
    }

    /// Keeps what the image may be built on in the registry for as long as the build goes on, also where somebody deletes the base.
    async fn want(&self, blobs: Vec<Digest>) {
        if let Some(want) = self.backing.want(blobs).await {
            self.wanted.lock().unwrap_or_else(PoisonError::into_inner).push(want);
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As much of an image manifest as is needed here.
#[derive(Default, Deserialize)]
struct Blobs {
    config: Option<Blob>,
    #[serde(default)]
    layers: Vec<Blob>,
}

#[derive(Deserialize)]
struct Blob {
    digest: String,
    size: Option<u64>,
}

/// Serves one connection of the VM's, from after its preamble until it ends or is cancelled. What `begins` gives for a
/// request is dropped when its answer has been sent.
pub async fn serve<S, G>(
    stream: S,
    ctx: Arc<GuestContext>,
    cancel: CancellationToken,
    begins: impl Fn() -> G + Send + Sync + 'static,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    G: Send + Unpin + 'static,
{
    let build = ctx.build.clone();
    let service = service_fn(move |request: http::Request<Incoming>| {
        let (ctx, open) = (ctx.clone(), begins());
        async move {
            let response = respond(ctx, request).await;
            Ok::<_, Infallible>(response.map(|body| Sending { body, _open: open }))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_PATIENCE)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            tracing::debug!(%build, %error, "a registry connection of a guest broke");
        },
        () = cancel.cancelled() => {}
    }
}

/// An answer on its way.
struct Sending<G> {
    body: Body,
    _open: G,
}

impl<G: Unpin> hyper::body::Body for Sending<G> {
    type Data = <Body as hyper::body::Body>::Data;
    type Error = <Body as hyper::body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

async fn respond(ctx: Arc<GuestContext>, request: http::Request<Incoming>) -> Response {
    let (parts, body) = request.into_parts();
    let answer = match Route::parse(parts.uri.path()) {
        Err(bad) => Err(bad.into()),
        Ok(Route::Base) => Ok(Response::new(Body::from("{}"))),
        Ok(Route::Catalog) => Err(Refusal::unsupported("Kiln does not list repositories")),
        Ok(route) => match route.name() {
            Some(name) if name.as_str() == STAGING_REPOSITORY => {
                push::respond(&ctx, &parts, route, body).await
            }
            _ => pull::respond(&ctx, &parts, route).await,
        },
    };
    let mut response = answer.unwrap_or_else(|refusal| {
        tracing::debug!(build = %ctx.build, method = %parts.method, status = %refusal.status,
            code = refusal.code, "a guest's registry request was refused");
        refusal.into_response()
    });
    let version = http::HeaderValue::from_static("registry/2.0");
    response.headers_mut().insert(relay::API_VERSION, version);
    response
}
