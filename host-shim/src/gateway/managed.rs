//! Debian's `docker-registry` as a supervised child: the backing registry unless the operator names
//! another.
//!
//! ```text
//! start ─▶ lock, sweep, write config ─▶ spawn ─▶ listens ─▶ (dies ─▶ backoff ─▶ spawn …) ─▶ stop: TERM, KILL
//! ```
//!
//! It listens on a Unix socket in a directory that only it and Kiln can enter. So no local user
//! reaches it around the gateway, no port can be taken by somebody else while it restarts, and no
//! password has to be checked at every request. As root Kiln gives it the identity of the package's
//! own user, without capabilities. It dies with Kiln (`PR_SET_PDEATHSIG`); one that an earlier Kiln
//! left behind is swept by its recorded pid and start time. Where one did not end by `stop`, the files that it had made and not
//! written are removed before the next.

mod child;
mod files;
mod garbage;
mod mark;
mod storage;
mod torn;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::child::Child;
use self::files::Files;
pub use self::garbage::{Garbage, GarbageError, Removed, Swept};
use super::backing::{Backing, BackingError};
use super::gate::{GRACE, Gate};

/// From the spawn until it listens. It takes some 10 ms; a loaded machine may need much more.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// From SIGTERM to SIGKILL.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// The first pause before a restart; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// After so long without trouble the pauses begin again.
const SETTLED: Duration = Duration::from_mins(1);

/// The managed registry. Dropping it ends the registry too, without waiting for it.
#[derive(Debug)]
pub struct Managed {
    backing: Backing,
    garbage: Garbage,
    cancel: CancellationToken,
    ended: Option<oneshot::Receiver<()>>,
}

/// The managed registry could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ManagedError {
    /// Its files could not be prepared.
    #[error("cannot {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another server has it.
    #[error("another kiln serve uses {0}; stop it, or choose another --data-dir")]
    InUse(String),
    /// The system has no user to run it as.
    #[error(
        "there is no user {0:?} to run the registry as; install the package docker-registry, or give --registry URL"
    )]
    NoUser(&'static str),
    /// It ended at once.
    #[error(
        "docker-registry did not start ({status}); install the package docker-registry, or give --registry URL. It printed: {output}"
    )]
    Died {
        /// How it ended.
        status: String,
        /// The end of its output, printable.
        output: String,
    },
    /// It ran but did not listen.
    #[error("docker-registry ran but did not listen in time. It printed: {0}")]
    Deaf(String),
    /// The thread that owns it is gone.
    #[error("the registry's supervisor ended")]
    Supervisor,
    /// The client for it could not be made.
    #[error("cannot reach the managed registry")]
    Backing(#[from] BackingError),
}

impl ManagedError {
    fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::Io { operation, path, source }
    }
}

impl Managed {
    /// Starts Debian's `docker-registry`, which keeps everything in `dir`, and returns once it listens.
    pub async fn start(dir: &Path) -> Result<Self, ManagedError> {
        Self::start_program(Path::new("docker-registry"), dir).await
    }

    /// The same with another program, by its path or by a name to look for.
    pub async fn start_program(program: &Path, dir: &Path) -> Result<Self, ManagedError> {
        Self::start_gated(program, dir, Gate::new(GRACE)).await
    }

    /// The same with another grace for what nothing refers to.
    pub async fn start_gated(program: &Path, dir: &Path, gate: Gate) -> Result<Self, ManagedError> {
        let program = program.to_owned();
        let dir = dir.to_owned();
        let prepared = tokio::task::spawn_blocking(move || Files::prepare(&dir)).await;
        let files = Arc::new(prepared.map_err(|_| ManagedError::Supervisor)??);
        let socket_dir = files.socket_dir()?;
        let backing = Backing::on_socket(socket_dir, files::SOCKET_NAME, gate.clone())?;
        let garbage = Garbage::new(program.clone(), Arc::clone(&files), gate);
        let cancel = CancellationToken::new();
        let (ready, is_ready) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let supervisor = Supervisor { program, files, cancel: cancel.clone() };
        // A thread of its own: the kernel sends PDEATHSIG when the *thread* that made the child
        // ends, and those of a runtime's pool come and go.
        std::thread::Builder::new()
            .name("registry".into())
            .spawn(move || {
                supervisor.run_here(ready);
                let _ = end.send(());
            })
            .map_err(ManagedError::io("start a thread for", Path::new("docker-registry")))?;
        // Dropped before it is ready, this ends the child as well.
        let managed = Self { backing, garbage, cancel, ended: Some(ended) };
        is_ready.await.map_err(|_| ManagedError::Supervisor)??;
        Ok(managed)
    }

    /// The registry.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// What can be removed from it.
    pub fn garbage(&self) -> &Garbage {
        &self.garbage
    }

    /// Ends it, and returns once it is gone.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        if let Some(ended) = self.ended.take() {
            // An error means that the thread is gone, and the child with it.
            let _ = ended.await;
        }
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

struct Supervisor {
    program: PathBuf,
    files: Arc<Files>,
    cancel: CancellationToken,
}

type Ready = oneshot::Sender<Result<(), ManagedError>>;

impl Supervisor {
    fn run_here(self, ready: Ready) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => runtime.block_on(self.run(ready)),
            Err(source) => {
                let path = "docker-registry".into();
                let error = ManagedError::Io { operation: "start a thread for", path, source };
                let _ = ready.send(Err(error));
            }
        }
    }

    async fn run(self, ready: Ready) {
        let mut ready = Some(ready);
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            let ended = self.run_one(&mut ready).await;
            let Err(error) = ended else { return };
            // The first start is the caller's to judge.
            if let Some(ready) = ready.take() {
                let _ = ready.send(Err(error));
                return;
            }
            if started.elapsed() >= SETTLED {
                pause = FIRST_PAUSE;
            }
            tracing::error!(%error, restart_in = ?pause, "the managed registry ended");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.cancel.cancelled() => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            // On this thread, which has nothing else to do.
            self.files.sweep();
        }
    }

    /// One life of the child. `Ok` when it was ended on purpose.
    async fn run_one(&self, ready: &mut Option<Ready>) -> Result<(), ManagedError> {
        let mut child = Child::spawn(&self.program, &self.files)?;
        self.files.record(child.pid())?;
        let listening = tokio::select! {
            listening = tokio::time::timeout(START_PATIENCE, child.listens(&self.files)) => listening,
            () = self.cancel.cancelled() => {
                child.stop(STOP_PATIENCE).await;
                return Ok(());
            }
        };
        match listening {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                child.stop(STOP_PATIENCE).await;
                return Err(ManagedError::Deaf(child.last_words()));
            }
        }
        if let Some(ready) = ready.take() {
            let _ = ready.send(Ok(()));
        } else {
            tracing::info!("the managed registry listens again");
        }
        tokio::select! {
            error = child.ends() => Err(error),
            () = self.cancel.cancelled() => {
                child.stop(STOP_PATIENCE).await;
                self.files.forget();
                Ok(())
            }
        }
    }
}
