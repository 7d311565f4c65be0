//! The connection that writes. Writers take turns, and those who wait at one time share one commit: one wait for the disk.
//!
//! ```text
//! first   BEGIN ─▶ its statements ─▶ nobody waits: COMMIT ─▶ it is told
//!                                 └▶ somebody waits: a committer joins their queue ─────────┐
//! second  SAVEPOINT ─▶ its statements ─▶ RELEASE                                             │
//!    ⋮    (all who came before the committer)                                                ▼
//!                                                                  COMMIT ─▶ all of them are told
//! ```
//!
//! **Invariant**: who is told `Ok` is on the disk. Who fails, or is dropped half-way, takes back what is its own; where SQLite took back
//! more, everybody whose it was is told so.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, SqliteConnection};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, OwnedMappedMutexGuard, OwnedMutexGuard, oneshot};

use super::{ACQUIRE, failed};
use crate::store::StoreError;

/// Everybody's one connection that writes. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    /// `None` once it is closed. Its queue is first come, first served, on which the committer's place depends.
    state: Arc<Mutex<Option<State>>>,
    /// How many wait for it.
    waiting: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct State {
    connection: SqliteConnection,
    options: SqliteConnectOptions,
    /// Those whose statements are in the open transaction: they wait for its commit.
    members: Vec<oneshot::Sender<Result<(), Arc<sqlx::Error>>>>,
    /// Somebody left without an end; what it did is to be taken back.
    left: bool,
}

type Turn = OwnedMappedMutexGuard<Option<State>, State>;

impl Writer {
    /// Over a connection, which is opened anew with these options should it break down.
    pub(super) fn new(connection: SqliteConnection, options: SqliteConnectOptions) -> Self {
        let state = State { connection, options, members: vec![], left: false };
        Self { state: Arc::new(Mutex::new(Some(state))), waiting: Arc::default() }
    }

    /// A transaction that holds the write lock from its start, so that it never has to give up half-way because another
    /// process wrote after it had read.
    pub(super) async fn begin(&self, operation: &'static str) -> Result<Write, StoreError> {
        let turn = self.turn(operation).await?;
        let shared = !turn.members.is_empty();
        let start = Write::start(turn, self.clone(), operation);
        if !shared {
            return start.await;
        }
        // The transaction is others' too: nobody who goes away may leave it half-way between two savepoints.
        tokio::spawn(start).await.map_err(failed(operation))?
    }

    /// Closes it, after what was begun.
    pub(super) async fn close(&self) {
        let Some(mut state) = self.state.lock().await.take() else { return };
        state.take_back().await;
        state.commit().await;
        // The file has everything already.
        let _ = state.connection.close().await;
    }

    async fn turn(&self, operation: &'static str) -> Result<Turn, StoreError> {
        let waits = Waits::new(&self.waiting);
        let turn = tokio::time::timeout(ACQUIRE, Arc::clone(&self.state).lock_owned());
        let turn = turn.await.map_err(failed(operation))?;
        drop(waits);
        OwnedMutexGuard::try_map(turn, Option::as_mut)
            .map_err(|_| failed(operation)("it is closed"))
    }

    /// Ends what is left when everybody had their turn who was there before.
    async fn settle(self) {
        let turn = Arc::clone(&self.state).lock_owned().await;
        if let Ok(mut turn) = OwnedMutexGuard::try_map(turn, Option::as_mut) {
            turn.take_back().await;
            turn.commit().await;
        }
    }

    /// The connection with no transaction.
    #[cfg(test)]
    #[allow(clippy::unwrap_used)]
    pub(super) async fn bare(&self) -> impl DerefMut<Target = SqliteConnection> {
        let mut turn = self.turn("look").await.unwrap();
        turn.take_back().await;
        turn.commit().await;
        OwnedMappedMutexGuard::map(turn, |state| &mut state.connection)
    }
}

impl State {
    /// Takes back what somebody did who left.
    async fn take_back(&mut self) {
        if !self.left {
            return;
        }
        if self.members.is_empty() {
            // It may be over already: a commit that nobody waited for, or SQLite took it back itself.
            let _ = execute(&mut self.connection, "ROLLBACK").await;
        } else {
            let taken = execute(&mut self.connection, "ROLLBACK TO member").await;
            let taken = match taken {
                Ok(()) => execute(&mut self.connection, "RELEASE member").await,
                Err(error) => Err(error),
            };
            if let Err(error) = taken {
                let _ = execute(&mut self.connection, "ROLLBACK").await;
                self.tell(Err(error));
            }
        }
        self.left = false;
    }

    /// Commits what waits for it.
    async fn commit(&mut self) {
        if self.members.is_empty() {
            return;
        }
        let committed = execute(&mut self.connection, "COMMIT").await;
        if committed.is_err() {
            let _ = execute(&mut self.connection, "ROLLBACK").await;
        }
        self.tell(committed);
    }

    fn tell(&mut self, result: Result<(), sqlx::Error>) {
        let result = result.map_err(Arc::new);
        for member in self.members.drain(..) {
            // Whoever does not wait any more does not want to know.
            let _ = member.send(result.clone());
        }
    }
}

