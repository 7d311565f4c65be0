//! The store in one SQLite file.
//!
//! WAL with `synchronous=FULL`: a commit is on the disk when it returns, readers never wait for the
//! writer. One writing connection (`writer`), so that writers queue in the process and not in SQLite, and those who queue share a
//! commit; another process (`kiln token create`) may still write between two of its transactions.
//!
//! One file per table: `builds` (with `claims`, which changes them, and `line`, who is next), `events`, `build_logs` (in `retention`,
//! with what goes in time), `instances`, `secrets`, `sessions`, `tokens`.

mod builds;
mod claims;
mod disk;
mod events;
mod instances;
mod line;
mod retention;
mod secrets;
mod sessions;
mod tokens;
mod unfinished;
mod writer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use kiln_protocol::secret::SecretId;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, SqlSafeStr, SqlitePool};

use self::writer::{Write, Writer};

use super::{
    Claimed, Fence, Filter, FinishedLog, IdempotencyKey, NewEvent, Next, Piece, SecretRecord,
    SessionFilter, Store, StoreError, StoredEvent, TokenRecord, Unfinished,
};
use crate::build::{Build, BuildId, Change, Failure, Millis, Refused, Status, Tenant};
use crate::exec::{End, Session};
use crate::instances::instance::{self, Instance, InstanceId};
use crate::secrets::Sealed;

/// The store's file in the data directory.
pub const FILE_NAME: &str = "kiln.db";

/// Two readers keep lists, events and token checks apart; more only cost memory.
const READERS: u32 = 2;
/// Page cache of the writer in KiB (negative by SQLite's convention). The default is 2 MiB each.
const CACHE_SIZE: &str = "-512";
/// Of a reader: the index by id of some 20,000 builds stays in it.
const READER_CACHE_SIZE: &str = "-1024";
/// Statements that a connection keeps prepared; there are about twenty.
const STATEMENTS: usize = 32;
/// How long a write waits for another process's.
const BUSY: Duration = Duration::from_secs(10);
/// How long a call waits for a connection.
const ACQUIRE: Duration = Duration::from_secs(15);

/// A store in one SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    readers: SqlitePool,
    writer: Writer,
}

impl SqliteStore {
    /// Opens the store in a data directory, made where it is missing, and brings its tables up to
    /// date.
    pub async fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let file = data_dir.join(FILE_NAME);
        let made = tokio::task::spawn_blocking({
            let file = file.clone();
            move || make_private(&file)
        });
        made.await.map_err(failed("open its file"))?.map_err(failed("open its file"))?;

        let options = SqliteConnectOptions::new()
            .filename(&file)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            // Lets free pages go back to the file system without the file's being rewritten (`shrink`).
            .auto_vacuum(SqliteAutoVacuum::Incremental)
            .foreign_keys(true)
            .busy_timeout(BUSY)
            .statement_cache_capacity(STATEMENTS)
            // Each time that it is full costs two switches between threads: a page of the log has up to 128 rows.
            .row_buffer_size(32)
            .pragma("cache_size", CACHE_SIZE)
            // What is deleted is overwritten: a build's own secrets, sealed as they are, do not stay in free pages.
            .pragma("secure_delete", "ON")
            .pragma("journal_size_limit", "16777216");
        let mut connection = options.connect().await.map_err(failed("open its file"))?;
        let migrated = migrator().run(&mut connection).await;
        migrated.map_err(failed("bring its tables up to date"))?;
        let writer = Writer::new(connection, options.clone());
        let readers = SqlitePoolOptions::new()
            // A file in this machine does not go away between two questions.
            .test_before_acquire(false)
            .max_connections(READERS)
            .max_lifetime(None)
            .acquire_timeout(ACQUIRE)
            .connect_lazy_with(
                options.pragma("query_only", "true").pragma("cache_size", READER_CACHE_SIZE),
            );
        Ok(Self { readers, writer })
    }

    /// Closes every connection; what was written is in the file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// Begins what is to be stored as a whole.
    async fn write(&self, operation: &'static str) -> Result<Write, StoreError> {
        self.writer.begin(operation).await
    }
}

