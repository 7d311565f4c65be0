//! The agent's half of a session: Hello, job, events, outcome, Finish.
//!
//! ```text
//!            Job              task ends, or is stopped          Finish, or 10 s
//! waiting ─────────▶ working ──────────────────────────▶ ended ─────────────────▶ power off
//! ```
//! One task owns all of it and never waits for one thing alone: frames, writes, reports, the
//! build's end and the deadlines are looked at together, so that a Cancel gets through whatever
//! else is stuck. The build itself is another task (`work`), which reports through the bounded
//! channel of [`crate::events`].
//!
//! # Resume
//! When the connection breaks, the build goes on and the agent dials again, with the token of the
//! last Welcome. It then sends what is not acknowledged, in order, and the outcome if there is one.
//! If the source was still arriving, the first `SourceTaken` after the resume says how far it is:
//! the host goes on from that very byte.

mod link;
mod running;
mod stop;
mod usage;
mod work;

use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::frame::FrameError;
use kiln_protocol::hello::Welcome;
use kiln_protocol::job::Job;
use tokio::time::Instant;

pub use self::link::Identity;
use self::link::{DialError, Link, dial};
use self::running::Running;
pub use self::work::{Places, fail};
use crate::engine::Engine;
use crate::events::{BadAcknowledgement, Reporter};
use crate::source::FeedError;
use crate::vsock::Connector;

/// How long a welcomed agent waits for its job. The host sends it at once.
const JOB_WAIT: Duration = Duration::from_mins(1);

/// How long a stopped build may take to end by itself. Killing an engine takes milliseconds; after
/// this its end is not waited for, since the VM is about to go.
const STOP_GRACE: Duration = Duration::from_millis(500);

/// How long a step that is ended so that it stays may take to be over. The host allows a build that much more
/// than its timeout.
const KEEP_GRACE: Duration = Duration::from_secs(5);

/// How long the last events and the outcome may take to get out to a host that is slow to read.
const DELIVERY_WAIT: Duration = Duration::from_mins(1);

/// How long the host may take to store the outcome and say Finish.
const FINISH_WAIT: Duration = Duration::from_secs(10);

/// Why a session ended without Finish.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The host could not be reached, at first or again.
    #[error("no session with the host")]
    Dial(#[from] DialError),
    /// The connection broke and the host does not resume.
    #[error("the connection broke, and the host cannot resume it")]
    Broken(#[source] FrameError),
    /// The host sent something that is no frame, or a frame could not be made.
    #[error("the control connection carried a bad frame")]
    Frame(#[source] FrameError),
    /// The host broke the rules of the source stream.
    #[error("the source stream broke its rules")]
    Source(#[from] FeedError),
    /// The host acknowledged what never was.
    #[error("an acknowledgement is wrong")]
    Acknowledgement(#[from] BadAcknowledgement),
    /// The host sent a second, different job.
    #[error("the host sent a second job")]
    SecondJob,
    /// The host sent no job.
    #[error("the host sent no job within {} s", JOB_WAIT.as_secs())]
    NoJob,
    /// The outcome could not be delivered.
    #[error("the host did not take the outcome within {} s", DELIVERY_WAIT.as_secs())]
    Undelivered,
}

/// A session that the host has opened.
#[derive(Debug)]
pub struct Session<C: Connector> {
    connector: Arc<C>,
    identity: Identity,
    link: Link<C::Stream>,
    welcome: Welcome,
    welcomed: Instant,
}

impl<C: Connector> Session<C> {
    /// Dials the host and says Hello.
    pub async fn open(connector: Arc<C>, identity: Identity) -> Result<Self, SessionError> {
        let (link, welcome) = dial(Arc::clone(&connector), identity.clone(), None).await?;
        Ok(Self { connector, identity, link, welcome, welcomed: Instant::now() })
    }

    /// What the host said.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Takes the job, does it, and reports until the host says Finish. `prepare` makes the machine
    /// ready for the job, with a way to report; what it cannot do is the build's failure.
    pub async fn run<E, P>(self, engine: E, places: Places, prepare: P) -> Result<(), SessionError>
    where
        E: Engine + Send + Sync + 'static,
        P: FnOnce(&Job, &Reporter) -> Result<(), String> + Send,
    {
        Running::new(self, engine, places, prepare).run().await
    }
}

#[cfg(test)]
mod tests;
