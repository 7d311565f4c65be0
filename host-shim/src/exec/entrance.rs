//! How a VM is entered: who dials, and the nonce to show.
//!
//! ```text
//! driver of a build ─┐ opens, while its VM works
//! task of an instance┴──▶ Door ◀── entrance() ── api ──▶ a session
//! ```
//! A door is there for as long as the build or the instance is live; it is open while there is a VM behind it that
//! takes sessions. Sessions hear of its closing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::port;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::vmm::{DialError, Dialer};

/// Connects to the agent's port for sessions.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// A new connection. It has a deadline of its own.
    async fn dial(&self) -> Result<Line, DialError>;
}

/// A connection into a VM.
pub struct Line {
    /// Its bytes.
    pub stream: UnixStream,
    /// What is held as long as the session lasts.
    pub hold: Option<Box<dyn Send>>,
}

#[async_trait]
impl Dial for Dialer {
    async fn dial(&self) -> Result<Line, DialError> {
        Ok(Line { stream: Self::dial(self, port::EXEC).await?, hold: None })
    }
}

/// The way into one VM.
#[derive(Clone)]
pub struct Entrance {
    dial: Arc<dyn Dial>,
    nonce: [u8; TOKEN_LEN],
    closed: CancellationToken,
}

impl Entrance {
    /// Into the VM that `dial` reaches and whose Welcome said `nonce`.
    pub fn new(dial: impl Dial, nonce: [u8; TOKEN_LEN]) -> Self {
        Self { dial: Arc::new(dial), nonce, closed: CancellationToken::new() }
    }

    /// Connects to the agent, which has not been spoken to yet.
    pub async fn dial(&self) -> Result<Line, DialError> {
        self.dial.dial().await
    }

    /// What the agent wants to see first.
    pub fn nonce(&self) -> [u8; TOKEN_LEN] {
        self.nonce
    }

    /// From now on the VM takes no sessions.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Resolves when the VM takes no sessions any more, and ends those that it has.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

/// Where those who may enter find the entrance.
#[derive(Clone, Default)]
pub struct Door(Arc<Mutex<Option<Entrance>>>);

/// An open door; it is closed when this is dropped.
#[must_use]
pub struct Opened {
    door: Door,
    closed: CancellationToken,
}

impl Door {
    /// The entrance, if there is one now.
    pub fn entrance(&self) -> Option<Entrance> {
        self.lock().clone()
    }

    /// Lets sessions in.
    pub fn open(&self, entrance: Entrance) -> Opened {
        let closed = entrance.closed.clone();
        *self.lock() = Some(entrance);
        Opened { door: self.clone(), closed }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Entrance>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        *self.door.lock() = None;
        self.closed.cancel();
    }
}

/// A door that is opened when its VM has begun with its job: before that the agent takes no sessions.
pub struct Doorway {
    door: Door,
    entrance: Option<Entrance>,
    opened: Option<Opened>,
}

impl Doorway {
    /// For the VM that `dialer` reaches. One that cannot be dialled works all the same, and cannot be entered.
    pub fn new(door: Door, dialer: std::io::Result<Dialer>, nonce: [u8; TOKEN_LEN]) -> Self {
        let entrance = match dialer {
            Ok(dialer) => Some(Entrance::new(dialer, nonce)),
            Err(error) => {
                tracing::error!(%error, "a VM cannot be entered: its sockets are not to be had");
                None
            }
        };
        Self { door, entrance, opened: None }
    }

    /// Opens it, once.
    pub fn begun(&mut self) {
        if let Some(entrance) = self.entrance.take() {
            self.opened = Some(self.door.open(entrance));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nowhere;

    #[async_trait]
    impl Dial for Nowhere {
        async fn dial(&self) -> Result<Line, DialError> {
            Err(DialError::NotTheDevice)
        }
    }

    #[tokio::test]
    async fn who_is_inside_hears_of_the_closing() {
        let door = Door::default();
        assert!(door.entrance().is_none());
        let opened = door.open(Entrance::new(Nowhere, [1; TOKEN_LEN]));
        let entrance = door.entrance().map(|entrance| (entrance.nonce(), entrance));
        let Some((nonce, entrance)) = entrance else { panic!("it is open") };
        assert_eq!(nonce, [1; TOKEN_LEN]);
        assert!(!entrance.closed.is_cancelled());
        drop(opened);
        entrance.closed().await;
        assert!(door.entrance().is_none());
    }
}
