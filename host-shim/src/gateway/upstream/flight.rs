//! One fetch of a blob, however many want it: the first one starts it, all read along from its file.
//!
//! ```text
//! Asking ─▶ Arriving (written grows) ─▶ Whole: what the digest says
//!    │           └──────────────────▶ Failed
//!    └─▶ NoRoom: everybody fetches for itself, and nothing is kept
//! ```
//! Nobody gets the last byte before all of them are what the digest says. When nobody reads any more, the fetch ends.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::cache::{Key, Place};
use super::error::UpstreamError;
use crate::gateway::path::Name;
use crate::gateway::relay;
use crate::staging::Digest;

/// Written, and read, at a time.
const CHUNK: usize = 256 * 1024;

/// How far a fetch is.
#[derive(Clone, Debug)]
pub(super) enum Progress {
    Asking,
    Arriving { file: Arc<File>, size: u64, written: u64 },
    Whole { file: Arc<File>, size: u64 },
    NoRoom,
    Failed(Arc<UpstreamError>),
}

/// Which blob, and of which repository: the upstream may have it in one and not in another.
pub(super) type Wanted = (Key, Name);

/// All fetches that are under way.
#[derive(Debug, Default)]
pub(super) struct Flights {
    open: Mutex<HashMap<Wanted, (u64, watch::Sender<Progress>)>>,
    next: AtomicU64,
}

/// A fetch that somebody has to do.
#[derive(Debug)]
pub(super) struct Flight {
    flights: Arc<Flights>,
    wanted: Wanted,
    id: u64,
    progress: watch::Sender<Progress>,
}

impl Flights {
    /// Joins a fetch; without one, asks `kept` whether there is any need, and starts one to be done. Under one lock, so
    /// that what was kept a moment ago is not fetched again.
    pub fn join<T>(
        self: &Arc<Self>,
        wanted: &Wanted,
        kept: impl FnOnce() -> Option<T>,
    ) -> Joined<T> {
        let mut open = self.open();
        if let Some((_, progress)) = open.get(wanted) {
            return Joined::Along(progress.subscribe());
        }
        if let Some(kept) = kept() {
            return Joined::Kept(kept);
        }
        let (progress, reader) = watch::channel(Progress::Asking);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        open.insert(wanted.clone(), (id, progress.clone()));
        let flights = Arc::clone(self);
        Joined::First(Flight { flights, wanted: wanted.clone(), id, progress }, reader)
    }

    fn open(&self) -> MutexGuard<'_, HashMap<Wanted, (u64, watch::Sender<Progress>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came of joining.
pub(super) enum Joined<T> {
    Kept(T),
    Along(watch::Receiver<Progress>),
    First(Flight, watch::Receiver<Progress>),
}

impl Flight {
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Tells all that read along.
    pub fn tell(&self, progress: Progress) {
        self.progress.send_replace(progress);
    }

    /// Ends when nobody reads along, after which nobody can join.
    pub async fn deserted(&self) {
        loop {
            self.progress.closed().await;
            let mut open = self.flights.open();
            if self.progress.receiver_count() == 0 {
                self.leave(&mut open);
                return;
            }
        }
    }

    /// Writes a body to its place and tells how far it is; `Whole` when it is what it should be.
    pub async fn land(
        &self,
        place: &Place,
        size: u64,
        body: reqwest::Response,
    ) -> Result<(), UpstreamError> {
        let digest = self.wanted.0.digest;
        let file = Arc::new(place.file()?);
        let (mut hash, mut written) = (Sha256::new(), 0_u64);
        let arriving = |written| Progress::Arriving { file: Arc::clone(&file), size, written };
        self.tell(arriving(0));
        let mut body = std::pin::pin!(relay::patient(body));
        let mut buffer = BytesMut::new();
        loop {
            let chunk = body.next().await.transpose().map_err(UpstreamError::Body)?;
            let ended = chunk.is_none();
            buffer.extend_from_slice(&chunk.unwrap_or_default());
            if buffer.len() >= CHUNK || (ended && !buffer.is_empty()) {
                let bytes = buffer.split().freeze();
                written += bytes.len() as u64;
                if written > size {
                    return Err(UpstreamError::Changed(digest));
                }
                hash = write(Arc::clone(&file), bytes, hash).await?;
                self.tell(arriving(written));
            }
            if ended {
                break;
            }
        }
        if written != size || Digest::from_hasher(hash) != digest {
            return Err(UpstreamError::Changed(digest));
        }
        self.tell(Progress::Whole { file, size });
        Ok(())
    }

    fn leave(&self, open: &mut HashMap<Wanted, (u64, watch::Sender<Progress>)>) {
        if open.get(&self.wanted).is_some_and(|(id, _)| *id == self.id) {
            open.remove(&self.wanted);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.leave(&mut self.flights.open());
    }
}

async fn write(file: Arc<File>, bytes: Bytes, mut hash: Sha256) -> Result<Sha256, UpstreamError> {
    let written = tokio::task::spawn_blocking(move || {
        hash.update(&bytes);
        (&*file).write_all(&bytes)?;
        Ok(hash)
    });
    let written = written.await.map_err(|_| UpstreamError::Broken)?;
    written.map_err(|source| UpstreamError::Cache {
        operation: "write to",
        path: "a file on its way".into(),
        source,
    })
}

/// What arrives, as far as it is there.
pub(super) fn along(
    reader: watch::Receiver<Progress>,
) -> impl Stream<Item = Result<Bytes, Arc<UpstreamError>>> + Send + 'static {
    futures_util::stream::unfold(Some((reader, 0_u64)), |state| async {
        let (mut reader, at) = state?;
        match next(&mut reader, at).await {
            Ok(Some(bytes)) => {
                let at = at + bytes.len() as u64;
                Some((Ok(bytes), Some((reader, at))))
            }
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
}

async fn next(
    reader: &mut watch::Receiver<Progress>,
    at: u64,
) -> Result<Option<Bytes>, Arc<UpstreamError>> {
    loop {
        let (file, until, ended) = match &*reader.borrow_and_update() {
            Progress::Arriving { file, written, .. } => {
                (Arc::clone(file), written.saturating_sub(1), false)
            }
            Progress::Whole { file, size } => (Arc::clone(file), *size, true),
            Progress::Failed(error) => return Err(Arc::clone(error)),
            Progress::Asking | Progress::NoRoom => return Err(Arc::new(UpstreamError::Broken)),
        };
        if at < until {
            return read(file, at, until).await.map(Some);
        }
        if ended {
            return Ok(None);
        }
        // The one that fetches is gone without a word.
        reader.changed().await.map_err(|_| UpstreamError::Broken)?;
    }
}

async fn read(file: Arc<File>, at: u64, until: u64) -> Result<Bytes, Arc<UpstreamError>> {
    let length = usize::try_from(until - at).unwrap_or(CHUNK).min(CHUNK);
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    });
    let read = read.await.map_err(|_| UpstreamError::Broken)?;
    let read = read.map_err(|source| UpstreamError::Cache {
        operation: "read",
        path: "a file on its way".into(),
        source,
    });
    Ok(read?.into())
}
