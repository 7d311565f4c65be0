//! Sessions: commands that people run in VMs that are there already, and files that they copy in and out.
//!
//! ```text
//! api::exec ── admit (bounds) ──▶ Admitted ── run ──▶ record it ─▶ bridge (client ⇄ VM) ─▶ record its end
//!                                                                   │
//!                                                    Entrance ◀─────┘  of a running build or instance
//! ```
//! [`entrance`] is the seam: whatever has a VM and a nonce can be entered.
//!
//! **Invariant**: no command is started before its session is in the audit log, durably; what the command reads and
//! prints is nowhere.

mod agent;
pub mod bridge;
pub mod entrance;
mod inward;
pub mod record;
mod revoked;
pub mod room;
pub mod signal;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_protocol::exec::{Exec, Open};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::bridge::{ClientInput, ClientOutput, Gone, Outcome, Said};
pub use self::entrance::{Dial, Door, Doorway, Entrance, Line, Opened};
pub use self::record::{End, How, Session, Subject, Who};
use self::revoked::{Inside, Tokens};
use self::room::{Full, Place, Room};
use crate::build::Tenant;
use crate::causes::chain;
use crate::store::Store;
use crate::token::Lapse;

/// How long sessions may take to be recorded when the server stops.
const LAST: Duration = Duration::from_secs(5);

/// The sessions of a server. Cheap to clone.
#[derive(Clone)]
pub struct Sessions {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    room: Room,
    tokens: Tokens,
    tasks: TaskTracker,
    /// None is begun any more; those that there are go on.
    closed: AtomicBool,
    stop: CancellationToken,
    ping: Duration,
}

/// Why a session is not begun.
#[derive(Debug, thiserror::Error)]
pub enum NotAdmitted {
    /// There are as many as there may be.
    #[error(transparent)]
    Full(#[from] Full),
    /// The server takes no more.
    #[error("the server is being stopped")]
    Stopping,
}

/// Somebody who may enter, with a place for the session.
pub struct Admitted {
    sessions: Sessions,
    entrance: Entrance,
    tenant: Tenant,
    subject: Subject,
    who: Who,
    inside: Inside,
    _place: Place,
}

impl Sessions {
    /// Recorded in a store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self::with_ping(store, bridge::PING)
    }

    /// With another time between two signs of life of a client, and between two looks at its token.
    pub fn with_ping(store: Arc<dyn Store>, ping: Duration) -> Self {
        let inner = Inner {
            store,
            room: Room::default(),
            tokens: Tokens::default(),
            tasks: TaskTracker::new(),
            closed: AtomicBool::new(false),
            stop: CancellationToken::new(),
            ping,
        };
        Self { inner: Arc::new(inner) }
    }

    /// From now on none is begun. Those that there are go on.
    pub fn close(&self) {
        self.inner.closed.store(true, Ordering::Relaxed);
    }

    /// Takes a place for a session in what is `tenant`'s.
    pub fn admit(
        &self,
        entrance: Entrance,
        tenant: Tenant,
        subject: Subject,
        who: Who,
    ) -> Result<Admitted, NotAdmitted> {
        if self.inner.closed.load(Ordering::Relaxed) {
            return Err(NotAdmitted::Stopping);
        }
        let place = self.inner.room.take(&subject, &who.tenant)?;
        let inside = self.inner.tokens.enter(&who.token_id);
        Ok(Admitted {
            sessions: self.clone(),
            entrance,
            tenant,
            subject,
            who,
            inside,
            _place: place,
        })
    }

    /// How many there are now.
    pub fn count(&self) -> usize {
        self.inner.room.taken()
    }

    /// Ends the sessions that a token has opened, now that it is revoked.
    pub fn revoke(&self, token_id: &str) {
        self.inner.tokens.end(token_id, Lapse::Revoked);
    }

    /// Counts a task as a session's: the server waits for it when it stops.
    pub fn track<F: Future>(&self, task: F) -> impl Future<Output = F::Output> + use<F> {
        self.inner.tasks.track_future(task)
    }

