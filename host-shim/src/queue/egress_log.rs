//! What a build's steps reached and were refused: in its events, in its record, and in the host's log.
//!
//! ```text
//! proxy ── reached, refused ────────────┐
//! sink ─── asked (a name) ──────────────┼─▶ each once, so many ─▶ channel ─▶ one task: masks, appends, logs
//!      ─── learn (a secret) ────────────┘                                        │
//! driver ── close ─▶ all that was stored, and from then on only the log ◀────────┘
//! ```
//! The proxy is not kept waiting, and a guest cannot fill the disk: what is told is told once, refusals and what was
//! reached have a bound each, and the channel has room for all of it. A kept VM still reaches out when its build has
//! ended; of that the host's log alone is told, for nothing may follow a build's last event.

mod writer;

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_protocol::secret::{MAX_SECRETS, SecretId, SecretValue};
use tokio::sync::{mpsc, oneshot};

use self::writer::Writer;
use crate::build::{BuildId, Reached};
use crate::egress::domains::plain;
use crate::egress::{Denied, Observer, Reach};
use crate::events::EventLog;

/// Hosts of one VM that events tell of, each of a step: refused ones, and reached ones. Enough to see what a build
/// wants, too few to fill a disk. A guest can make thousands in a second.
const MOST_TOLD: usize = 1000;

/// Hosts and ports of one VM in its build's record: a list has 200 builds.
const MOST_REACHED: usize = 256;

/// Everything that is ever told, the lines that say that there was more, and the end.
const ROOM: usize = 2 * MOST_TOLD + MOST_REACHED + MAX_SECRETS + 4;

/// What became of a host that a step wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fate {
    /// It was reached.
    Reached,
    /// The policy refused it.
    Denied(Denied),
    /// Its address was asked for, which nobody gives. `listed`: by way of the proxy the build may have it.
    Asked { listed: bool },
}

/// A host that a step wanted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Seen {
    /// As the guest says.
    pub(super) step: Option<u32>,
    pub(super) host: String,
    pub(super) port: Option<u16>,
    pub(super) fate: Fate,
}

/// What there was, without secrets.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct AllSeen {
    /// Each host and port once.
    pub(super) reached: Vec<Reached>,
    /// Each of a step.
    pub(super) wanted: Vec<Seen>,
}

/// What the task is told.
enum Told {
    Wanted(Seen),
    Reached(Reached),
    More(More),
    Secret(SecretId, SecretValue),
    Close(oneshot::Sender<AllSeen>),
}

/// There are more than are told.
#[derive(Clone, Copy)]
enum More {
    /// Hosts that were refused.
    Refused,
    /// Hosts that were reached.
    Allowed,
    /// Hosts and ports for the record.
    Reached,
}

/// The observer of one VM.
pub(super) struct EgressRecord {
    reach: Reach,
    heard: Mutex<Heard>,
    task: mpsc::Sender<Told>,
}

/// What the task was told already.
#[derive(Default)]
struct Heard {
    refused: HashSet<Seen>,
    allowed: HashSet<Seen>,
    reached: HashSet<Reached>,
}

impl EgressRecord {
    /// Of a build that may reach this. Its task ends with it.
    pub(super) fn new(id: BuildId, events: EventLog, reach: Reach) -> Arc<Self> {
        let (task, told) = mpsc::channel(ROOM);
        tokio::spawn(Writer::new(id, events).run(told));
        Arc::new(Self { reach, heard: Mutex::default(), task })
    }

    /// A step asked for the address of a name.
    pub(super) fn asked(&self, step: Option<u32>, host: &str) {
        let listed = match &self.reach {
            Reach::Nothing => false,
            Reach::Listed(domains) => domains.iter().any(|domain| domain.names(host)),
            Reach::Public => true,
        };
        self.refuse(Seen { step, host: plain(host), port: None, fate: Fate::Asked { listed } });
    }

    /// Hosts do not show this secret from now on.
    pub(super) async fn learn(&self, id: &SecretId, value: &SecretValue) {
        // A task that is gone shows nothing.
        let _ = self.task.send(Told::Secret(id.clone(), value.clone())).await;
    }

    /// The build is about to end. Everything that was told until now is stored; gives it.
    pub(super) async fn close(&self) -> AllSeen {
        let (answer, answered) = oneshot::channel();
        let _ = self.task.send(Told::Close(answer)).await;
        answered.await.unwrap_or_default()
    }

    /// What was reached until now.
    pub(super) fn reached_so_far(&self) -> Vec<Reached> {
        self.heard().reached.iter().cloned().collect()
    }

    fn refuse(&self, seen: Seen) {
        let mut heard = self.heard();
        self.tell(&mut heard.refused, MOST_TOLD, seen, Told::Wanted, More::Refused);
    }

    /// Tells what is new, and once that there is more than may be told.
    fn tell<T: Clone + Eq + Hash>(
        &self,
        known: &mut HashSet<T>,
        most: usize,
        what: T,
        told: impl FnOnce(T) -> Told,
        more: More,
    ) {
        // One above the bound stands for all that follow.
        if known.len() > most || known.contains(&what) {
            return;
        }
        let told = if known.len() == most { Told::More(more) } else { told(what.clone()) };
        // Secrets that were told many times may have taken the room: then it is told the next time.
        if self.task.try_send(told).is_ok() {
            known.insert(what);
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for EgressRecord {
    fn reached(&self, step: Option<u32>, host: &str, port: u16) {
        let host = plain(host);
        let mut heard = self.heard();
        let reached = Reached { host: host.clone(), port };
        self.tell(&mut heard.reached, MOST_REACHED, reached, Told::Reached, More::Reached);
        let seen = Seen { step, host, port: Some(port), fate: Fate::Reached };
        self.tell(&mut heard.allowed, MOST_TOLD, seen, Told::Wanted, More::Allowed);
    }

    fn refused(&self, step: Option<u32>, host: &str, port: u16, why: Denied) {
        self.refuse(Seen { step, host: plain(host), port: Some(port), fate: Fate::Denied(why) });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
