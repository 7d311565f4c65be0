//! What can be wrong with an upstream, and what the guest is told of it.

use std::io;

use http::StatusCode;

use crate::causes::chain;
use crate::gateway::backing::{BackingError, PATIENCE};
use crate::gateway::error::Refusal;
use crate::staging::Digest;

/// Something could not be had from an upstream.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The HTTP client could not be made.
    #[error("cannot make an HTTP client")]
    Client(#[source] reqwest::Error),
    /// Its login cannot be read, or its token service fails.
    #[error("its login is of no use")]
    Login(#[source] BackingError),
    /// The connection failed.
    #[error("it cannot be reached")]
    Send(#[source] reqwest::Error),
    /// Nothing came for too long.
    #[error("nothing came for {} s", PATIENCE.as_secs())]
    Deadline,
    /// A body takes longer than any does.
    #[error("it takes too long")]
    Slow,
    /// A body that broke off, or is larger than it may be.
    #[error("its answer is of no use")]
    Body(#[source] BackingError),
    /// It sends Kiln to where it does not go.
    #[error("it sends {0}")]
    Astray(&'static str),
    /// The same, by address.
    #[error("it sends to where Kiln does not go")]
    Forbidden(#[source] io::Error),
    /// It refuses.
    #[error("it answered {0}")]
    Status(StatusCode),
    /// It serves something else.
    #[error("it served something else than {0}")]
    Changed(Digest),
    /// A blob without an end.
    #[error("{0} is larger than any layer")]
    Large(Digest),
    /// The cache cannot be used.
    #[error("the cache of upstreams cannot {operation} {path}")]
    Cache {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The task that fetched it is gone.
    #[error("the fetch broke down")]
    Broken,
}

impl UpstreamError {
    /// Whether the same request may go well a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status(status) => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            Self::Login(source) | Self::Body(source) => source.is_transient(),
            Self::Send(_) | Self::Deadline | Self::Broken => true,
            _ => false,
        }
    }

    /// What a guest gets that asked for `what` of `host`. Where hosts or addresses are in it, they are in the host's log
    /// alone.
    pub(in crate::gateway) fn refusal(
        &self,
        host: &str,
        what: &str,
        code: &'static str,
    ) -> Refusal {
        let refusal = |status, code, message: String| Refusal::new(status, code, message);
        let bad = StatusCode::BAD_GATEWAY;
        match self {
            Self::Status(StatusCode::NOT_FOUND) => {
                refusal(StatusCode::NOT_FOUND, code, format!("{host} has no {what}"))
            }
            // Docker's registry says so of a repository that it does not have.
            Self::Status(status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)) => {
                tracing::warn!(upstream = host, what, %status, "an upstream refuses this host");
                let status = status.as_u16();
                let message = format!(
                    "{host} has no {what}, or does not show it to this host ({status}): its operator may add a login \
                     to --registry-config"
                );
                refusal(StatusCode::NOT_FOUND, code, message)
            }
            Self::Status(status @ StatusCode::TOO_MANY_REQUESTS) => refusal(
                *status,
                "TOOMANYREQUESTS",
                format!("{host} asks to slow down: try again later"),
            ),
            Self::Deadline | Self::Slow => {
                refusal(StatusCode::GATEWAY_TIMEOUT, "UNKNOWN", format!("{host}, {what}: {self}"))
            }
            _ => {
                tracing::warn!(upstream = host, what, error = %chain(self), "an upstream failed");
                refusal(bad, "UNKNOWN", format!("{host}, {what}: {self}"))
            }
        }
    }
}