/// The migrations, in the program. A published one is never edited.
fn migrator() -> Migrator {
    let all = [
        ("builds", include_str!("../../migrations/sqlite/0001_builds.sql")),
        ("active builds", include_str!("../../migrations/sqlite/0002_active_builds.sql")),
        ("provenance", include_str!("../../migrations/sqlite/0003_provenance.sql")),
        ("instances", include_str!("../../migrations/sqlite/0004_instances.sql")),
        ("secrets", include_str!("../../migrations/sqlite/0005_secrets.sql")),
        ("sessions", include_str!("../../migrations/sqlite/0006_sessions.sql")),
        ("reached", include_str!("../../migrations/sqlite/0007_reached.sql")),
        ("turns", include_str!("../../migrations/sqlite/0008_turns.sql")),
        ("token use", include_str!("../../migrations/sqlite/0009_token_use.sql")),
        ("memory", include_str!("../../migrations/sqlite/0010_memory.sql")),
        ("retention", include_str!("../../migrations/sqlite/0011_retention.sql")),
        ("lists", include_str!("../../migrations/sqlite/0012_lists.sql")),
        ("priority", include_str!("../../migrations/sqlite/0013_priority.sql")),
        ("leases", include_str!("../../migrations/sqlite/0014_leases.sql")),
    ];
    let migration = |(number, (name, text)): (i64, (&'static str, &'static str))| {
        Migration::new(number, name.into(), MigrationType::Simple, text.into_sql_str(), false)
    };
    Migrator::with_migrations((1..).zip(all).map(migration).collect())
}

/// Makes the file before SQLite does, so that only its owner reads it: it holds Dockerfiles and
/// logs. SQLite gives its WAL the same mode.
fn make_private(file: &PathBuf) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(dir) = file.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(file)?.sync_all()?;
        std::fs::File::open(dir)?.sync_all()?;
    }
    Ok(())
}

/// Turns a cause into the store's error.
fn failed<E>(operation: &'static str) -> impl FnOnce(E) -> StoreError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |source| {
        let source = source.into();
        StoreError::Database { operation, disk: disk::trouble(source.as_ref()), source }
    }
}

/// A row that this program cannot have written.
#[derive(Debug, thiserror::Error)]
#[error("column {column} holds {text:?}, which is not what it should")]
struct BadColumn {
    column: &'static str,
    text: String,
}

