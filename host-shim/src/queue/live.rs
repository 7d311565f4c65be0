//! The builds that a driver owns now, and how to ask a driver to stop.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::build::BuildId;

/// The running drivers, by build.
#[derive(Clone, Default)]
pub struct Live(Arc<Mutex<HashMap<BuildId, Running>>>);

#[derive(Clone)]
struct Running {
    cancel: CancellationToken,
    /// Closed when the driver is done.
    done: watch::Receiver<()>,
}

/// A driver's entry; the build is no longer live when it is dropped.
pub struct Entry {
    live: Live,
    id: BuildId,
    /// Cancelled when somebody asks the build to stop.
    pub cancel: CancellationToken,
    _done: watch::Sender<()>,
}

impl Live {
    /// Enters a build whose driver starts now.
    pub fn enter(&self, id: &BuildId) -> Entry {
        let cancel = CancellationToken::new();
        let (done, listen) = watch::channel(());
        let running = Running { cancel: cancel.clone(), done: listen };
        self.lock().insert(id.clone(), running);
        Entry { live: self.clone(), id: id.clone(), cancel, _done: done }
    }

    /// Asks a build's driver to stop, and waits until it is done. False when no driver has it.
    pub async fn cancel(&self, id: &BuildId) -> bool {
        let Some(mut running) = self.lock().get(id).cloned() else { return false };
        running.cancel.cancel();
        // Fails when the driver's end is dropped, which is what is waited for.
        while running.done.changed().await.is_ok() {}
        true
    }

    /// How many builds are live.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<BuildId, Running>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.live.lock().remove(&self.id);
    }
}
