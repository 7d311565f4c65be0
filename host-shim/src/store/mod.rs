//! What survives a restart: builds, events, tokens, instances, the audit log of sessions.
//!
//! SQLite now, PostgreSQL for several hosts later: the SQL stays within what both speak. Every
//! method that returns `Ok` for a write has made it durable.
//!
//! **Invariant**: an event that tells of a change is stored in the transaction of that change, and
//! nothing is stored for a build once it is final: its last event is its final status. That one goes last of all.

pub mod line;
pub mod sqlite;

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use kiln_protocol::secret::SecretId;

use crate::build::{Build, BuildId, Change, Failure, Millis, Refused, Status, Tenant};
use crate::exec::{End, Session, Subject};
use crate::instances::instance::{self, Instance, InstanceId};
use crate::secrets::Sealed;

/// How long a claim holds that is not renewed.
pub const LEASE: Duration = Duration::from_secs(60);

/// A claim on a build. A write with an old fence is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fence(pub i64);

/// A build that a driver owns from now on.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The build, in status `building`.
    pub build: Build,
    /// Shown at every change.
    pub fence: Fence,
}

/// A build that is next in the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// Which.
    pub id: BuildId,
    /// What it wants, in MiB.
    pub memory_mb: u32,
}

/// Which builds to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this tenant's; `None` for an administrator.
    pub tenant: Option<Tenant>,
    /// Only in this status.
    pub status: Option<Status>,
    /// Only those that have all of these tags.
    pub tags: BTreeMap<String, String>,
    /// At most so many.
    pub limit: u32,
    /// Those before this build (its id), newest first.
    pub before: Option<BuildId>,
}

/// How many builds are not finished, of all tenants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Waiting.
    pub queued: u32,
    /// Since when the oldest of them waits.
    pub oldest: Option<Millis>,
    /// In that status.
    pub building: u32,
    /// In that status.
    pub pushing: u32,
}

/// Which sessions to list.
#[derive(Clone, Debug, Default)]
pub struct SessionFilter {
    /// Only in what is this tenant's; `None` for an administrator.
    pub tenant: Option<Tenant>,
    /// Only in this build or instance.
    pub subject: Option<Subject>,
    /// At most so many.
    pub limit: u32,
    /// Those before this session (its id), newest first.
    pub before: Option<String>,
}

/// A client's `Idempotency-Key`, stored with the build that it made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// As the client sent it; unique in its tenant.
    pub key: String,
    /// SHA-256 of what was asked for, lower-case hex.
    pub digest: String,
}

/// Most payload bytes of one page of [`Store::events_after`]; a page has at least one event.
pub const MAX_PAGE_BYTES: usize = 256 * 1024;

/// Most payload bytes of events that are removed at one time; one that is larger goes alone.
pub const MAX_PIECE_BYTES: i64 = 4 * 1024 * 1024;

/// An event to store. Its payload is the API's JSON object without `timestamp`.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// When it happened.
    pub at: Millis,
    /// The agent's number, where the agent sent it: stored once in an attempt however often it is
    /// sent. (The agent of the next attempt counts from 1 again.)
    pub agent_seq: Option<u64>,
    /// `type` and what follows it.
    pub payload: serde_json::Value,
}

impl NewEvent {
    /// Whether it is a line of the log, which does not stay for ever.
    pub fn is_log(&self) -> bool {
        self.payload["type"] == "log"
    }
}

/// A stored event.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredEvent {
    /// Counts from 1 in its build, without gaps but those of [`Store::trim_log`].
    pub seq: u64,
    /// When it happened.
    pub at: Millis,
    /// `type` and what follows it.
    pub payload: serde_json::Value,
}

/// A finished build that has log events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinishedLog {
    /// The build.
    pub id: BuildId,
    /// When it ended.
    pub completed_at: Millis,
}

