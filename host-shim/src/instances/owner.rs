//! The one that may change an instance, and write its log.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::LOG;
use super::disk;
use super::instance::{Change, End, Instance};
use super::log::{Seen, Writer};
use super::quota::{Full, Held};
use crate::causes::chain;
use crate::exec::Door;
use crate::metrics::Metrics;
use crate::store::{Store, StoreError};

/// What logs leave free in the file system of the data directory: less than disks do, so that a new disk does not end
/// what runs already.
const KEEP_FREE: u64 = 256 << 20;

/// Why a line is not in the log.
#[derive(Debug, thiserror::Error)]
pub enum PrintError {
    /// The host's disk is nearly full.
    #[error("the host has no room for the instance's log")]
    Room(#[source] io::Error),
    /// Instances take as much as they may.
    #[error("there is no room for the instance's log")]
    Full(#[from] Full),
    /// The file failed.
    #[error("the instance's log cannot be written")]
    Write(#[source] io::Error),
}

/// Held by an instance's task for as long as it is not stopped.
pub struct Owner {
    instance: Instance,
    store: Arc<dyn Store>,
    metrics: Metrics,
    dir: PathBuf,
    log: Writer,
    kept: Held,
    seen: watch::Sender<Seen>,
    cancel: CancellationToken,
    door: Door,
}

impl Owner {
    pub(super) fn new(
        instance: Instance,
        host: (Arc<dyn Store>, Metrics),
        dir: PathBuf,
        log: (Writer, Held),
        seen: watch::Sender<Seen>,
        cancel: CancellationToken,
        door: Door,
    ) -> Self {
        let ((store, metrics), (log, kept)) = (host, log);
        Self { instance, store, metrics, dir, log, kept, seen, cancel, door }
    }

    /// The instance as it is now.
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// A directory for what is made for it; removed when it has ended, but for the log.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Cancelled when somebody wants it to end.
    pub fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Into its VM, for those who may enter.
    pub fn door(&self) -> &Door {
        &self.door
    }

    /// Changes it, and tells.
    pub async fn change(&mut self, change: Change) -> Result<(), StoreError> {
        let now = crate::clock::now();
        let id = &self.instance.id;
        let runs = change == Change::Run;
        self.instance = self.store.change_instance(id, change, now).await?;
        let instance = self.instance.clone();
        self.seen.send_modify(|seen| seen.instance = instance);
        if runs {
            self.metrics.instance_runs();
        }
        Ok(())
    }

    /// Appends to its log, and tells. What is over the bound is told after it was written: a batch at most.
    pub async fn print(&mut self, lines: &[Value]) -> Result<(), PrintError> {
        disk::require_room(&self.dir, KEEP_FREE, 0).map_err(PrintError::Room)?;
        let bytes = self.log.append(lines).await.map_err(PrintError::Write)?;
        self.seen.send_modify(|seen| seen.bytes = bytes);
        Ok(self.kept.resize(bytes)?)
    }

    /// Records how it ended, once what was made for it is gone. What its log takes is the caller's to keep; whoever
    /// waits for the end waits until the sender is dropped.
    pub(super) async fn end(mut self, end: End) -> (Held, watch::Sender<Seen>) {
        if let Err(error) = remove_all_but_log(&self.dir).await {
            tracing::error!(id = %self.instance.id, %error, "an instance's files are left");
        }
        let message = end.message.clone();
        match self.change(Change::Stop(end)).await {
            Ok(()) => {
                let code = self.instance.exit_code;
                tracing::info!(id = %self.instance.id, ?code, message, "the instance has stopped");
            }
            Err(error) => {
                tracing::error!(id = %self.instance.id, error = chain(&error), "cannot record the instance's end");
            }
        }
        (self.kept, self.seen)
    }
}

/// Removes what was made for an instance, but for its log.
pub(super) async fn remove_all_but_log(dir: &Path) -> io::Result<()> {
    let mut entries = tokio::fs::read_dir(dir).await?;
    while let Some(entry) = entries.next_entry().await? {
        if entry.file_name() == LOG {
            continue;
        }
        if entry.file_type().await?.is_dir() {
            tokio::fs::remove_dir_all(entry.path()).await?;
        } else {
            tokio::fs::remove_file(entry.path()).await?;
        }
    }
    Ok(())
}
