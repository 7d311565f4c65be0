//! How many manifests of one VM may be in memory.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// At one time. A manifest has 4 MiB at most, engines ask for one after the other.
pub(super) const MAX_HELD: usize = 8;

/// Room for [`MAX_HELD`] manifests. Who asks for one more waits.
#[derive(Clone, Debug)]
pub(super) struct ManifestRoom(Arc<Semaphore>);

/// Room for one. Without a permit only if the semaphore were closed, which nobody does.
pub(super) struct Place(Option<OwnedSemaphorePermit>);

impl ManifestRoom {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(MAX_HELD)))
    }

    /// Waits for room.
    pub(super) async fn place(&self) -> Place {
        Place(Arc::clone(&self.0).acquire_owned().await.ok())
    }
}

impl Place {
    /// Keeps the place for as long as any part of the bytes is there: a guest may read them slowly.
    pub(super) fn hold(self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Held { bytes, _place: self.0 })
    }
}

struct Held {
    bytes: Bytes,
    _place: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future as _;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[tokio::test]
    async fn a_place_is_free_again_when_the_last_part_of_the_bytes_is_gone() {
        let room = ManifestRoom::new();
        let mut held = Vec::new();
        for _ in 0..MAX_HELD {
            held.push(room.place().await.hold(Bytes::from_static(b"manifest")));
        }
        let mut one_more = std::pin::pin!(room.place());
        let mut context = Context::from_waker(Waker::noop());
        assert!(one_more.as_mut().poll(&mut context).is_pending());
        let first = held.remove(0);
        let part = first.slice(2..4);
        assert_eq!(&part[..], b"ni");
        drop(first);
        assert!(one_more.as_mut().poll(&mut context).is_pending());
        drop(part);
        assert!(matches!(one_more.as_mut().poll(&mut context), Poll::Ready(_)));
    }
}