/// What was removed of a log at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// So many events.
    pub events: u64,
    /// Of their payloads.
    pub bytes: u64,
    /// After which number to go on; `None` when there are no events after it, and the log has gone.
    pub next: Option<u64>,
}

/// A tenant's secret, without its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretRecord {
    /// Unique in its tenant.
    pub id: SecretId,
    /// When it was first set.
    pub created_at: Millis,
    /// When its value was set.
    pub updated_at: Millis,
}

/// What a token may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Role {
    /// Sees its tenant's builds and events.
    Reader,
    /// Also creates and cancels.
    Tenant,
    /// Does so for every tenant, and writes `base/*`.
    Admin,
}

impl Role {
    /// Every role, the least first.
    pub const ALL: [Self; 3] = [Self::Reader, Self::Tenant, Self::Admin];

    /// The API's, the store's and the command line's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Tenant => "tenant",
            Self::Admin => "admin",
        }
    }

    /// The role of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An API token as stored: the secret itself is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRecord {
    /// Its public id, for `token list` and `revoke`.
    pub id: String,
    /// SHA-256 of the token, lower-case hex.
    pub hash: String,
    /// A name for people.
    pub name: Option<String>,
    /// Whose it is.
    pub tenant: Tenant,
    /// What it may do.
    pub role: Role,
    /// When it was made.
    pub created_at: Millis,
    /// When it stops.
    pub expires_at: Option<Millis>,
    /// Whether it was revoked.
    pub revoked: bool,
    /// When it was last shown, to about a minute; `None` while it never was.
    pub last_used_at: Option<Millis>,
}

/// Why a disk takes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// It is full.
    Full,
    /// It is not to be written.
    ReadOnly,
}