async fn execute(
    connection: &mut SqliteConnection,
    statement: &'static str,
) -> Result<(), sqlx::Error> {
    sqlx::query(statement).execute(connection).await.map(|_| ())
}

/// Counts one who waits.
struct Waits<'w>(&'w AtomicUsize);

impl<'w> Waits<'w> {
    fn new(waiting: &'w AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::SeqCst);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A writer whose turn it is. What it did is taken back where it is dropped without [`commit`](Self::commit).
#[derive(Debug)]
pub(super) struct Write {
    turn: Turn,
    writer: Writer,
    operation: &'static str,
    /// Of those who share a commit.
    first: bool,
    ended: bool,
}

impl Write {
    async fn start(
        mut turn: Turn,
        writer: Writer,
        operation: &'static str,
    ) -> Result<Self, StoreError> {
        turn.take_back().await;
        let first = turn.members.is_empty();
        // From here on what happens is taken back unless it is committed.
        let mut write = Self { turn, writer, operation, first, ended: false };
        let statement = if first { "BEGIN IMMEDIATE" } else { "SAVEPOINT member" };
        let mut begun = write.execute(statement).await;
        if first && matches!(begun, Err(sqlx::Error::WorkerCrashed)) {
            let again = write.turn.options.connect().await;
            write.turn.connection = again.map_err(failed(operation))?;
            begun = write.execute(statement).await;
        }
        begun.map_err(failed(operation))?;
        Ok(write)
    }

    /// Returns once everything that was done is on the disk.
    pub(super) async fn commit(mut self) -> Result<(), StoreError> {
        let operation = self.operation;
        if !self.first {
            // As in `begin`.
            return tokio::spawn(self.share()).await.map_err(failed(operation))?;
        }
        if self.writer.waiting.load(Ordering::SeqCst) > 0 {
            return self.share().await;
        }
        self.execute("COMMIT").await.map_err(failed(operation))?;
        self.ended = true;
        Ok(())
    }

    /// Waits for the commit of all who share it.
    async fn share(mut self) -> Result<(), StoreError> {
        let operation = self.operation;
        if !self.first {
            self.execute("RELEASE member").await.map_err(failed(operation))?;
        }
        let (tell, told) = oneshot::channel();
        self.turn.members.push(tell);
        self.ended = true;
        if self.first {
            // In a task of its own, since any of those who wait may go away.
            tokio::spawn(self.writer.clone().settle());
        }
        drop(self);
        told.await.map_err(failed(operation))?.map_err(failed(operation))
    }

    async fn execute(&mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        execute(&mut self.turn.connection, statement).await
    }
}

impl Deref for Write {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.turn.connection
    }
}

impl DerefMut for Write {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.turn.connection
    }
}

impl Drop for Write {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.turn.left = true;
        // Soon, even where nobody writes after it: another process may want to. Without a runtime the next writer does it.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(self.writer.clone().settle());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use tokio::task::JoinSet;

    use super::*;

