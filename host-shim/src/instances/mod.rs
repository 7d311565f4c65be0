//! Instances: images that run, each in a microVM of its own.
//!
//! ```text
//! api ─▶ Instances ─ insert ─▶ store          one task owns one instance (Owner)
//!            │ launch                              │
//!            └────────────▶ task ─▶ Runner ────────┤ changes ─▶ store, watch ─▶ readers of its log
//!                              (machine: room ─▶ pull ─▶ disk ─▶ VM ─▶ session)   └ lines ─▶ log file
//! ```
//! An instance does not outlive its server: the next one ends what was left ([`Instances::recover`]).
//!
//! [`mod@reference`], [`launch`] and [`instance`] are pure.
//!
//! **Invariant**: what was made for an instance is gone when it is deleted: its VM, its directory (log, layout,
//! disk), its row.

pub mod disk;
pub mod instance;
pub mod launch;
pub mod log;
mod machine;
mod owner;
mod places;
pub mod pull;
pub mod quota;
pub mod reference;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use kiln_protocol::run::RunJob;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::instance::{Change, End, Instance, InstanceId, State};
use self::log::{Reader, Seen};
pub use self::machine::Machines;
pub use self::owner::{Owner, PrintError};
pub use self::places::Places;
use self::pull::Resolved;
use self::quota::{Held, Quota};
use crate::exec::{Door, Entrance};
use crate::metrics::Metrics;
use crate::store::{Store, StoreError};

/// An instance's log, in its directory.
const LOG: &str = "log";

/// Instances of one tenant, stopped ones too: each keeps its log until it is deleted.
const MAX_OF_TENANT: u32 = 100;

/// What an instance's task does with it.
#[derive(Clone, Debug)]
pub struct Work {
    /// What to run.
    pub image: Resolved,
    /// How.
    pub job: RunJob,
}

/// Runs instances. It tells the owner what happens, and stops when the owner is cancelled.
#[async_trait]
pub trait Runner: Send + Sync + 'static {
    /// From `Created` to its end.
    async fn run(&self, owner: &mut Owner, work: Work) -> End;
}

/// Why an instance cannot be had, or not be changed.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// The store failed, or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server takes no more.
    #[error("the server is being stopped")]
    Stopping,
    /// Its files failed.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The instances of a server. Cheap to clone.
#[derive(Clone)]
pub struct Instances {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    runner: Arc<dyn Runner>,
    /// One directory for each instance.
    dir: PathBuf,
    quota: Quota,
    metrics: Metrics,
    live: Mutex<HashMap<InstanceId, Live>>,
    /// What the logs of stopped instances take.
    kept: Mutex<HashMap<InstanceId, Held>>,
    tasks: TaskTracker,
    /// Nothing is begun any more; what runs goes on.
    closed: AtomicBool,
    /// The server ends: every instance is cancelled with it.
    stop: CancellationToken,
}

/// An instance that has an owner.
#[derive(Clone)]
struct Live {
    cancel: CancellationToken,
    /// Closed when the owner is done.
    changes: watch::Receiver<Seen>,
    /// Into its VM.
    door: Door,
}

