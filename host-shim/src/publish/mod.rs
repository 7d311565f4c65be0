//! From staging to the registry: check, then push, manifest last.
//!
//! ```text
//! staging ─check─▶ Checked (written down) ─▶ [driver records publishing(digest)] ─push─▶ registry
//!                      ▲ load, after a crash ──────────────────────────────────────┘
//! ```
//! Nothing here decides a build's state. [`push()`] may be repeated: what the registry has already is
//! not sent again, and the manifest, which makes the image visible, comes after all it names.

mod check;
mod push;

use std::sync::Arc;

use crate::build::FailureKind;
use crate::causes::chain;
use crate::gateway::BackingError;
use crate::gateway::upstream::UpstreamError;
use crate::staging::{Digest, StagingError};

pub use self::check::{Checked, CheckedBlob, check};
pub(crate) use self::check::{MANIFEST_TYPES, blobs_of, parse_manifest};
pub use self::push::{is_published, push};

/// Why an image was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The agent's digest is none.
    #[error("the build reported no valid digest of its image")]
    BadDigest,
    /// The guest did not push what it says.
    #[error("the build did not push the manifest {0} that it reported")]
    ManifestMissing(Digest),
    /// What it pushed is no image that Kiln publishes.
    #[error("the pushed manifest is not that of an image: {0}")]
    NotAnImage(String),
    /// A part of the image is not there.
    #[error("the build did not push {0}, which is part of its image")]
    BlobMissing(Digest),
    /// A part of the image has another size than the manifest says.
    #[error("{digest}, part of the image, has {actual} bytes, not {expected}")]
    BlobSize {
        /// Of the part.
        digest: Digest,
        /// By the manifest.
        expected: u64,
        /// In staging.
        actual: u64,
    },
    /// The staging area failed.
    #[error("the host could not read the pushed image")]
    Staging(#[from] StagingError),
    /// The disk failed.
    #[error("the host could not {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The name or tag that the image should get is invalid.
    #[error("{0:?} is not a valid repository and tag")]
    BadName(String),
    /// The registry could not be reached.
    #[error("the registry could not {operation}")]
    Backing {
        /// What was tried.
        operation: String,
        /// Why it failed.
        #[source]
        source: BackingError,
    },
    /// A base's layer could not be had.
    #[error("{digest}, part of the image's base, could not be had from {place}")]
    Upstream {
        /// Of the layer.
        digest: Digest,
        /// The repository, as the build named it.
        place: String,
        /// Why.
        #[source]
        source: Arc<UpstreamError>,
    },
    /// The registry refused.
    #[error("the registry answered {status} when asked to {operation}: {message}")]
    Refused {
        /// What was tried.
        operation: String,
        /// Its answer.
        status: http::StatusCode,
        /// The beginning of what it said, printable.
        message: String,
    },
    /// The registry has something else than what was pushed.
    #[error("the registry has {actual:?} where {expected} was pushed")]
    NotConfirmed {
        /// What was pushed.
        expected: Digest,
        /// What it says.
        actual: Option<String>,
    },
}

impl PublishError {
    /// The cause of the build's failure.
    pub fn failure_kind(&self) -> FailureKind {
        match self {
            Self::Staging(_) | Self::Io { .. } | Self::BadName(_) => FailureKind::Internal,
            _ => FailureKind::PushFailed,
        }
    }

    /// The error with all its causes, for a build's `detail` or a log.
    pub fn detail(&self) -> String {
        chain(self)
    }

    fn is_transient(&self) -> bool {
        match self {
            Self::Backing { source, .. } => source.is_transient(),
            Self::Upstream { source, .. } => source.is_transient(),
            // 401: the token ran out during a long upload; the next try gets a new one.
            Self::Refused { status, .. } => {
                status.is_server_error() || matches!(status.as_u16(), 401 | 408 | 429)
            }
            _ => false,
        }
    }
}