    /// A writer, and how many commits it has made.
    async fn writer(dir: &tempfile::TempDir) -> (Writer, Arc<AtomicUsize>) {
        let options = SqliteConnectOptions::new()
            .filename(dir.path().join("db"))
            .create_if_missing(true)
            .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal);
        let mut connection = options.connect().await.unwrap();
        execute(&mut connection, "CREATE TABLE IF NOT EXISTS numbers (n INTEGER)").await.unwrap();
        let commits = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&commits);
        connection.lock_handle().await.unwrap().set_commit_hook(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            true
        });
        (Writer::new(connection, options), commits)
    }

    async fn insert(write: &mut Write, n: u32) {
        let insert = sqlx::query("INSERT INTO numbers (n) VALUES ($1)").bind(n);
        insert.execute(&mut **write).await.unwrap();
    }

    async fn store(writer: Writer, n: u32) -> Result<(), StoreError> {
        let mut write = writer.begin("store").await?;
        insert(&mut write, n).await;
        write.commit().await
    }

    /// What the file has: read by another connection.
    async fn stored(dir: &tempfile::TempDir) -> Vec<u32> {
        let options = SqliteConnectOptions::new().filename(dir.path().join("db"));
        let mut db = options.connect().await.unwrap();
        sqlx::query_scalar("SELECT n FROM numbers ORDER BY n").fetch_all(&mut db).await.unwrap()
    }

    async fn waiting(writer: &Writer, how_many: usize) {
        while writer.waiting.load(Ordering::SeqCst) < how_many {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn those_who_wait_share_a_commit_and_one_alone_has_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, commits) = writer(&dir).await;
        store(writer.clone(), 0).await.unwrap();
        store(writer.clone(), 1).await.unwrap();
        assert_eq!(commits.load(Ordering::SeqCst), 2);
        let mut first = writer.begin("store").await.unwrap();
        insert(&mut first, 2).await;
        let mut others = JoinSet::new();
        for n in 3..20 {
            others.spawn(store(writer.clone(), n));
        }
        waiting(&writer, 17).await;
        first.commit().await.unwrap();
        while let Some(done) = others.join_next().await {
            done.unwrap().unwrap();
        }
        assert_eq!(commits.load(Ordering::SeqCst), 3);
        assert_eq!(stored(&dir).await, (0..20).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn nobody_is_told_before_the_commit() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, commits) = writer(&dir).await;
        let mut first = writer.begin("store").await.unwrap();
        insert(&mut first, 1).await;
        let second = tokio::spawn({
            let writer = writer.clone();
            async move {
                let mut write = writer.begin("store").await.unwrap();
                insert(&mut write, 2).await;
                write
            }
        });
        waiting(&writer, 1).await;
        let mut first = tokio::spawn(first.commit());
        let second = second.await.unwrap();
        // The second has its turn, so that the first cannot be on the disk.
        assert!(futures_util::poll!(&mut first).is_pending());
        assert_eq!((commits.load(Ordering::SeqCst), stored(&dir).await), (0, vec![]));
        second.commit().await.unwrap();
        first.await.unwrap().unwrap();
        assert_eq!((commits.load(Ordering::SeqCst), stored(&dir).await), (1, vec![1, 2]));
    }

    #[tokio::test]
    async fn one_who_leaves_takes_back_its_own_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, _) = writer(&dir).await;
        // Alone.
        let mut write = writer.begin("store").await.unwrap();
        insert(&mut write, 1).await;
        drop(write);
        // Among others.
        let mut first = writer.begin("store").await.unwrap();
        insert(&mut first, 3).await;
        let leaves = tokio::spawn({
            let writer = writer.clone();
            async move { insert(&mut writer.begin("store").await.unwrap(), 4).await }
        });
        waiting(&writer, 1).await;
        let last = tokio::spawn(store(writer.clone(), 5));
        waiting(&writer, 2).await;
        first.commit().await.unwrap();
        leaves.await.unwrap();
        last.await.unwrap().unwrap();
        assert_eq!(stored(&dir).await, [3, 5]);
    }

    #[tokio::test]
    async fn what_is_lost_with_another_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, _) = writer(&dir).await;
        let mut first = writer.begin("store").await.unwrap();
        insert(&mut first, 1).await;
        let breaks = tokio::spawn({
            let writer = writer.clone();
            async move {
                let mut write = writer.begin("store").await.unwrap();
                // As SQLite does by itself when the disk is full.
                execute(&mut write, "ROLLBACK").await.unwrap();
                write.commit().await
            }
        });
        waiting(&writer, 1).await;
        let last = tokio::spawn(store(writer.clone(), 2));
        waiting(&writer, 2).await;
        assert!(first.commit().await.is_err());
        assert!(breaks.await.unwrap().is_err());
        last.await.unwrap().unwrap();
        assert_eq!(stored(&dir).await, [2]);
    }

    #[tokio::test]
    async fn a_closed_one_has_written_what_it_took_and_takes_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, _) = writer(&dir).await;
        let mut first = writer.begin("store").await.unwrap();
        insert(&mut first, 1).await;
        let second = tokio::spawn(store(writer.clone(), 2));
        waiting(&writer, 1).await;
        let closing = tokio::spawn({
            let writer = writer.clone();
            async move { writer.close().await }
        });
        first.commit().await.unwrap();
        second.await.unwrap().unwrap();
        closing.await.unwrap();
        assert!(store(writer, 3).await.is_err());
        assert_eq!(stored(&dir).await, [1, 2]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_who_store_leave_or_are_stopped_at_any_moment() {
        for seed in 1..=5_u64 {
            let dir = tempfile::tempdir().unwrap();
            let (writer, commits) = writer(&dir).await;
            let mut tasks = vec![];
            let mut random = seed;
            for n in 0..300_u32 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let kind = random >> 61;
                let writer = writer.clone();
                let task = tokio::spawn(async move {
                    if kind == 0 {
                        insert(&mut writer.begin("store").await.unwrap(), n).await;
                        return false;
                    }
                    store(writer, n).await.unwrap();
                    true
                });
                if kind == 1 {
                    // Wherever it is.
                    tokio::task::yield_now().await;
                    task.abort();
                }
                tasks.push((n, kind, task));
            }
            let (mut told, mut unknown) = (BTreeSet::new(), BTreeSet::new());
            for (n, kind, task) in tasks {
                match task.await {
                    Ok(true) => assert!(told.insert(n)),
                    Ok(false) => {}
                    Err(error) => assert!(error.is_cancelled() && kind == 1 && unknown.insert(n)),
                }
            }
            let how_many = told.len();
            writer.close().await;
            let stored = stored(&dir).await;
            let set: BTreeSet<_> = stored.iter().copied().collect();
            assert_eq!(set.len(), stored.len(), "seed {seed}: twice");
            assert!(told.is_subset(&set), "seed {seed}: lost");
            let more: Vec<_> = set.difference(&told).filter(|n| !unknown.contains(n)).collect();
            assert!(more.is_empty(), "seed {seed}: {more:?} were taken back");
            assert!(
                commits.load(Ordering::SeqCst) < how_many,
                "seed {seed}: nobody shared a commit"
            );
        }
    }
}