/// Whether a claim may still write. The end comes first: a driver that lost a race with it is told
/// of the end, and not only that it lost.
fn check_claim(build: &Build, current: Fence, shown: Fence) -> Result<(), StoreError> {
    if build.status.is_final() {
        Err(Refused::Final(build.status).into())
    } else if current == shown {
        Ok(())
    } else {
        Err(StoreError::Fenced)
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn insert_build(
        &self,
        build: &Build,
        events: &[NewEvent],
        key: Option<&IdempotencyKey>,
        own: &[(SecretId, Sealed)],
    ) -> Result<(), StoreError> {
        let mut tx = self.write("store a build").await?;
        builds::insert(&mut tx, build).await?;
        if let Some(key) = key {
            builds::insert_key(&mut tx, build, key).await?;
        }
        secrets::insert_own(&mut tx, &build.id, own).await?;
        events::append(&mut tx, &build.id, build.attempt, events).await?;
        tx.commit().await
    }

    async fn build_by_key(
        &self,
        tenant: &Tenant,
        key: &str,
    ) -> Result<Option<(BuildId, String)>, StoreError> {
        builds::by_key(&self.readers, tenant, key).await
    }

    async fn build(&self, id: &BuildId) -> Result<Option<Build>, StoreError> {
        builds::get(&self.readers, id).await
    }

    async fn builds(&self, filter: &Filter) -> Result<Vec<Build>, StoreError> {
        builds::list(&self.readers, filter).await
    }

    async fn queue_position(&self, id: &BuildId) -> Result<Option<u32>, StoreError> {
        line::queue_position(&self.readers, id).await
    }

    async fn queued_count(&self, tenant: &Tenant) -> Result<u32, StoreError> {
        builds::queued_count(&self.readers, tenant).await
    }

    async fn unfinished(&self) -> Result<Unfinished, StoreError> {
        unfinished::count(&self.readers).await
    }

    async fn next_queued(&self) -> Result<Option<Next>, StoreError> {
        line::next(&self.readers).await
    }

    async fn claim_within(
        &self,
        owner: &str,
        now: Millis,
        events: &[NewEvent],
        most_mb: u32,
    ) -> Result<Option<Claimed>, StoreError> {
        let mut tx = self.write("claim a build").await?;
        let claimed = claims::claim(&mut tx, owner, now, most_mb).await?;
        let Some((claimed, highest)) = claimed else { return Ok(None) };
        let Build { id, attempt, .. } = &claimed.build;
        events::append_after(&mut tx, id, *attempt, highest, events).await?;
        tx.commit().await?;
        Ok(Some(claimed))
    }

    async fn change(
        &self,
        id: &BuildId,
        fence: Fence,
        change: Change,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Build, StoreError> {
        let mut tx = self.write("change a build").await?;
        let (before, current, highest) = claims::load_to_tell(&mut tx, id).await?;
        check_claim(&before, current, fence)?;
        let next = before.apply(change, now)?;
        claims::save(&mut tx, &next, fence).await?;
        events::append_after(&mut tx, id, next.attempt, highest, events).await?;
        secrets::forget_own(&mut tx, &next).await?;
        retention::ended(&mut tx, &next).await?;
        tx.commit().await?;
        Ok(next)
    }

    async fn annotate(&self, build: &Build, fence: Fence) -> Result<(), StoreError> {
        let mut tx = self.write("annotate a build").await?;
        let (before, current) = claims::load(&mut tx, &build.id).await?;
        check_claim(&before, current, fence)?;
        let next = Build {
            usage: build.usage,
            pulled: build.pulled.clone(),
            reached: build.reached.clone(),
            provenance: build.provenance.clone(),
            ..before
        };
        claims::save(&mut tx, &next, fence).await?;
        tx.commit().await
    }

    async fn cancel_queued(
        &self,
        id: &BuildId,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Build, StoreError> {
        let mut tx = self.write("cancel a build").await?;
        let (before, fence) = claims::load(&mut tx, id).await?;
        let next = before.apply(Change::Cancel, now)?;
        if before.status != Status::Queued {
            return Err(Refused::From(before.status).into());
        }
        claims::save(&mut tx, &next, fence).await?;
        events::append(&mut tx, id, next.attempt, events).await?;
        secrets::forget_own(&mut tx, &next).await?;
        retention::ended(&mut tx, &next).await?;
        tx.commit().await?;
        Ok(next)
    }

    async fn expire_queued(
        &self,
        before: Millis,
        at_most: u32,
        failure: &Failure,
        now: Millis,
        events: &[NewEvent],
    ) -> Result<Vec<BuildId>, StoreError> {
        // Looked at without the write lock: nearly always there is none.
        let found = builds::queued_before(&self.readers, before, at_most).await?;
        let mut expired = Vec::with_capacity(found.len());
        for id in found {
            let mut tx = self.write("end a queued build").await?;
            let (build, fence) = claims::load(&mut tx, &id).await?;
            if build.status != Status::Queued {
                continue;
            }
            let next = build.apply(Change::Fail(failure.clone()), now)?;
            claims::save(&mut tx, &next, fence).await?;
            events::append(&mut tx, &id, next.attempt, events).await?;
            secrets::forget_own(&mut tx, &next).await?;
            retention::ended(&mut tx, &next).await?;
            tx.commit().await?;
            expired.push(id);
        }
        Ok(expired)
    }

    async fn renew(&self, id: &BuildId, fence: Fence, now: Millis) -> Result<(), StoreError> {
        let mut tx = self.write("renew a claim").await?;
        if !claims::renew(&mut tx, id, fence, now).await? {
            let (build, current) = claims::load(&mut tx, id).await?;
            check_claim(&build, current, fence)?;
            return Err(StoreError::Fenced);
        }
        tx.commit().await
    }

    async fn lapsed(&self, now: Millis) -> Result<Vec<BuildId>, StoreError> {
        claims::lapsed(&self.readers, now).await
    }

    async fn take_over(
        &self,
        id: &BuildId,
        owner: &str,
        now: Millis,
    ) -> Result<Option<Claimed>, StoreError> {
        let mut tx = self.write("take over a build").await?;
        let claimed = claims::take_over(&mut tx, id, owner, now).await?;
        tx.commit().await?;
        Ok(claimed)
    }

    async fn reclaim(&self, owner: &str, now: Millis) -> Result<Vec<Claimed>, StoreError> {
        let mut tx = self.write("take over builds").await?;
        let claimed = claims::reclaim(&mut tx, owner, now).await?;
        tx.commit().await?;
        Ok(claimed)
    }

    async fn append_events(&self, id: &BuildId, events: &[NewEvent]) -> Result<u64, StoreError> {
        let mut tx = self.write("store events").await?;
        let (status, attempt) = claims::status(&mut tx, id).await?;
        if status.is_final() {
            return Err(Refused::Final(status).into());
        }
        let highest = events::append(&mut tx, id, attempt, events).await?;
        tx.commit().await?;
        Ok(highest)
    }

    async fn events_after(
        &self,
        id: &BuildId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<StoredEvent>, StoreError> {
        events::after(&self.readers, id, after, limit).await
    }

    async fn log_bytes(&self) -> Result<u64, StoreError> {
        retention::log_bytes(&self.readers).await
    }

    async fn finished_logs(&self, at_most: u32) -> Result<Vec<FinishedLog>, StoreError> {
        retention::finished_logs(&self.readers, at_most).await
    }

    async fn trim_log(&self, id: &BuildId, after: u64, at_most: u32) -> Result<Piece, StoreError> {
        let mut tx = self.write("remove a log").await?;
        let piece = retention::trim(&mut tx, id, after, at_most).await?;
        tx.commit().await?;
        Ok(piece)
    }

    async fn finished_builds(
        &self,
        before: Millis,
        at_most: u32,
    ) -> Result<Vec<BuildId>, StoreError> {
        retention::finished_builds(&self.readers, before, at_most).await
    }

    async fn remove_build(&self, id: &BuildId, at_most: u32) -> Result<bool, StoreError> {
        let mut tx = self.write("remove a build").await?;
        let gone = retention::remove(&mut tx, id, at_most).await?;
        tx.commit().await?;
        Ok(gone)
    }

    async fn shrink(&self) -> Result<bool, StoreError> {
        let mut tx = self.write("give back free pages").await?;
        let done = retention::shrink(&mut tx).await?;
        tx.commit().await?;
        Ok(done)
    }

    async fn put_secret(
        &self,
        tenant: &Tenant,
        id: &SecretId,
        sealed: &Sealed,
        now: Millis,
        at_most: u32,
    ) -> Result<(), StoreError> {
        let mut tx = self.write("store a secret").await?;
        secrets::put(&mut tx, tenant, id, sealed, now, at_most).await?;
        tx.commit().await
    }

    async fn secret(&self, tenant: &Tenant, id: &SecretId) -> Result<Option<Sealed>, StoreError> {
        secrets::one(&self.readers, tenant, id).await
    }

    async fn secrets(&self, tenant: &Tenant) -> Result<Vec<SecretRecord>, StoreError> {
        secrets::all(&self.readers, tenant).await
    }

    async fn delete_secret(&self, tenant: &Tenant, id: &SecretId) -> Result<(), StoreError> {
        let mut tx = self.write("remove a secret").await?;
        secrets::delete(&mut tx, tenant, id).await?;
        tx.commit().await
    }

    async fn build_secret(
        &self,
        build: &BuildId,
        id: &SecretId,
    ) -> Result<Option<Sealed>, StoreError> {
        secrets::own(&self.readers, build, id).await
    }

    async fn insert_instance(&self, instance: &Instance, at_most: u32) -> Result<(), StoreError> {
        let mut tx = self.write("store an instance").await?;
        if instances::count(&mut tx, &instance.tenant).await? >= i64::from(at_most) {
            return Err(StoreError::TooMany { what: "instances", limit: at_most });
        }
        instances::insert(&mut tx, instance).await?;
        tx.commit().await
    }

    async fn instance(&self, id: &InstanceId) -> Result<Option<Instance>, StoreError> {
        instances::one(&self.readers, id).await
    }

    async fn instances(&self, tenant: Option<&Tenant>) -> Result<Vec<Instance>, StoreError> {
        instances::all(&self.readers, tenant).await
    }

    async fn change_instance(
        &self,
        id: &InstanceId,
        change: instance::Change,
        now: Millis,
    ) -> Result<Instance, StoreError> {
        let mut tx = self.write("change an instance").await?;
        let next = instances::locked(&mut tx, id).await?.apply(change, now)?;
        instances::save(&mut tx, &next).await?;
        tx.commit().await?;
        Ok(next)
    }

    async fn delete_instance(&self, id: &InstanceId) -> Result<(), StoreError> {
        let mut tx = self.write("delete an instance").await?;
        instances::delete(&mut tx, id).await?;
        tx.commit().await
    }

    async fn insert_session(&self, session: &Session) -> Result<(), StoreError> {
        let mut tx = self.write("store a session").await?;
        sessions::insert(&mut tx, session).await?;
        tx.commit().await
    }

    async fn mark_entered(&self, build: &BuildId) -> Result<(), StoreError> {
        let mut tx = self.write("mark a build").await?;
        sessions::mark_entered(&mut tx, build).await?;
        tx.commit().await
    }

    async fn end_session(&self, id: &str, end: &End) -> Result<(), StoreError> {
        let mut tx = self.write("end a session").await?;
        sessions::end(&mut tx, id, end).await?;
        tx.commit().await
    }

    async fn end_open_sessions(&self, now: Millis) -> Result<u64, StoreError> {
        let mut tx = self.write("end the sessions of an earlier server").await?;
        let done = sessions::end_open(&mut tx, now).await?;
        tx.commit().await?;
        Ok(done)
    }

    async fn forget_sessions(&self, before: Millis, at_most: u32) -> Result<u64, StoreError> {
        let mut tx = self.write("forget old sessions").await?;
        let done = sessions::forget(&mut tx, before, at_most).await?;
        tx.commit().await?;
        Ok(done)
    }

    async fn sessions(&self, filter: &SessionFilter) -> Result<Vec<Session>, StoreError> {
        sessions::list(&self.readers, filter).await
    }

    async fn insert_token(&self, token: &TokenRecord) -> Result<(), StoreError> {
        let mut tx = self.write("store a token").await?;
        tokens::insert(&mut tx, token).await?;
        tx.commit().await
    }

    async fn token_by_hash(&self, hash: &str) -> Result<Option<TokenRecord>, StoreError> {
        tokens::by_hash(&self.readers, hash).await
    }

    async fn token(&self, id: &str) -> Result<Option<TokenRecord>, StoreError> {
        tokens::one(&self.readers, id).await
    }

    async fn tokens(&self) -> Result<Vec<TokenRecord>, StoreError> {
        tokens::all(&self.readers).await
    }

    async fn revoke_token(&self, id: &str) -> Result<(), StoreError> {
        let mut tx = self.write("revoke a token").await?;
        tokens::revoke(&mut tx, id).await?;
        tx.commit().await
    }

    async fn tokens_used(&self, uses: &[(String, Millis)]) -> Result<(), StoreError> {
        let mut tx = self.write("store when tokens were used").await?;
        tokens::used(&mut tx, uses).await?;
        tx.commit().await
    }

    async fn ready(&self) -> Result<(), StoreError> {
        // Takes the write lock and gives it back: a full disk shows at the first page written, but
        // a lock that is stuck, a file that is gone or read-only shows here.
        drop(self.write("begin a write").await?);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use sqlx::Row;

    use super::*;

    #[tokio::test]
    async fn what_is_forgotten_is_not_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        let (tenant, id) = (Tenant::new("a").unwrap(), SecretId::new("key").unwrap());
        // More than a page: it has pages of its own, which are free afterwards.
        let sealed = Sealed(b"sealed!".repeat(2000));
        store.put_secret(&tenant, &id, &sealed, 1, 10).await.unwrap();
        store.close().await;
        let holds = || {
            let file = std::fs::read(dir.path().join(FILE_NAME)).unwrap();
            file.windows(7).filter(|window| *window == b"sealed!").count()
        };
        assert!(holds() > 1900, "it was never there");
        let store = SqliteStore::open(dir.path()).await.unwrap();
        store.delete_secret(&tenant, &id).await.unwrap();
        store.close().await;
        assert_eq!(holds(), 0);
    }

    fn lines(bytes: usize) -> NewEvent {
        let payload = serde_json::json!({ "type": "log", "content": "x".repeat(bytes) });
        NewEvent { at: 1, agent_seq: None, payload }
    }

    async fn finished(store: &SqliteStore, events: &[NewEvent]) -> BuildId {
        let build = crate::build::tests::queued();
        store.insert_build(&build, events, None, &[]).await.unwrap();
        store.cancel_queued(&build.id, 5, &[]).await.unwrap();
        build.id
    }

    #[tokio::test]
    async fn the_file_shrinks_when_logs_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        let all: Vec<_> = std::iter::repeat_n(lines(16 * 1024), 640).collect();
        let id = finished(&store, &all).await;
        let size = async || {
            let truncate = "PRAGMA wal_checkpoint(TRUNCATE)";
            sqlx::query(truncate).execute(&mut *store.writer.bare().await).await.unwrap();
            dir.path().join(FILE_NAME).metadata().unwrap().len()
        };
        let before = size().await;
        assert!(before > 10 * 1024 * 1024, "{before}");
        assert!(!store.shrink().await.unwrap(), "nothing is free");
        let mut after = 0;
        while let Some(next) = store.trim_log(&id, after, 1000).await.unwrap().next {
            after = next;
        }
        assert!(store.shrink().await.unwrap(), "not all at one time");
        while store.shrink().await.unwrap() {}
        let after = size().await;
        assert!(after < 1024 * 1024, "{after}");
    }

    #[tokio::test]
    async fn logs_of_before_are_measured_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        let other = NewEvent { payload: serde_json::json!({ "type": "step" }), ..lines(0) };
        let id = finished(&store, &[lines(100), other, lines(7)]).await;
        let measured = store.log_bytes().await.unwrap();
        assert_eq!(measured, lines(107).payload.to_string().len() as u64 * 2 - 107);
        for undo in [
            "DROP TABLE build_logs",
            "DROP INDEX builds_finished",
            "DELETE FROM _sqlx_migrations WHERE version = 11",
        ] {
            sqlx::query(undo).execute(&mut *store.writer.bare().await).await.unwrap();
        }
        store.close().await;
        let store = SqliteStore::open(dir.path()).await.unwrap();
        assert_eq!(store.log_bytes().await.unwrap(), measured);
        let logs = store.finished_logs(9).await.unwrap();
        assert_eq!(logs, [FinishedLog { id, completed_at: 5 }]);
    }

    /// A page of a tenant's builds costs by the page.
    #[tokio::test]
    async fn lists_are_read_by_their_own_indexes() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        let all = Filter { limit: 9, tenant: Tenant::new("a").ok(), ..Filter::default() };
        let of = |status| Filter { status: Some(status), ..all.clone() };
        let tags = [("a".to_owned(), "b".to_owned()), ("c".to_owned(), "d".to_owned())].into();
        let tagged = Filter { tags, ..of(Status::Failed) };
        for (filter, by) in [
            (all.clone(), "SEARCH b USING INDEX builds_of_tenant (tenant=?)"),
            (
                of(Status::Ready),
                "SEARCH b USING INDEX builds_finished_of_tenant (tenant=? AND status=?)",
            ),
            (
                of(Status::Queued),
                "SEARCH b USING INDEX builds_queued_of_tenant (tenant=? AND status=?)",
            ),
            (of(Status::Building), "SEARCH b USING INDEX builds_claimed (tenant=? AND status=?)"),
            (
                tagged,
                "SEARCH g USING COVERING INDEX build_tags_of_tenant (tenant=? AND name=? AND content=?)",
            ),
        ] {
            for before in [None, BuildId::new("b1").ok()] {
                let listing = builds::listing(&Filter { before: before.clone(), ..filter.clone() });
                let explain =
                    sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {}", listing.sql().as_str()));
                let mut db = store.writer.bare().await;
                let rows = sqlx::query(explain).fetch_all(&mut *db).await.unwrap();
                let plan: Vec<String> = rows.iter().map(|row| row.get("detail")).collect();
                // With a cursor it goes on from there.
                let from = by.strip_suffix(')').unwrap();
                assert!(plan.iter().any(|line| line.starts_with(from)), "{by}: {plan:#?}");
                let sorts = plan.iter().any(|line| line.contains("ORDER BY"));
                assert!(!sorts || filter.status == Some(Status::Building), "{plan:#?}");
            }
        }
    }

    /// What is done all the time costs by what is active, not by all that ever was.
    #[tokio::test]
    async fn queue_and_audit_log_are_read_by_their_own_indexes() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        // Indexes of all builds that ever were: to look something up in, never to be read from end to end.
        let of_all =
            ["builds_newest", "builds_of_tenant", "builds_turns", "builds_turns_of_tenant"];
        for (statement, indexes) in [
            (
                line::CLAIM,
                &[
                    "builds_queued_of_tenant",
                    "builds_claimed",
                    "builds_turns",
                    "builds_turns_of_tenant",
                ][..],
            ),
            (line::NEXT, &["builds_queued_of_tenant", "builds_claimed", "builds_turns_of_tenant"]),
            (line::LINE, &["builds_queued_of_tenant", "builds_claimed", "builds_turns_of_tenant"]),
            (claims::RECLAIM, &["builds_claimed"]),
            (builds::QUEUED_COUNT, &["builds_line_of_tenant"]),
            (builds::QUEUED_BEFORE, &["builds_queued"]),
            (sessions::FORGET, &["sessions_newest"]),
            (retention::LOG_BYTES, &["build_logs_finished"]),
            (retention::FINISHED_LOGS, &["build_logs_finished"]),
            (retention::FINISHED_BUILDS, &["builds_finished"]),
            (unfinished::QUEUED, &["builds_queued"]),
            (unfinished::CLAIMED, &["builds_claimed"]),
        ] {
            let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
            let mut db = store.writer.bare().await;
            let rows = sqlx::query(explain).fetch_all(&mut *db).await.unwrap();
            let plan: Vec<String> = rows.iter().map(|row| row.get("detail")).collect();
            for index in indexes {
                let by = |plan: &String| plan.split_whitespace().any(|word| word == *index);
                assert!(plan.iter().any(by), "{index}, {statement}: {plan:#?}");
            }
            // Of all that a tenant ever had only the last is looked at.
            let last = |plan: &&String| plan.contains("_turns") && !plan.starts_with("SEARCH t ");
            let others: Vec<_> = plan.iter().filter(last).collect();
            let of_claim = |plan: &&String| plan.starts_with("SEARCH l ");
            assert!(others.iter().all(of_claim), "{statement}: {plan:#?}");
            let whole = |plan: &String| {
                let words: Vec<_> = plan.split_whitespace().collect();
                // The tenants that wait are rows of the statement's own.
                let own = matches!(words.get(1), Some(&("waiting" | "w" | "CONSTANT")));
                let by_index =
                    plan.contains("INDEX") && !of_all.iter().any(|all| words.contains(all));
                words[0] == "SCAN" && !own && !by_index
            };
            assert!(!plan.iter().any(whole), "{statement}: {plan:#?}");
        }
    }
}