impl Instances {
    /// Over a store and a directory. Logs count in the quota until their instance is deleted.
    pub fn new(
        store: Arc<dyn Store>,
        runner: Arc<dyn Runner>,
        dir: PathBuf,
        quota: Quota,
        metrics: Metrics,
    ) -> Self {
        let inner = Inner {
            store,
            runner,
            dir,
            quota,
            metrics,
            live: Mutex::default(),
            kept: Mutex::default(),
            tasks: TaskTracker::new(),
            closed: AtomicBool::new(false),
            stop: CancellationToken::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// From now on none is begun. Those that run go on.
    pub fn close(&self) {
        self.inner.closed.store(true, Ordering::Relaxed);
    }

    /// Refuses where none is begun any more.
    pub fn check_open(&self) -> Result<(), InstanceError> {
        let closed = self.inner.closed.load(Ordering::Relaxed);
        if closed { Err(InstanceError::Stopping) } else { Ok(()) }
    }

    /// Stores a new instance and begins to run it.
    pub async fn create(&self, instance: Instance, work: Work) -> Result<(), InstanceError> {
        self.check_open()?;
        let dir = self.dir(&instance.id);
        make_private(&dir).await.map_err(failed("make the directory", &dir))?;
        let created = self.begin(instance, work, &dir).await;
        if created.is_err() {
            remove(&dir).await.map_err(failed("remove the directory", &dir))?;
        }
        created
    }

    async fn begin(&self, instance: Instance, work: Work, dir: &Path) -> Result<(), InstanceError> {
        let inner = &self.inner;
        let path = dir.join(LOG);
        let log = log::Writer::create(&path).await.map_err(failed("make", &path))?;
        let id = instance.id.clone();
        let (seen, changes) = watch::channel(Seen { bytes: 0, instance: instance.clone() });
        let cancel = inner.stop.child_token();
        // Before it is known to anybody, so that whoever knows it finds its owner.
        let door = Door::default();
        let live = Live { cancel: cancel.clone(), changes, door: door.clone() };
        inner.live().insert(id.clone(), live);
        if let Err(error) = inner.store.insert_instance(&instance, MAX_OF_TENANT).await {
            inner.live().remove(&id);
            return Err(error.into());
        }
        let log = (log, inner.quota.hold(&instance.tenant));
        let host = (Arc::clone(&inner.store), inner.metrics.clone());
        let mut owner = Owner::new(instance, host, dir.to_owned(), log, seen, cancel, door);
        let this = self.clone();
        inner.tasks.spawn(async move {
            let end = this.inner.runner.run(&mut owner, work).await;
            let stopping = this.inner.stop.is_cancelled();
            this.inner.metrics.instance_ended(&end, owner.cancel().is_cancelled());
            let end = if stopping { end.with_the_server() } else { end };
            let (log, seen) = owner.end(end).await;
            this.inner.kept().insert(id.clone(), log);
            this.inner.live().remove(&id);
            // Whoever deletes it waits for this.
            drop(seen);
        });
        Ok(())
    }

    /// Stops an instance, if it runs, and removes all of it. Goes on to the end whoever waits.
    pub async fn delete(&self, id: &InstanceId) -> Result<(), InstanceError> {
        let live = self.inner.live().get(id).cloned();
        if let Some(Live { cancel, mut changes, door: _ }) = live {
            cancel.cancel();
            while changes.changed().await.is_ok() {}
        }
        let dir = self.dir(id);
        remove(&dir).await.map_err(failed("remove the directory", &dir))?;
        self.inner.kept().remove(id);
        Ok(self.inner.store.delete_instance(id).await?)
    }

    /// How many there are, in the order of [`State::ALL`].
    pub fn counts(&self) -> [usize; State::ALL.len()] {
        let mut counts = [0; State::ALL.len()];
        let states: Vec<State> =
            self.inner.live().values().map(|live| live.changes.borrow().instance.state).collect();
        for (state, count) in State::ALL.into_iter().zip(&mut counts) {
            *count = match state {
                // Their logs are kept, and none is live.
                State::Stopped => self.inner.kept().len(),
                state => states.iter().filter(|of| **of == state).count(),
            };
        }
        counts
    }

    /// The way into an instance's VM, while it has one that can be entered.
    pub fn entrance(&self, id: &InstanceId) -> Option<Entrance> {
        self.inner.live().get(id)?.door.entrance()
    }

    /// Opens the log of an instance that there is.
    pub async fn read(
        &self,
        instance: Instance,
        from: log::From,
        follow: bool,
    ) -> Result<Reader, InstanceError> {
        let changes = self.inner.live().get(&instance.id).map(|live| live.changes.clone());
        let instance = match &changes {
            Some(changes) => changes.borrow().instance.clone(),
            // It may have ended since it was looked up.
            None => self.inner.store.instance(&instance.id).await?.unwrap_or(instance),
        };
        let path = self.dir(&instance.id).join(LOG);
        let reader = Reader::open(&path, instance, changes, from, follow).await;
        reader.map_err(failed("read", &path))
    }

    /// Ends what an earlier server left: instances that were not stopped, and directories that nobody owns. VMs
    /// were swept before. Counts the logs that are kept.
    pub async fn recover(&self) -> Result<(), InstanceError> {
        let end = End::failed("the host was restarted while the instance ran");
        let now = crate::clock::now();
        let instances = self.inner.store.instances(None).await?;
        for instance in instances.iter().filter(|instance| instance.state != State::Stopped) {
            tracing::info!(id = %instance.id, "ended an instance of an earlier server");
            self.inner.store.change_instance(&instance.id, Change::Stop(end.clone()), now).await?;
        }
        for instance in &instances {
            let path = self.dir(&instance.id).join(LOG);
            let bytes = match tokio::fs::metadata(&path).await {
                Ok(log) => log.len(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(failed("look at", &path)(source)),
            };
            let mut log = self.inner.quota.hold(&instance.tenant);
            log.found(bytes);
            self.inner.kept().insert(instance.id.clone(), log);
        }
        let dir = &self.inner.dir;
        let known = |name: &str| instances.iter().any(|instance| instance.id.as_str() == name);
        let mut entries = match tokio::fs::read_dir(dir).await {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(failed("read the directory", dir)(source)),
        };
        while let Some(entry) =
            entries.next_entry().await.map_err(failed("read the directory", dir))?
        {
            let path = entry.path();
            let removed = if entry.file_name().to_str().is_some_and(known) {
                // Of a known one only its log is kept.
                owner::remove_all_but_log(&path).await
            } else {
                remove(&path).await
            };
            removed.map_err(failed("remove the directory", &path))?;
        }
        Ok(())
    }

    /// Waits for `stop`, then ends every instance. The runner hurries when it is told to on its own.
    pub async fn run(self, stop: CancellationToken) {
        stop.cancelled().await;
        self.close();
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn dir(&self, id: &InstanceId) -> PathBuf {
        self.inner.dir.join(id.as_str())
    }
}

impl Inner {
    fn kept(&self) -> MutexGuard<'_, HashMap<InstanceId, Held>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> MutexGuard<'_, HashMap<InstanceId, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn make_private(dir: &Path) -> io::Result<()> {
    tokio::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).await
}

async fn remove(dir: &Path) -> io::Result<()> {
    match tokio::fs::remove_dir_all(dir).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstanceError + use<> {
    let path = path.to_owned();
    move |source| InstanceError::Io { operation, path, source }
}
