//! The builds that a driver owns now, and how to ask a driver to stop.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::build::BuildId;
use crate::exec::{Door, Entrance};

/// The running drivers, by build.
#[derive(Clone, Default)]
pub struct Live(Arc<Mutex<HashMap<BuildId, Running>>>);

#[derive(Clone)]
struct Running {
    cancel: CancellationToken,
    /// Changes when a cancel can do nothing more: the image is being published, or (closed) the driver
    /// is done.
    settled: watch::Receiver<()>,
    /// Into its VM.
    door: Door,
}

/// A driver's entry; the build is no longer live when it is dropped.
pub struct Entry {
    live: Live,
    id: BuildId,
    /// Cancelled when somebody asks the build to stop.
    pub cancel: CancellationToken,
    /// Into its VM, for those who may enter.
    pub door: Door,
    settled: watch::Sender<()>,
}

impl Live {
    /// Enters a build whose driver starts now.
    pub fn enter(&self, id: &BuildId) -> Entry {
        let cancel = CancellationToken::new();
        let (settled, listen) = watch::channel(());
        let door = Door::default();
        let running = Running { cancel: cancel.clone(), settled: listen, door: door.clone() };
        self.lock().insert(id.clone(), running);
        Entry { live: self.clone(), id: id.clone(), cancel, door, settled }
    }

    /// Asks a build's driver to stop, and waits until it is done or is past stopping. False when no driver
    /// has it.
    pub async fn cancel(&self, id: &BuildId) -> bool {
        let Some(mut running) = self.lock().get(id).cloned() else { return false };
        running.cancel.cancel();
        // Fails when the driver's end is dropped, which is waited for as well.
        let _ = running.settled.changed().await;
        true
    }

    /// The way into a build's VM, while it has one that can be entered.
    pub fn entrance(&self, id: &BuildId) -> Option<Entrance> {
        self.lock().get(id)?.door.entrance()
    }

    /// Whether a build is live.
    pub fn has(&self, id: &BuildId) -> bool {
        self.lock().contains_key(id)
    }

    /// How many builds are live.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<BuildId, Running>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// From now on the build cannot be cancelled.
    pub fn settle(&self) {
        self.settled.send_replace(());
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.live.lock().remove(&self.id);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_build_can_be_entered_while_its_driver_has_a_vm() {
        let (live, id) = (Live::default(), BuildId::new("b").unwrap());
        let dir = tempfile::tempdir().unwrap();
        let entry = live.enter(&id);
        let dialer = || crate::vmm::Dialer::open(dir.path(), 0);
        let mut doorway = crate::exec::Doorway::new(entry.door.clone(), dialer(), [1; 32]);
        assert!(live.entrance(&id).is_none(), "its VM has not begun");
        doorway.begun();
        doorway.begun();
        let entrance = live.entrance(&id).unwrap();
        // Another VM in its place has another nonce.
        drop(doorway);
        entrance.closed().await;
        assert!(live.entrance(&id).is_none());
        let mut doorway = crate::exec::Doorway::new(entry.door.clone(), dialer(), [2; 32]);
        doorway.begun();
        assert_eq!(live.entrance(&id).map(|entrance| entrance.nonce()), Some([2; 32]));
        drop((entry, doorway));
        assert!(live.entrance(&id).is_none());
    }

    #[tokio::test]
    async fn a_cancel_waits_for_the_driver_or_for_the_point_of_no_return() {
        let (live, id) = (Live::default(), BuildId::new("b").unwrap());
        let entry = live.enter(&id);
        let asked = tokio::spawn({
            let (live, id) = (live.clone(), id.clone());
            async move { live.cancel(&id).await }
        });
        entry.cancel.cancelled().await;
        assert!(!asked.is_finished());
        entry.settle();
        assert!(asked.await.unwrap());
        // Asked again it need not wait, and neither once the driver is done.
        assert!(live.cancel(&id).await);
        drop(entry);
        assert!(!live.cancel(&id).await);
    }
}