/// A store that failed, or refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such build or token.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// The build's state does not allow it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The instance's state does not allow it.
    #[error(transparent)]
    InstanceRefused(#[from] instance::Refused),
    /// The tenant has used this idempotency key, or this id, before.
    #[error("{0} is taken already")]
    Taken(&'static str),
    /// The tenant has as many as it may have.
    #[error("the tenant has {limit} {what}, which is the limit")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many it may have.
        limit: u32,
    },
    /// Another driver has claimed the build since.
    #[error("the claim on the build is not current any more")]
    Fenced,
    /// The database failed.
    #[error("the store failed to {operation}")]
    Database {
        /// What was tried.
        operation: &'static str,
        /// What the disk has to do with it.
        disk: Option<Disk>,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The store. Small on purpose.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Stores a queued build together with its first events, the key that asked for it, and the secrets that
    /// are its own: they are forgotten in the transaction that ends it.
    async fn insert_build(
        &self,
        build: &Build,
        events: &[NewEvent],
        key: Option<&IdempotencyKey>,
        secrets: &[(SecretId, Sealed)],
    ) -> Result<(), StoreError>;
    /// The build that the tenant's idempotency key made, and the digest of what was asked for.
    async fn build_by_key(
        &self,
        tenant: &Tenant,
        key: &str,
    ) -> Result<Option<(BuildId, String)>, StoreError>;
    /// One build.
    async fn build(&self, id: &BuildId) -> Result<Option<Build>, StoreError>;
    /// Builds, newest first, as a list shows them: without the Dockerfile and the arguments of their
    /// requests.
    async fn builds(&self, filter: &Filter) -> Result<Vec<Build>, StoreError>;
    /// Its number in the line, from 1 ([`line::position`]); `None` when not queued.
    async fn queue_position(&self, id: &BuildId) -> Result<Option<u32>, StoreError>;
    /// How many builds of the tenant are queued.
    async fn queued_count(&self, tenant: &Tenant) -> Result<u32, StoreError>;
    /// How many builds are not finished.
    async fn unfinished(&self) -> Result<Unfinished, StoreError>;
    /// The build that is next in the line ([`mod@line`]).
    async fn next_queued(&self) -> Result<Option<Next>, StoreError>;
    /// Takes the build that is next in the line of those tenants whose oldest build wants no more memory than that, in
    /// MiB, by one conditional `UPDATE … RETURNING`, and appends events to it in the same transaction. The claim is a lease: it
    /// holds for [`LEASE`].
    async fn claim_within(
        &self,
        owner: &str,
        now: Millis,
        events: &[NewEvent],
        most_mb: u32,
    ) -> Result<Option<Claimed>, StoreError>;
    /// The same, whatever memory it wants.
    async fn claim(
        &self,
        owner: &str,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Option<Claimed>, StoreError> {
        self.claim_within(owner, now, events, u32::MAX).await
    }
    /// Changes a claimed build and appends events, in one transaction. Refused when the fence is old.
    async fn change(
        &self,
        id: &BuildId,
        fence: Fence,
        change: Change,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Build, StoreError>;
    /// Stores usage, pulls and the builder's digest of a claimed build (not its state).
    async fn annotate(&self, build: &Build, fence: Fence) -> Result<(), StoreError>;
    /// Cancels a build that nobody has claimed; `Refused` once it is claimed or final.
    async fn cancel_queued(
        &self,
        id: &BuildId,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Build, StoreError>;
    /// Fails builds that were submitted before then and were never claimed, the oldest first, at most so many, with events
    /// appended to each; which they were.
    async fn expire_queued(
        &self,
        before: Millis,
        at_most: u32,
        failure: &Failure,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Vec<BuildId>, StoreError>;
    /// The claim holds for [`LEASE`] from now on. Refused when the fence is old, or the build final.
    async fn renew(&self, id: &BuildId, fence: Fence, now: Millis) -> Result<(), StoreError>;
    /// Builds whose claims have not been renewed in time, the oldest first.
    async fn lapsed(&self, now: Millis) -> Result<Vec<BuildId>, StoreError>;
    /// Takes over a build whose claim has not been renewed in time, with a new fence; `None` where it was, or the build has ended.
    async fn take_over(
        &self,
        id: &BuildId,
        owner: &str,
        now: Millis,
    ) -> Result<Option<Claimed>, StoreError>;
    /// Takes over every build that a driver of an earlier process had claimed, with new fences, whatever is left of its lease: that
    /// process is known to have ended. To be called once, before the first claim.
    async fn reclaim(&self, owner: &str, now: Millis) -> Result<Vec<Claimed>, StoreError>;

    /// Appends events in order and returns the highest number. Events whose `agent_seq` is stored
    /// already are left out. `Refused` once the build is final.
    async fn append_events(&self, id: &BuildId, events: &[NewEvent]) -> Result<u64, StoreError>;
    /// Stored events after a number, in order: at most `limit`, and fewer where they are larger
    /// than [`MAX_PAGE_BYTES`]. Empty only when there are none.
    async fn events_after(
        &self,
        id: &BuildId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<StoredEvent>, StoreError>;

    /// Payload bytes of the log events of all finished builds.
    async fn log_bytes(&self) -> Result<u64, StoreError>;
    /// Finished builds that have log events, those that ended first at most so many.
    async fn finished_logs(&self, at_most: u32) -> Result<Vec<FinishedLog>, StoreError>;
    /// Removes the log events among the next `at_most` events after a number, and among fewer where they are larger than
    /// [`MAX_PIECE_BYTES`]. Other events stay, and all numbers. `Refused` unless the build is final.
    async fn trim_log(&self, id: &BuildId, after: u64, at_most: u32) -> Result<Piece, StoreError>;
    /// Builds that ended before then, those that ended first at most so many.
    async fn finished_builds(
        &self,
        before: Millis,
        at_most: u32,
    ) -> Result<Vec<BuildId>, StoreError>;
    /// Removes the oldest events of a build, so many as [`Self::trim_log`] looks at; where there are none any more the build, its tags and
    /// its idempotency key. Whether it has gone. Its sessions stay. `Refused` unless it is final.
    async fn remove_build(&self, id: &BuildId, at_most: u32) -> Result<bool, StoreError>;
    /// Gives back to the file system some of what removed rows have left; whether there is more.
    async fn shrink(&self) -> Result<bool, StoreError>;

    /// Stores a tenant's secret, in place of its older value. A new one makes them no more than `at_most`, which
    /// is looked at in the statement that stores it.
    async fn put_secret(
        &self,
        tenant: &Tenant,
        id: &SecretId,
        sealed: &Sealed,
        now: Millis,
        at_most: u32,
    ) -> Result<(), StoreError>;
    /// A tenant's secret.
    async fn secret(&self, tenant: &Tenant, id: &SecretId) -> Result<Option<Sealed>, StoreError>;
    /// A tenant's secrets, by id.
    async fn secrets(&self, tenant: &Tenant) -> Result<Vec<SecretRecord>, StoreError>;
    /// Removes a tenant's secret.
    async fn delete_secret(&self, tenant: &Tenant, id: &SecretId) -> Result<(), StoreError>;
    /// A secret that is a build's own, while the build has not ended.
    async fn build_secret(
        &self,
        build: &BuildId,
        id: &SecretId,
    ) -> Result<Option<Sealed>, StoreError>;

    /// Stores an instance. Its name is its tenant's only one, and the tenant has `at_most` so many: both are
    /// looked at in the transaction that stores it.
    async fn insert_instance(&self, instance: &Instance, at_most: u32) -> Result<(), StoreError>;
    /// One instance.
    async fn instance(&self, id: &InstanceId) -> Result<Option<Instance>, StoreError>;
    /// The tenant's instances, or all, newest first.
    async fn instances(&self, tenant: Option<&Tenant>) -> Result<Vec<Instance>, StoreError>;
    /// Changes an instance.
    async fn change_instance(
        &self,
        id: &InstanceId,
        change: instance::Change,
        now: Millis,
    ) -> Result<Instance, StoreError>;
    /// Forgets an instance.
    async fn delete_instance(&self, id: &InstanceId) -> Result<(), StoreError>;

    /// Writes a session into the audit log.
    async fn insert_session(&self, session: &Session) -> Result<(), StoreError>;
    /// Marks a build as entered, for ever.
    async fn mark_entered(&self, build: &BuildId) -> Result<(), StoreError>;
    /// Records how a session ended, once.
    async fn end_session(&self, id: &str, end: &End) -> Result<(), StoreError>;
    /// Ends the sessions that an earlier server left open, as `server_stopped`; how many there were. To be
    /// called once, before the first session.
    async fn end_open_sessions(&self, now: Millis) -> Result<u64, StoreError>;
    /// Forgets sessions that ended before then, the oldest first, at most so many; how many there were.
    async fn forget_sessions(&self, before: Millis, at_most: u32) -> Result<u64, StoreError>;
    /// Sessions, newest first.
    async fn sessions(&self, filter: &SessionFilter) -> Result<Vec<Session>, StoreError>;

    /// Stores a token.
    async fn insert_token(&self, token: &TokenRecord) -> Result<(), StoreError>;
    /// The token with this hash, revoked and expired ones too.
    async fn token_by_hash(&self, hash: &str) -> Result<Option<TokenRecord>, StoreError>;
    /// The token with this public id, revoked and expired ones too.
    async fn token(&self, id: &str) -> Result<Option<TokenRecord>, StoreError>;
    /// All tokens, oldest first.
    async fn tokens(&self) -> Result<Vec<TokenRecord>, StoreError>;
    /// Revokes a token by its public id.
    async fn revoke_token(&self, id: &str) -> Result<(), StoreError>;
    /// Stores when tokens were last used, by public id. Ids that there are not are left out, and so are times before
    /// those that are stored.
    async fn tokens_used(&self, uses: &[(String, Millis)]) -> Result<(), StoreError>;
    /// Whether the store can be written now.
    async fn ready(&self) -> Result<(), StoreError>;
}
