//! The task of a record: it alone knows the secrets, appends the events and writes the log.

use std::collections::HashSet;

use kiln_protocol::secret::{SecretId, SecretValue};
use tokio::sync::mpsc;

use super::{AllSeen, Fate, MOST_REACHED, MOST_TOLD, More, Seen, Told};
use crate::build::{BuildId, Reached};
use crate::events::{EventLog, payload};
use crate::secrets::Masker;
use crate::store::NewEvent;

/// Refusals of one VM in the host's log.
const MOST_LOGGED: u32 = 100;

/// Most of one transaction.
const BATCH: usize = 64;

pub(super) struct Writer {
    id: BuildId,
    events: EventLog,
    /// Of hosts, which are written in lower case.
    masker: Masker,
    /// Until the build ends.
    seen: Option<AllSeen>,
    /// Events name no ports: step, host, and whether it was allowed.
    told: HashSet<(Option<u32>, String, bool)>,
    logged: u32,
}

impl Writer {
    pub(super) fn new(id: BuildId, events: EventLog) -> Self {
        let (masker, told) = (Masker::default(), HashSet::new());
        Self { id, events, masker, seen: Some(AllSeen::default()), told, logged: 0 }
    }

    pub(super) async fn run(mut self, mut told: mpsc::Receiver<Told>) {
        let (mut batch, mut events) = (vec![], vec![]);
        while told.recv_many(&mut batch, BATCH).await > 0 {
            for told in batch.drain(..) {
                match told {
                    Told::Wanted(seen) => events.extend(self.wanted(seen).await),
                    Told::Reached(reached) => self.reached(reached).await,
                    Told::More(more) => events.push(of_host(payload::kiln_log(&line(more)))),
                    Told::Secret(id, value) => self.learn(&id, &value).await,
                    Told::Close(answer) => {
                        self.append(&mut events).await;
                        // Who asked may have gone.
                        let _ = answer.send(self.seen.take().unwrap_or_default());
                    }
                }
            }
            self.append(&mut events).await;
        }
    }

    async fn wanted(&mut self, mut seen: Seen) -> Option<NewEvent> {
        seen.host = self.masked(&seen.host).await;
        self.log(&seen);
        let Seen { step, host, fate, .. } = seen.clone();
        self.seen.as_mut()?.wanted.push(seen);
        let allowed = fate == Fate::Reached;
        let is_new = self.told.insert((step, host.clone(), allowed));
        is_new.then(|| of_host(payload::egress(step, &host, allowed)))
    }

    async fn reached(&mut self, Reached { host, port }: Reached) {
        let reached = Reached { host: self.masked(&host).await, port };
        // Two that differ in what is masked are one.
        if let Some(seen) = self.seen.as_mut().filter(|seen| !seen.reached.contains(&reached)) {
            seen.reached.push(reached);
        }
    }

    async fn masked(&mut self, host: &str) -> String {
        self.masker.prepare().await;
        self.masker.text(host)
    }

    /// A value, and how a host with it is written. One that cannot be masked is told of where the log's lines are.
    async fn learn(&mut self, id: &SecretId, value: &SecretValue) {
        let lower = SecretValue::new(value.expose().to_ascii_lowercase());
        for value in [value, &lower] {
            let _ = self.masker.learn(id.as_str(), value).await;
        }
    }

    async fn append(&mut self, events: &mut Vec<NewEvent>) {
        if self.seen.is_some() && !events.is_empty() {
            // The driver meets the same store, and ends the build for it.
            if let Err(error) = self.events.append(&self.id, events).await {
                tracing::error!(id = %self.id, error = %crate::causes::chain(&error), "cannot store what steps reached");
            }
        }
        events.clear();
    }

    fn log(&mut self, seen: &Seen) {
        let Seen { step, host, port, fate } = seen;
        let why = match fate {
            Fate::Reached => {
                tracing::debug!(id = %self.id, step, host, port, "a step reached");
                return;
            }
            Fate::Denied(why) => why.to_string(),
            Fate::Asked { .. } => "it asked for an address".to_owned(),
        };
        self.logged = self.logged.saturating_add(1);
        match self.logged {
            ..=MOST_LOGGED => {
                tracing::info!(id = %self.id, step, host, port, why, "a step was refused");
            }
            n if n == MOST_LOGGED + 1 => tracing::info!(
                id = %self.id,
                "steps were refused {MOST_LOGGED} times; further refusals of this VM are not shown"
            ),
            _ => {}
        }
    }
}

fn of_host(payload: serde_json::Value) -> NewEvent {
    payload::of_host(crate::clock::now(), payload)
}

fn line(more: More) -> String {
    match more {
        More::Refused => {
            format!("steps were refused more than {MOST_TOLD} hosts; further ones are not told")
        }
        More::Allowed => {
            format!("steps reached more than {MOST_TOLD} hosts; further ones are not told")
        }
        More::Reached => format!(
            "steps reached more than {MOST_REACHED} hosts and ports; the build's record has the first"
        ),
    }
}
