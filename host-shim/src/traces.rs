//! One trace for each build, for OpenTelemetry: the request, the queue, the VM's boot, the Dockerfile with its steps, the push and the
//! publication. Off unless `OTEL_EXPORTER_OTLP_ENDPOINT` says where to send them, and then nothing is kept or done.
//!
//! ```text
//! api (received) ─▶ Traces ◀─ events::EventLog (claim, change, append)
//!                     └─ a build has ended ─▶ otlp::Sender, a task ─▶ POST …/v1/traces
//! ```
//! What is under way is in memory, and bounded; a trace goes out whole when its build ends. A trace's id is its build's, where that is 128
//! bits in hex, as this server makes them: who knows a build finds its trace.

pub mod otlp;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::build::{Build, BuildId, Millis, Status};
use crate::store::NewEvent;

/// Spans of one build, its phases apart: a guest reports as many steps as it likes.
const MOST_SPANS: usize = 1000;
/// Builds whose requests are kept while they are queued; of more, the trace begins with the queue.
const MOST_BUILDS: usize = 10_000;
/// Ended builds that wait for being sent; of more, the trace is lost.
const MOST_WAITING: usize = 256;

/// Where spans go. Cheap to clone; the default goes nowhere.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Inner>>);

struct Inner {
    under_way: Mutex<HashMap<BuildId, Open>>,
    ended: mpsc::Sender<Trace>,
}

/// A build's spans, all of them ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// In hex, 32 digits.
    pub id: String,
    /// The first is the build's own, the others' parent or their parents'.
    pub spans: Vec<Span>,
}

/// Something that took time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// In hex, 16 digits.
    pub id: String,
    /// The span that it is part of.
    pub parent: Option<String>,
    /// What it was.
    pub name: String,
    /// When it began.
    pub from: Millis,
    /// When it ended.
    pub to: Millis,
    /// More about it.
    pub attributes: Vec<(&'static str, Value)>,
    /// Whether it failed, and of what.
    pub error: Option<String>,
}

/// What is known of a build that has not ended.
#[derive(Default)]
struct Open {
    root: String,
    begun: Option<Millis>,
    spans: Vec<Span>,
    phase: Option<Phase>,
    steps: HashMap<u64, (String, Millis)>,
}

struct Phase {
    name: &'static str,
    id: String,
    from: Millis,
}

impl Traces {
    /// Collects traces; they come out of the other end when their builds end.
    pub fn collected() -> (Self, mpsc::Receiver<Trace>) {
        let (ended, traces) = mpsc::channel(MOST_WAITING);
        (Self(Some(Arc::new(Inner { under_way: Mutex::default(), ended }))), traces)
    }

    /// A build was accepted, by a request that began then.
    pub fn received(&self, build: &Build, from: Millis) {
        let Some(inner) = &self.0 else { return };
        let mut builds = inner.lock();
        if builds.len() < MOST_BUILDS {
            let open = builds.entry(build.id.clone()).or_insert_with(Open::new);
            open.begun = Some(from);
            open.add("request", from, build.created_at);
        }
    }

    /// A build that was to be accepted was not.
    pub fn forgotten(&self, id: &BuildId) {
        if let Some(inner) = &self.0 {
            inner.lock().remove(id);
        }
    }

    /// A driver has claimed a build.
    pub fn claimed(&self, build: &Build, now: Millis) {
        let Some(inner) = &self.0 else { return };
        let mut builds = inner.lock();
        let open = builds.entry(build.id.clone()).or_insert_with(Open::new);
        if build.attempt <= 1 {
            open.add("queued", build.created_at, now);
        }
        open.enter("boot", now);
    }

    /// A build's VM has said Hello.
    pub fn booted(&self, build: &Build, now: Millis) {
        self.enter(build, "dockerfile", now);
    }

    /// A build's change is stored.
    pub fn changed(&self, build: &Build, now: Millis) {
        match build.status {
            Status::Queued => self.enter(build, "queued", now),
            Status::Building => {}
            Status::Pushing if build.publishing.is_none() => self.enter(build, "push", now),
            Status::Pushing => self.enter(build, "publish", now),
            Status::Ready | Status::Failed | Status::Cancelled => self.end(build, now),
        }
    }

