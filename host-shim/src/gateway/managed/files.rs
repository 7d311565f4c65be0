//! The managed registry's directory.
//!
//! ```text
//! DIR/            root's, or the user's that runs Kiln
//! ├─ lock         held while a server runs
//! ├─ pid          pid and start time of the child
//! ├─ config.yml   no secret in it
//! ├─ log, log.1   the child's output, bounded
//! ├─ run/         the child's: its socket
//! └─ storage/     the child's: the images
//! ```
//! Kiln writes nothing in the directories of the child's; it removes what nobody needs any more ([`super::garbage`]).

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;
use nix::unistd::{Gid, Uid, User, chown, geteuid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{ManagedError, torn};
use crate::lock;

/// The socket, in `run/`.
pub(super) const SOCKET_NAME: &str = "registry.sock";
/// The user that Debian's package makes.
const USER: &str = "docker-registry";
/// Where `log` becomes `log.1`.
const MAX_LOG_BYTES: u64 = 1024 * 1024;
/// How long a process may take to end that was killed.
const END_PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// Paths are relative to DIR, the child's working directory: so it needs no right to DIR's parents.
/// The level `info` is what makes it say that it listens. There is no cache of blobs' descriptors on purpose: it would go on
/// saying that it has what [`super::garbage`] has removed.
const CONFIG: &str = "\
version: 0.1
log:
  level: info
  formatter: text
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: storage
  delete:
    enabled: true
http:
  net: unix
  addr: run/registry.sock
  relativeurls: true
";

pub(super) struct Files {
    dir: PathBuf,
    /// Whom the child runs as, when that is somebody else than Kiln.
    pub identity: Option<(Uid, Gid)>,
    /// Signs the state of uploads; the same for every child, so that they outlast a restart.
    pub secret: String,
    /// How often it was swept: what somebody found in `storage` before may be gone.
    sweeps: AtomicU64,
    _lock: File,
}

impl Files {
    pub fn prepare(dir: &Path) -> Result<Self, ManagedError> {
        // The child must get through to its own directories, and nobody needs to list this one.
        make_dir(dir, 0o711)?;
        let lock_path = dir.join("lock");
        let lock = lock::exclusive(&lock_path)
            .map_err(ManagedError::io("lock", &lock_path))?
            .ok_or_else(|| ManagedError::InUse(dir.display().to_string()))?;
        let secret = uuid::Uuid::new_v4().simple().to_string();
        let (dir, identity, sweeps) = (dir.to_owned(), None, AtomicU64::new(0));
        let mut files = Self { dir, identity, secret, sweeps, _lock: lock };
        let dir = files.dir.clone();
        for part in ["storage", "run"] {
            make_dir(&dir.join(part), 0o700)?;
        }
        if geteuid().is_root() {
            files.identity = Some(files.give_away()?);
        }
        let config = dir.join("config.yml");
        std::fs::write(&config, CONFIG)
            .and_then(|()| std::fs::set_permissions(&config, Permissions::from_mode(0o644)))
            .map_err(ManagedError::io("write", &config))?;
        files.sweep();
        Ok(files)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A handle of the directory with the socket.
    pub fn socket_dir(&self) -> Result<OwnedFd, ManagedError> {
        let path = self.dir.join("run");
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(&path)
            .map(Into::into)
            .map_err(ManagedError::io("open", &path))
    }

    pub fn log(&self) -> Result<BoundedLog, ManagedError> {
        let path = self.dir.join("log");
        BoundedLog::open(&path).map_err(ManagedError::io("open", &path))
    }

    /// Writes down which process is the child.
    pub fn record(&self, pid: u32) -> Result<(), ManagedError> {
        let path = self.dir.join("pid");
        let Some(start) = start_time(pid) else { return Ok(()) };
        create(&path)
            .and_then(|mut file| {
                file.set_len(0)?;
                writeln!(file, "{pid} {start}")
            })
            .map_err(ManagedError::io("write", &path))
    }

    /// How often it was swept.
    pub fn sweeps(&self) -> u64 {
        self.sweeps.load(Ordering::SeqCst)
    }

    /// The child is gone.
    pub fn forget(&self) {
        let _ = std::fs::remove_file(self.dir.join("pid"));
    }

    /// After a child that was not stopped: kills the one of a Kiln that was killed, if the kernel has not done so, and
    /// removes what it left half written.
    pub fn sweep(&self) {
        let Ok(text) = std::fs::read_to_string(self.dir.join("pid")) else { return };
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(pid)), Some(Ok(start))) = (numbers.next(), numbers.next()) else { return };
        if let Ok(pid) = u32::try_from(pid)
            && let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw)
            && let Ok(process) = pidfd_open(raw, PidfdFlags::empty())
            && start_time(pid) == Some(start)
        {
            tracing::warn!(pid, "ending a registry that an earlier server left behind");
            let _ = pidfd_send_signal(&process, Signal::KILL);
            // Nobody else writes in its directories then.
            let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&END_PATIENCE));
        }
        self.sweeps.fetch_add(1, Ordering::SeqCst);
        match torn::remove(&self.dir, self.identity) {
            Ok(0) => {}
            Ok(files) => tracing::warn!(files, "removed what a killed registry had not written"),
            Err(error) => tracing::warn!(%error, "what a killed registry had not written stays"),
        }
        self.forget();
    }

    /// Makes the child's directories the child's. Who owns `storage` already goes on owning it.
    fn give_away(&self) -> Result<(Uid, Gid), ManagedError> {
        let storage = self.dir.join("storage");
        let owner = std::fs::metadata(&storage).map_err(ManagedError::io("look at", &storage))?;
        let identity = if owner.uid() == 0 {
            let user = User::from_name(USER).ok().flatten().ok_or(ManagedError::NoUser(USER))?;
            (user.uid, user.gid)
        } else {
            (Uid::from_raw(owner.uid()), Gid::from_raw(owner.gid()))
        };
        for part in ["storage", "run"] {
            let path = self.dir.join(part);
            chown(&path, Some(identity.0), Some(identity.1))
                .map_err(|e| ManagedError::io("change the owner of", &path)(e.into()))?;
        }
        Ok(identity)
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<(), ManagedError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)))
        .map_err(ManagedError::io("create", path))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)
}

