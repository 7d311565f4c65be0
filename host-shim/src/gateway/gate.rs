//! Who counts on what the managed registry has, so that nothing of it is removed under somebody's hands.
//!
//! ```text
//! clients, publish: a manifest comes or goes ─▶ change ──┐ not at one time
//! garbage: what does nothing refer to?       ─▶ close  ──┘
//! clients, publish: is this blob there? ─▶ want ──────┐ not at one time; what is wanted is not removed
//! garbage: this blob goes               ─▶ may_go ────┘
//! ```
//! While blobs are looked for that nothing refers to, no manifest comes: it would be missed. And none goes:
//! docker-registry leaves out the rest of a repository where a file is gone that it had just listed. Who only asks for a blob does
//! not wait for that, just for the removal of one blob.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};
use tokio::time::Instant;

use crate::staging::Digest;

/// How long a blob stays that nothing refers to: a push brings its blobs first, and then the manifest that refers to them.
pub const GRACE: Duration = Duration::from_hours(1);

/// The gate of one registry. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gate {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    grace: Duration,
    manifests: Arc<RwLock<()>>,
    /// Held while one blob is removed, and by who begins to want one.
    removing: Arc<tokio::sync::Mutex<()>>,
    wanted: Mutex<HashMap<Digest, Wanted>>,
}

#[derive(Debug)]
struct Wanted {
    holders: u32,
    until: Instant,
}

/// Keeps blobs from being removed while it is there.
#[derive(Debug)]
pub struct Want {
    gate: Gate,
    digests: Vec<Digest>,
    for_a_push: bool,
}

impl Gate {
    /// One with this grace; [`GRACE`] but in tests.
    pub fn new(grace: Duration) -> Self {
        let (manifests, removing, wanted) = Default::default();
        Self { inner: Arc::new(Inner { grace, manifests, removing, wanted }) }
    }

    /// How long what nothing refers to stays.
    pub fn grace(&self) -> Duration {
        self.inner.grace
    }

    /// Waits until a manifest may be put or deleted; it may while this is there.
    pub async fn change(&self) -> OwnedRwLockReadGuard<()> {
        Arc::clone(&self.inner.manifests).read_owned().await
    }

    /// Waits until no manifest is put or deleted; none is while this is there.
    pub async fn close(&self) -> OwnedRwLockWriteGuard<()> {
        let closed = Arc::clone(&self.inner.manifests).write_owned().await;
        let now = Instant::now();
        self.wanted().retain(|_, wanted| wanted.is(now));
        closed
    }

    /// To be called before the registry is asked for the blobs, so that what it says holds for as long as they are wanted.
    pub async fn want(&self, digests: Vec<Digest>) -> Want {
        let _none_goes = self.inner.removing.lock().await;
        let now = Instant::now();
        let mut wanted = self.wanted();
        for digest in &digests {
            wanted.entry(*digest).or_insert(Wanted { holders: 0, until: now }).holders += 1;
        }
        drop(wanted);
        Want { gate: self.clone(), digests, for_a_push: false }
    }

    /// Whether nobody wants the blob. Nobody begins to while this is there.
    pub async fn may_go(&self, digest: &Digest) -> Option<OwnedMutexGuard<()>> {
        let none_begins = Arc::clone(&self.inner.removing).lock_owned().await;
        let is_wanted = self.wanted().get(digest).is_some_and(|wanted| wanted.is(Instant::now()));
        (!is_wanted).then_some(none_begins)
    }

    fn wanted(&self) -> MutexGuard<'_, HashMap<Digest, Wanted>> {
        self.inner.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wanted {
    fn is(&self, now: Instant) -> bool {
        self.holders > 0 || self.until > now
    }
}

impl Want {
    /// The registry has said to somebody that it has them, and a manifest may follow: they stay for the grace after this, too. Only
    /// then, so that nobody fills the memory with digests of what there is not.
    pub fn last(&mut self) {
        self.for_a_push = true;
    }
}

impl Drop for Want {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut wanted = self.gate.wanted();
        for digest in &self.digests {
            let Some(entry) = wanted.get_mut(digest) else { continue };
            entry.holders -= 1;
            if self.for_a_push {
                entry.until = now + self.gate.grace();
            }
            if !entry.is(now) {
                wanted.remove(digest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn may_go(gate: &Gate, what: &str) -> bool {
        gate.may_go(&Digest::of(what.as_bytes())).await.is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wanted_stays_and_what_a_push_wants_for_the_grace() {
        let gate = Gate::new(Duration::from_secs(10));
        let of = |what: &str| vec![Digest::of(what.as_bytes())];
        assert!(may_go(&gate, "a").await);
        let mut push = gate.want(of("a")).await;
        push.last();
        let now = gate.want(of("b")).await;
        let both = gate.want([of("a"), of("b")].concat()).await;
        drop((push, now));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(!may_go(&gate, "a").await && !may_go(&gate, "b").await && may_go(&gate, "c").await);
        drop(both);
        assert!(may_go(&gate, "a").await && may_go(&gate, "b").await);
        let mut push = gate.want(of("a")).await;
        push.last();
        drop(push);
        drop(gate.want(of("a")).await);
        drop(gate.want(of("nothing")).await);
        assert_eq!(gate.wanted().len(), 1);
        tokio::time::advance(Duration::from_secs(9)).await;
        assert!(!may_go(&gate, "a").await);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(may_go(&gate, "a").await);
        drop(gate.close().await);
        assert!(gate.wanted().is_empty(), "what is over is forgotten");
    }

    #[tokio::test]
    async fn nobody_begins_to_want_what_is_being_removed() {
        let gate = Gate::new(GRACE);
        let digest = Digest::of(b"a");
        let removal = gate.may_go(&digest).await;
        let mut want = std::pin::pin!(gate.want(vec![digest]));
        assert!(futures_util::poll!(want.as_mut()).is_pending());
        drop(removal);
        let _want = want.await;
        assert!(!may_go(&gate, "a").await);
    }

    #[tokio::test]
    async fn no_manifest_changes_while_it_is_closed() {
        let gate = Gate::new(GRACE);
        let (one, other) = (gate.change().await, gate.change().await);
        let mut close = std::pin::pin!(gate.close());
        assert!(futures_util::poll!(close.as_mut()).is_pending());
        drop((one, other));
        let closed = close.await;
        assert!(futures_util::poll!(std::pin::pin!(gate.change())).is_pending());
        // Blobs can be asked for.
        drop(gate.want(vec![Digest::of(b"a")]).await);
        drop(closed);
        gate.change().await;
    }
}
