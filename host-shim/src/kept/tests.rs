//! Stays of what is no VM: when it is paused, who counts its memory, when it goes.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tokio::net::UnixStream;
use tokio::time::{Duration, Instant, sleep};

use super::*;
use crate::exec::{Dial, Line};
use crate::vmm::{DialError, VmmError};

/// What its stay makes of it.
#[derive(Clone, Default)]
struct Seen {
    paused: Arc<AtomicBool>,
    removed: Arc<AtomicBool>,
}

impl Seen {
    fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    fn is_removed(&self) -> bool {
        self.removed.load(Ordering::SeqCst)
    }

    async fn until_paused(&self, paused: bool) {
        while self.is_paused() != paused {
            // Lets the clock of a test go on that has nothing else to wait for.
            sleep(Duration::from_millis(10)).await;
        }
    }
}

#[async_trait]
impl Machine for Seen {
    fn dial(&self) -> io::Result<Box<dyn Dial>> {
        Ok(Box::new(Self::clone(self)))
    }

    fn qemu(&self) -> Option<i32> {
        None
    }

    fn pause(&self) -> Result<(), VmmError> {
        assert!(!self.paused.swap(true, Ordering::SeqCst), "paused twice");
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        assert!(self.paused.swap(false, Ordering::SeqCst), "it ran");
        Ok(())
    }

    async fn over(&self) -> String {
        std::future::pending().await
    }

    async fn remove(self) {
        self.removed.store(true, Ordering::SeqCst);
    }
}

#[async_trait]
impl Dial for Seen {
    async fn dial(&self) -> Result<Line, DialError> {
        assert!(!self.is_paused(), "dialled before it ran");
        let (stream, _) = UnixStream::pair().unwrap();
        Ok(Line { stream, hold: None })
    }
}

async fn keep(kept: &Kept, id: &str, seconds: u32) -> Seen {
    let seen = Seen::default();
    let guest = Guest {
        id: BuildId::new(id).unwrap(),
        tenant: Tenant::new("a").unwrap(),
        memory_mb: 1000,
        seconds,
        nonce: [0; TOKEN_LEN],
        with_it: Box::new(()),
    };
    kept.keep(seen.clone(), guest).await;
    seen
}

#[tokio::test]
async fn memory_is_given_to_one_that_starts_and_not_to_two() {
    let kept = Kept::new(4);
    let _seen = keep(&kept, "old", 600).await;
    let _newer = keep(&kept, "new", 600).await;
    // Theirs, which nobody has touched, the host's own, and room for one more.
    let free = || Some(2 * 1000 + 512 + 700);
    let first = kept.reserve(700, u64::MAX, free).unwrap();
    assert_eq!(kept.reserve(700, u64::MAX, free).err(), Some(BuildId::new("old").unwrap()));
    drop(first);
    let again = kept.reserve(700, u64::MAX, free).unwrap();
    assert_eq!(kept.reserve(1, u64::MAX, free).err(), Some(BuildId::new("old").unwrap()));
    assert!(kept.release(&BuildId::new("old").unwrap()).await);
    let _beside = kept.reserve(1000, u64::MAX, free).unwrap();
    assert!(kept.release(&BuildId::new("new").unwrap()).await);
    // With nobody to go, whoever starts is not kept from it.
    let _all_the_same = kept.reserve(100_000, u64::MAX, free).unwrap();
    drop(again);
}

#[tokio::test]
async fn those_that_stay_have_what_builds_and_instances_leave() {
    let kept = Kept::new(4);
    let _seen = keep(&kept, "old", 600).await;
    let _newer = keep(&kept, "new", 600).await;
    let free = || Some(1 << 20);
    drop(kept.reserve(1, 2000, free).unwrap());
    assert_eq!(kept.reserve(1, 1999, free).err(), Some(BuildId::new("old").unwrap()));
    assert!(kept.release(&BuildId::new("old").unwrap()).await);
    drop(kept.reserve(1, 1999, free).unwrap());
}

#[tokio::test(start_paused = true)]
async fn it_runs_while_somebody_is_in_it_and_a_moment_longer() {
    let kept = Kept::new(1);
    let seen = keep(&kept, "b", 600).await;
    seen.until_paused(true).await;
    let id = BuildId::new("b").unwrap();
    let entrance = kept.entrance(&id).unwrap();
    for _ in 0..3 {
        let (one, two) = (entrance.dial().await.unwrap(), entrance.dial().await.unwrap());
        drop(one);
        sleep(Duration::from_secs(60)).await;
        assert!(!seen.is_paused() && kept.lease(&id).unwrap().sessions == 1);
        drop(two);
        let left = Instant::now();
        seen.until_paused(true).await;
        assert!((1900..3000).contains(&left.elapsed().as_millis()), "{:?}", left.elapsed());
    }
    // Whoever comes within that moment finds it awake.
    drop(entrance.dial().await.unwrap());
    sleep(Duration::from_secs(1)).await;
    drop(entrance.dial().await.unwrap());
    sleep(Duration::from_millis(1500)).await;
    assert!(!seen.is_paused());
    assert!(kept.release(&id).await);
    assert!(seen.is_removed() && kept.list(None).is_empty() && kept.entrance(&id).is_none());
    assert!(entrance.dial().await.is_err());
}

#[tokio::test]
async fn the_oldest_goes_for_one_that_comes_and_all_go_at_the_end() {
    let kept = Kept::new(1);
    let first = keep(&kept, "one", 600).await;
    let second = keep(&kept, "two", 600).await;
    assert!(first.is_removed() && !second.is_removed());
    assert_eq!(kept.list(None).len(), 1);
    kept.close().await;
    assert!(second.is_removed() && kept.list(None).is_empty());
    assert!(keep(&kept, "late", 600).await.is_removed());
}

#[tokio::test]
async fn a_build_stays_as_long_as_its_vm() {
    use crate::retention::{Keep, Retention};
    use crate::store::{Store as _, sqlite::SqliteStore};
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open(dir.path()).await.unwrap());
    let build = crate::build::tests::queued();
    store.insert_build(&build, &[], None, &[]).await.unwrap();
    store.cancel_queued(&build.id, 20, &[]).await.unwrap();
    let kept = Kept::new(1);
    let _seen = keep(&kept, build.id.as_str(), 600).await;
    let sources = crate::sources::Sources::new(dir.path().join("builds"));
    let keep = Keep { builds_days: 1, ..Keep::default() };
    let retention = Retention::new(
        store.clone(),
        kept.clone(),
        sources,
        crate::metrics::Metrics::default(),
        keep,
        crate::retention::Room::default(),
    );
    assert_eq!(retention.collect(clock::now()).await.unwrap().builds, 0);
    assert!(kept.release(&build.id).await);
    assert_eq!(retention.collect(clock::now()).await.unwrap().builds, 1);
    assert_eq!(store.build(&build.id).await.unwrap(), None);
}