/// When a process started, in ticks since boot: tells it from a later one with the same pid.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything. The start is field 22, the 20th after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A log of at most two files of [`MAX_LOG_BYTES`].
pub(super) struct BoundedLog {
    path: PathBuf,
    file: File,
    written: u64,
}

impl BoundedLog {
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let written = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, written })
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written + bytes.len() as u64 > MAX_LOG_BYTES {
            std::fs::rename(&self.path, self.path.with_extension("1"))?;
            *self = Self::open(&self.path)?;
        }
        self.written += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_log_never_takes_more_than_two_files_of_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = BoundedLog::open(&path).unwrap();
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
        let chunk = vec![b'x'; 256 * 1024];
        for _ in 0..4 {
            log.write(&chunk).unwrap();
        }
        assert_eq!((size(&path), size(&dir.path().join("log.1"))), (MAX_LOG_BYTES, 0));
        log.write(b"y").unwrap();
        assert_eq!((size(&path), size(&dir.path().join("log.1"))), (1, MAX_LOG_BYTES));
        // A reopened log goes on counting.
        let mut log = BoundedLog::open(&path).unwrap();
        for _ in 0..4 {
            log.write(&chunk).unwrap();
        }
        assert_eq!(size(&path), 256 * 1024);
    }

    #[test]
    fn one_directory_serves_one_server() {
        let dir = tempfile::tempdir().unwrap();
        let first = Files::prepare(dir.path()).unwrap();
        assert!(matches!(Files::prepare(dir.path()), Err(ManagedError::InUse(_))));
        drop(first);
        Files::prepare(dir.path()).unwrap();
    }

    #[test]
    fn a_leftover_is_ended_only_if_it_is_the_recorded_process() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::prepare(dir.path()).unwrap();
        let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let start = start_time(other.id()).unwrap();
        std::fs::write(dir.path().join("pid"), format!("{} {}\n", other.id(), start + 1)).unwrap();
        files.sweep();
        assert!(other.try_wait().unwrap().is_none(), "another process with that pid lives on");
        files.record(other.id()).unwrap();
        files.sweep();
        let status = other.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
        assert!(!dir.path().join("pid").exists());
    }
}