    /// Ends the sessions of tokens that open nothing any more, and every session at `stop`; then it waits until that
    /// is recorded and told.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            never = self.watch_tokens() => match never {},
        }
        self.close();
        self.inner.stop.cancel();
        self.inner.tasks.close();
        if tokio::time::timeout(LAST, self.inner.tasks.wait()).await.is_err() {
            tracing::warn!("sessions did not end in time; the next start records their end");
        }
    }

    async fn watch_tokens(&self) -> Infallible {
        let Inner { store, tokens, ping, .. } = &*self.inner;
        loop {
            tokio::time::sleep(*ping).await;
            if let Err(error) = tokens.check(store.as_ref(), crate::clock::now()).await {
                // Its sessions go on: a store that does not answer says nothing of a token.
                tracing::warn!(error = chain(&error), "the tokens of sessions cannot be looked at");
            }
        }
    }
}

impl Admitted {
    /// Who it is.
    pub fn who(&self) -> &Who {
        &self.who
    }

    /// Runs a command to its end, and records it.
    pub async fn run<I: ClientInput, O: ClientOutput>(
        &self,
        exec: Exec,
        timeout: Option<Duration>,
        input: &mut I,
        output: &mut O,
    ) -> Outcome {
        self.open(Open::Exec(exec), timeout, input, output).await
    }

    /// Runs a session to its end, and records it.
    pub async fn open<I: ClientInput, O: ClientOutput>(
        &self,
        open: Open,
        timeout: Option<Duration>,
        input: &mut I,
        output: &mut O,
    ) -> Outcome {
        let session = match self.record(&record::as_command(&open)).await {
            Ok(session) => session,
            Err(outcome) => return outcome,
        };
        let Inner { stop, ping, .. } = &*self.sessions.inner;
        let (stop, lapse) = (stop.clone(), self.inside.lapse.clone());
        let bounds = bridge::Bounds { timeout, stop, lapse, ping: *ping };
        let before = self.mark();
        let outcome = bridge::run(&self.entrance, open, bounds, before, input, output).await;
        self.end(&session, &outcome).await;
        outcome
    }

    /// Records that a session was asked for and refused.
    pub async fn refuse(&self, open: &Open, why: String) -> Outcome {
        let outcome = Outcome::refused(why);
        if let Ok(session) = self.record(&record::as_command(open)).await {
            self.end(&session, &outcome).await;
        }
        outcome
    }

    async fn record(&self, exec: &Exec) -> Result<Session, Outcome> {
        let now = crate::clock::now();
        let (tenant, subject, who) = (self.tenant.clone(), self.subject.clone(), self.who.clone());
        let session = Session::begin(tenant, subject, who, exec, now);
        let stored = self.sessions.inner.store.insert_session(&session).await;
        stored.map_err(|error| {
            tracing::error!(
                error = chain(&error),
                "a session cannot be recorded, and is not begun"
            );
            Outcome::refused(
                "the session cannot be recorded, so it was not begun; the host's log says why",
            )
        })?;
        let Session { id, who, vm, with_secrets, .. } = &session;
        tracing::info!(session = id, subject = %session.subject, token = who.token_id, role = %who.role, vm, with_secrets, "a session begins");
        Ok(session)
    }

    /// Marks a build before anything is begun in its VM.
    async fn mark(&self) -> Result<(), Outcome> {
        let Subject::Build(id) = &self.subject else { return Ok(()) };
        self.sessions.inner.store.mark_entered(id).await.map_err(|error| {
            tracing::error!(
                error = chain(&error),
                "a build cannot be marked as entered, and is not"
            );
            Outcome::refused(
                "the build cannot be marked as entered, so it was not; the host's log says why",
            )
        })
    }

    async fn end(&self, session: &Session, outcome: &Outcome) {
        let Outcome { how, exit_code, why, cause: _ } = outcome.clone();
        tracing::info!(session = session.id, how = how.as_str(), exit_code, "a session ended");
        let end = End { at: crate::clock::now(), how, exit_code, why };
        if let Err(error) = self.sessions.inner.store.end_session(&session.id, &end).await {
            tracing::error!(
                session = session.id,
                error = chain(&error),
                "a session's end cannot be recorded"
            );
        }
    }
}
