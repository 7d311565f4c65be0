//! One kept VM: the task that owns it.

use std::io;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Kept, Lodger};
use crate::build::{BuildId, Millis};
use crate::causes::chain;
use crate::clock;
use crate::exec::{Dial, Entrance, Line};
use crate::vmm::{DialError, Vm, VmmError};

/// How long a VM runs on after its last session: the agent ends what that left behind, and the next command of a
/// script finds it awake.
const LINGER: Duration = Duration::from_secs(2);

/// What stays, as far as its stay needs it: a VM. Tests keep others.
#[async_trait]
pub trait Machine: Send + Sync + 'static {
    /// The way into it, while it runs.
    fn dial(&self) -> io::Result<Box<dyn Dial>>;
    /// The process that has its memory.
    fn qemu(&self) -> Option<i32>;
    /// Stops it: it takes no more time of the host's.
    fn pause(&self) -> Result<(), VmmError>;
    /// Lets it run on.
    fn resume(&self) -> Result<(), VmmError>;
    /// Resolves when it is over, with why. Cancel-safe.
    async fn over(&self) -> String;
    /// Removes it, and says so when something stays.
    async fn remove(self);
}

#[async_trait]
impl Machine for Vm {
    fn dial(&self) -> io::Result<Box<dyn Dial>> {
        Ok(Box::new(self.dialer()?))
    }

    fn qemu(&self) -> Option<i32> {
        Some(self.pids().qemu.pid)
    }

    fn pause(&self) -> Result<(), VmmError> {
        Self::pause(self)
    }

    fn resume(&self) -> Result<(), VmmError> {
        Self::resume(self)
    }

    async fn over(&self) -> String {
        self.exited().await.to_string()
    }

    async fn remove(self) {
        if let Err(error) = self.destroy().await {
            tracing::error!(error = %chain(&error), "the VM was not removed completely");
        }
    }
}

/// What a kept VM's task is asked for.
pub(super) enum Ask {
    /// Somebody enters: let it run.
    Enter(oneshot::Sender<Result<(), VmmError>>),
    /// A session is over.
    Leave,
    /// It stays until then.
    Until(Millis),
    /// It is to go.
    Go,
}

/// The way into a kept VM: it runs as long as somebody is in it.
pub(super) struct Door {
    dial: Box<dyn Dial>,
    asks: mpsc::UnboundedSender<Ask>,
}

impl Door {
    pub(super) fn new(dial: Box<dyn Dial>, asks: mpsc::UnboundedSender<Ask>) -> Self {
        Self { dial, asks }
    }
}

/// A session in a kept VM.
struct Visit(mpsc::UnboundedSender<Ask>);

impl Drop for Visit {
    fn drop(&mut self) {
        // It may be gone.
        let _ = self.0.send(Ask::Leave);
    }
}

#[async_trait]
impl Dial for Door {
    async fn dial(&self) -> Result<Line, DialError> {
        let gone = || DialError::Asleep("it is kept no more".into());
        let (answer, entered) = oneshot::channel();
        self.asks.send(Ask::Enter(answer)).map_err(|_| gone())?;
        // From here on it is counted.
        let visit = Visit(self.asks.clone());
        match entered.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(DialError::Asleep(chain(&error))),
            Err(_) => return Err(gone()),
        }
        let stream = self.dial.dial().await?.stream;
        Ok(Line { stream, hold: Some(Box::new(visit)) })
    }
}

/// A VM's stay.
pub(super) struct Stay {
    pub(super) kept: Kept,
    pub(super) id: BuildId,
    pub(super) entrance: Entrance,
    pub(super) until: Millis,
    /// Goes when the VM goes.
    pub(super) with_it: Box<dyn Send + Sync>,
}

impl Stay {
    /// Has the VM stay, then removes it.
    pub(super) async fn run(
        self,
        vm: impl Machine,
        mut asked: mpsc::UnboundedReceiver<Ask>,
        stop: CancellationToken,
    ) {
        let why = self.stay(&vm, &mut asked, &stop).await;
        tracing::info!(id = %self.id, why, "a kept VM goes");
        self.with_lodger(|lodger| lodger.going = true);
        self.entrance.close();
        drop(self.with_it);
        vm.remove().await;
        self.kept.lock().vms.retain(|lodger| lodger.lease.id != self.id);
        // Who waits for its end sees this close.
        drop(asked);
    }

    /// Why it goes.
    async fn stay(
        &self,
        vm: &impl Machine,
        asked: &mut mpsc::UnboundedReceiver<Ask>,
        stop: &CancellationToken,
    ) -> String {
        if let Err(error) = vm.pause() {
            return chain(&error);
        }
        tracing::info!(id = %self.id, "a failed build's VM is kept, and paused");
        let (mut until, mut sessions) = (deadline(self.until), 0usize);
        let mut pause_at = None;
        let mut paused = true;
        loop {
            let ask = tokio::select! {
                biased;
                () = stop.cancelled() => return "the server stops".into(),
                () = tokio::time::sleep_until(until) => return "its lease ended".into(),
                why = vm.over() => return why,
                ask = asked.recv() => ask,
                () = or_never(pause_at) => {
                    pause_at = None;
                    if let Err(error) = vm.pause() {
                        return chain(&error);
                    }
                    paused = true;
                    continue;
                }
            };
            match ask {
                Some(Ask::Enter(answer)) => {
                    sessions += 1;
                    pause_at = None;
                    if paused && let Err(error) = vm.resume() {
                        // Nobody knows whether it runs.
                        let why = chain(&error);
                        let _ = answer.send(Err(error));
                        return why;
                    }
                    paused = false;
                    // Who asked may be gone, and leaves then.
                    let _ = answer.send(Ok(()));
                }
                Some(Ask::Leave) => {
                    sessions = sessions.saturating_sub(1);
                    if sessions == 0 && !paused {
                        pause_at = Some(Instant::now() + LINGER);
                    }
                }
                Some(Ask::Until(then)) => until = deadline(then),
                Some(Ask::Go) | None => return "it was released".into(),
            }
            self.with_lodger(|lodger| lodger.lease.sessions = sessions);
        }
    }

    fn with_lodger(&self, change: impl FnOnce(&mut Lodger)) {
        let vms = &mut self.kept.lock().vms;
        vms.iter_mut().find(|lodger| lodger.lease.id == self.id).map(change);
    }
}

fn deadline(until: Millis) -> Instant {
    let left = u64::try_from(until - clock::now()).unwrap_or(0);
    Instant::now() + Duration::from_millis(left)
}

async fn or_never(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
