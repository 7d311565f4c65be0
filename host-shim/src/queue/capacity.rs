//! The room that the host has for VMs: places, memory and disk, shared by builds and instances.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::admission::Room;

/// The books. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Capacity {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    total_mb: u32,
    disks: PathBuf,
    books: Mutex<Books>,
    /// Changes when a VM gives its memory back.
    freed: watch::Sender<()>,
    /// Changes when a claim gives back what it did not need.
    claimed: watch::Sender<()>,
    /// Instances that wait for memory, one behind the other.
    line: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Books {
    /// Of VMs.
    taken_mb: u32,
    vms: u32,
    /// Of the claim that is under way.
    claiming_mb: u32,
}

/// Memory of one VM, until this is dropped.
#[derive(Debug)]
pub struct Memory {
    capacity: Capacity,
    mb: u32,
}

/// All that is free, for as long as it is not known which build gets how much of it.
#[derive(Debug)]
pub struct Claiming {
    capacity: Capacity,
    mb: u32,
}

impl Capacity {
    /// With so much memory for VMs, in MiB; their disks are in this directory.
    pub fn new(total_mb: u32, disks: PathBuf) -> Self {
        let (freed, claimed) = (watch::Sender::new(()), watch::Sender::new(()));
        let line = tokio::sync::Mutex::default();
        let books = Mutex::default();
        Self { inner: Arc::new(Inner { total_mb, disks, books, freed, claimed, line }) }
    }

    /// What there is now.
    pub fn room(&self) -> Room {
        let disk = rustix::fs::statvfs(&self.inner.disks).ok();
        let disk = disk.map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
        let books = self.books();
        let free_mb = self.free_mb(&books);
        Room { total_mb: self.inner.total_mb, free_mb, vms: books.vms, disk }
    }

    /// What is left beside the VMs of builds and instances, in MiB: kept VMs may have that, and no more.
    pub fn beside_mb(&self) -> u64 {
        self.inner.total_mb.saturating_sub(self.books().taken_mb).into()
    }

    /// Told when a VM gives its memory back.
    pub fn freed(&self) -> watch::Receiver<()> {
        self.inner.freed.subscribe()
    }

    /// Sets all that is free aside, up to so much.
    pub fn claiming(&self, most_mb: u32) -> Claiming {
        let mut books = self.books();
        let mb = self.free_mb(&books).min(most_mb);
        books.claiming_mb += mb;
        Claiming { capacity: self.clone(), mb }
    }

    /// Waits for so much memory, behind those that waited before. What can never be had is not waited for: it is all that there is then.
    pub async fn memory(&self, mb: u32) -> Memory {
        let mb = mb.min(self.inner.total_mb);
        let _next = self.inner.line.lock().await;
        let (mut freed, mut claimed) = (self.freed(), self.inner.claimed.subscribe());
        loop {
            if let Some(memory) = self.take(mb) {
                return memory;
            }
            // Their senders live as long as this does.
            tokio::select! {
                _ = freed.changed() => {}
                _ = claimed.changed() => {}
            }
        }
    }

    fn take(&self, mb: u32) -> Option<Memory> {
        let mut books = self.books();
        if mb > self.free_mb(&books) {
            return None;
        }
        books.taken_mb += mb;
        books.vms += 1;
        Some(Memory { capacity: self.clone(), mb })
    }

    fn free_mb(&self, books: &Books) -> u32 {
        self.inner.total_mb.saturating_sub(books.taken_mb + books.claiming_mb)
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.inner.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claiming {
    /// How much it is, in MiB.
    pub fn mb(&self) -> u32 {
        self.mb
    }

    /// Gives the build that was claimed what it wants, which is no more than this, and the rest back.
    pub fn keep(self, mb: u32) -> Memory {
        let mb = mb.min(self.mb);
        let mut books = self.capacity.books();
        books.taken_mb += mb;
        books.vms += 1;
        drop(books);
        Memory { capacity: self.capacity.clone(), mb }
    }
}

impl Drop for Claiming {
    fn drop(&mut self) {
        self.capacity.books().claiming_mb -= self.mb;
        self.capacity.inner.claimed.send_replace(());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut books = self.capacity.books();
        books.taken_mb -= self.mb;
        books.vms -= 1;
        drop(books);
        self.capacity.inner.freed.send_replace(());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn capacity() -> Capacity {
        Capacity::new(1000, "/".into())
    }

    #[tokio::test]
    async fn a_claim_takes_what_its_build_wants_and_no_more() {
        let capacity = capacity();
        let instance = capacity.memory(300).await;
        let claiming = capacity.claiming(u32::MAX);
        assert_eq!((claiming.mb(), capacity.room().free_mb), (700, 0));
        // Kept VMs do not go for what is given back in a moment.
        assert_eq!(capacity.beside_mb(), 700);
        let waits = capacity.clone();
        let waits = tokio::spawn(async move { waits.memory(100).await });
        tokio::task::yield_now().await;
        let build = claiming.keep(600);
        let second = waits.await.unwrap();
        assert_eq!((capacity.room().free_mb, capacity.room().vms), (0, 3));
        drop((instance, build, second));
        assert_eq!((capacity.room().free_mb, capacity.room().vms), (1000, 0));
        drop(capacity.claiming(400));
        assert_eq!(capacity.room().free_mb, 1000);
        assert!(capacity.room().disk.is_some());
    }

    #[tokio::test]
    async fn who_waits_longest_is_first_however_large() {
        let capacity = capacity();
        let first = capacity.memory(600).await;
        let mut large = Box::pin(capacity.memory(900));
        assert!((&mut large).now_or_never().is_none());
        // It would fit.
        let mut small = Box::pin(capacity.memory(100));
        assert!((&mut small).now_or_never().is_none());
        drop(first);
        let large = large.await;
        let small = small.await;
        drop((large, small));
        // More than there is can only be all of it.
        let all = capacity.memory(u32::MAX).await;
        assert_eq!(capacity.room().free_mb, 0);
        drop(all);
    }

    #[tokio::test]
    async fn a_release_is_told_and_a_claim_is_not() {
        let capacity = capacity();
        let memory = capacity.memory(1).await;
        let freed = capacity.freed();
        drop(capacity.claiming(5));
        assert!(!freed.has_changed().unwrap());
        drop(memory);
        assert!(freed.has_changed().unwrap());
    }
}