    /// Events of a build are stored: steps begin and end by them.
    pub fn stored(&self, id: &BuildId, events: &[NewEvent]) {
        let Some(inner) = &self.0 else { return };
        let steps = events.iter().filter(|event| event.payload["type"] == "step");
        for event in steps {
            let mut builds = inner.lock();
            let Some(open) = builds.get_mut(id) else { return };
            open.step(event);
        }
    }

    fn enter(&self, build: &Build, phase: &'static str, now: Millis) {
        let Some(inner) = &self.0 else { return };
        if let Some(open) = inner.lock().get_mut(&build.id) {
            open.enter(phase, now);
        }
    }

    fn end(&self, build: &Build, now: Millis) {
        let Some(inner) = &self.0 else { return };
        let open = inner.lock().remove(&build.id);
        let trace = open.unwrap_or_else(Open::new).end(build, now);
        if inner.ended.try_send(trace).is_err() {
            tracing::warn!(build = %build.id, "a trace is lost: more wait than are kept");
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, HashMap<BuildId, Open>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn new() -> Self {
        Self { root: span_id(), ..Self::default() }
    }

    fn add(&mut self, name: &str, from: Millis, to: Millis) {
        self.spans.push(Span {
            id: span_id(),
            parent: Some(self.root.clone()),
            name: name.to_owned(),
            from,
            to,
            attributes: vec![],
            error: None,
        });
    }

    fn enter(&mut self, name: &'static str, now: Millis) {
        if self.phase.as_ref().is_some_and(|phase| phase.name == name) {
            return;
        }
        self.leave(now, None);
        self.phase = Some(Phase { name, id: span_id(), from: now });
    }

    fn leave(&mut self, now: Millis, error: Option<String>) {
        if let Some(Phase { name, id, from }) = self.phase.take() {
            let (name, parent) = (name.to_owned(), Some(self.root.clone()));
            self.spans.push(Span { id, parent, name, from, to: now, attributes: vec![], error });
        }
    }

    fn step(&mut self, event: &NewEvent) {
        let payload = &event.payload;
        let Some(index) = payload["index"].as_u64() else { return };
        if self.spans.len() >= MOST_SPANS {
            return;
        }
        let state = payload["state"].as_str().unwrap_or_default();
        if state == "started" {
            if self.steps.len() < MOST_SPANS {
                let name = payload["name"].as_str().unwrap_or_default();
                self.steps.insert(index, (name.to_owned(), event.at));
            }
            return;
        }
        let (name, from) = self
            .steps
            .remove(&index)
            .unwrap_or_else(|| (payload["name"].as_str().unwrap_or_default().to_owned(), event.at));
        let mut attributes =
            vec![("kiln.step.index", index.into()), ("kiln.step.state", state.into())];
        if let Some(code) = payload["exit_code"].as_i64() {
            attributes.push(("process.exit.code", code.into()));
        }
        let parent = self.phase.as_ref().map_or(&self.root, |phase| &phase.id).clone();
        let error = (state == "failed").then(|| "step_failed".to_owned());
        let (id, to) = (span_id(), event.at);
        self.spans.push(Span { id, parent: Some(parent), name, from, to, attributes, error });
    }

    fn end(mut self, build: &Build, now: Millis) -> Trace {
        let cause = build.failure.as_ref().map(|failure| failure.kind.as_str().to_owned());
        if build.started_at.is_none() {
            self.add("queued", build.created_at, now);
        }
        self.leave(now, cause.clone());
        let mut attributes = vec![
            ("kiln.build.id", build.id.as_str().into()),
            ("kiln.tenant", build.tenant.as_str().into()),
            ("kiln.build.status", build.status.as_str().into()),
        ];
        if let Some(cause) = &cause {
            attributes.push(("error.type", cause.as_str().into()));
        }
        let root = Span {
            id: self.root,
            parent: None,
            name: "build".to_owned(),
            from: self.begun.unwrap_or(build.created_at),
            to: now,
            attributes,
            error: cause,
        };
        let spans = std::iter::once(root).chain(self.spans).collect();
        Trace { id: trace_id(&build.id), spans }
    }
}

fn trace_id(id: &BuildId) -> String {
    let id = id.as_str();
    let is_one = id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if is_one { id.to_owned() } else { hex::encode(&Sha256::digest(id)[..16]) }
}

fn span_id() -> String {
    hex::encode(crate::random::bytes::<8>())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
