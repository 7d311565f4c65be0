//! What the server counts and measures, for `GET /metrics`.
//!
//! ```text
//! events::EventLog (claim, change, append) ─▶ Metrics ◀─ http (every answer), queue::sink (boots, lag)
//!                                               ▲
//!                     api::metrics ── encode ───┘  with what is looked up then: queue, kept VMs, sessions
//! ```
//! **Invariant**: no label holds what a client, a tenant or a guest has chosen: labels are words of this program, and there
//! are so many of them that the number of series has a bound.

pub mod http;
mod phases;

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use self::phases::Phases;
use crate::build::{Build, FailureKind, Millis, Status};
use crate::instances::{End, State};
use crate::retention::Collected;
use crate::store::{NewEvent, StoreError, Unfinished};

/// The media type of [`Metrics::encode`]: OpenMetrics 1.0, which Prometheus reads.
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What every name begins with.
const PREFIX: &str = "kiln";

/// Of what people wait for, in seconds: from a warm cache to the longest builds.
const LONG: [f64; 15] =
    [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0];
/// Of a boot, in seconds: 0.3 with KVM, 12 under emulation on a busy host, 45 at most.
const BOOT: [f64; 12] = [0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 45.0];
/// Of a durable write, in seconds.
const WRITE: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// How instances end: with their program, because Kiln could not run them or had to end them, or deleted before they ran.
const ENDS: [&str; 3] = ["exited", "failed", "cancelled"];

/// What retention removes.
const REMOVED: [&str; 6] = ["log_event", "build", "session", "source", "image", "blob"];

/// Labels by name, their values words of this program.
type Words<const N: usize> = [(&'static str, &'static str); N];
type Histograms<const N: usize> = Family<Words<N>, Histogram, fn() -> Histogram>;

/// The counters of a server. Cheap to clone.
#[derive(Clone, Default)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    finished: Family<Words<2>, Counter>,
    phases: Histograms<2>,
    under_way: Phases,
    boots: Histogram,
    lag: Histogram,
    events: Counter,
    log_bytes: Counter,
    source_bytes: Counter,
    staged_bytes: Counter,
    write_errors: Family<Words<1>, Counter>,
    instances_started: Counter,
    instances_ended: Family<Words<1>, Counter>,
    removed: Family<Words<1>, Counter>,
    removed_log_bytes: Counter,
    removed_blob_bytes: Counter,
    requests: Family<http::Answer, Counter>,
    refusals: Family<Words<1>, Counter>,
}

/// What is looked up when somebody asks, and not counted before.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// Builds in the store; `None` when it does not answer, and then nothing is said of them.
    pub builds: Option<Unfinished>,
    /// By the host's clock.
    pub at: Millis,
    /// Instances, in the order of [`State::ALL`].
    pub instances: [usize; State::ALL.len()],
    /// VMs of failed builds.
    pub kept: usize,
    /// People and programs in VMs.
    pub sessions: usize,
}

impl Metrics {
    /// A driver has claimed a build.
    pub fn claimed(&self, build: &Build, now: Millis) {
        if build.attempt <= 1 {
            self.phase("queued", "done", between(build.created_at, now));
        }
        self.inner.under_way.enter(&build.id, phases::BOOT);
    }

    /// A build's VM has said Hello so long after its start.
    pub fn booted(&self, build: &Build, after: Duration) {
        self.inner.boots.observe(after.as_secs_f64());
        self.next_phase(build, phases::BUILD);
    }

    /// A build's change is stored.
    pub fn changed(&self, build: &Build, now: Millis) {
        match build.status {
            Status::Queued => self.leave(build, "lost"),
            Status::Building => {}
            Status::Pushing if build.publishing.is_none() => {
                self.next_phase(build, phases::PUSH);
            }
            Status::Pushing => self.next_phase(build, phases::PUBLISH),
            Status::Ready => self.end(build, "done", now),
            Status::Failed => self.end(build, "failed", now),
            Status::Cancelled => self.end(build, "cancelled", now),
        }
    }

    /// Events are stored.
    pub fn stored(&self, events: &[NewEvent]) {
        let content = |event: &NewEvent| event.payload["content"].as_str().map_or(0, str::len);
        self.inner.events.inc_by(events.len() as u64);
        self.inner.log_bytes.inc_by(events.iter().map(content).sum::<usize>() as u64);
    }

    /// What a guest has reported is durable so long after its arrival.
    pub fn durable(&self, after: Duration) {
        self.inner.lag.observe(after.as_secs_f64());
    }

    /// A source is received, and its build stored.
    pub fn source(&self, bytes: u64) {
        self.inner.source_bytes.inc_by(bytes);
    }

    /// A build has staged so much of an image.
    pub fn staged(&self, bytes: u64) {
        self.inner.staged_bytes.inc_by(bytes);
    }

    /// An instance's program runs.
    pub fn instance_runs(&self) {
        self.inner.instances_started.inc();
    }

    /// An instance has ended; `wanted`: somebody, or the end of the server, asked for it.
    pub fn instance_ended(&self, end: &End, wanted: bool) {
        let [exited, failed, cancelled] = ENDS;
        let outcome = match (end.exit_code, wanted) {
            (Some(_), _) => exited,
            (None, false) => failed,
            (None, true) => cancelled,
        };
        self.inner.instances_ended.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// A round of retention has removed that.
    pub fn removed(&self, collected: &Collected) {
        let Collected { log_events, log_bytes, builds, sessions, sources, .. } = *collected;
        let Collected { images, blobs, blob_bytes, .. } = *collected;
        let all = [log_events, builds, sessions, sources, images, blobs];
        for (what, n) in REMOVED.into_iter().zip(all) {
            self.inner.removed.get_or_create(&[("what", what)]).inc_by(n);
        }
        self.inner.removed_log_bytes.inc_by(log_bytes);
        self.inner.removed_blob_bytes.inc_by(blob_bytes);
    }

    /// Looks at what became of a write to the store.
    pub fn tried<T>(&self, result: &Result<T, StoreError>) {
        if let Err(StoreError::Database { operation, .. }) = result {
            self.inner.write_errors.get_or_create(&[("operation", *operation)]).inc();
        }
    }

    /// All of it, as [`MEDIA_TYPE`].
    pub fn encode(&self, now: &Now) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        text::encode_registry(&mut text, &self.inner.registry)?;
        text::encode_registry(&mut text, &momentary(now))?;
        text::encode_eof(&mut text)?;
        Ok(text)
    }

    fn end(&self, build: &Build, outcome: &'static str, now: Millis) {
        if build.started_at.is_none() {
            self.phase("queued", outcome, between(build.created_at, now));
        }
        self.leave(build, outcome);
        let cause = build.failure.as_ref().map_or("none", |failure| failure.kind.as_str());
        self.finished(build.status, cause).inc();
    }

    fn finished(
        &self,
        status: Status,
        cause: &'static str,
    ) -> impl std::ops::Deref<Target = Counter> {
        self.inner.finished.get_or_create(&[("outcome", status.as_str()), ("cause", cause)])
    }

    fn next_phase(&self, build: &Build, next: &'static str) {
        if let Some((phase, lasted)) = self.inner.under_way.enter(&build.id, next) {
            self.phase(phase, "done", lasted);
        }
    }

    fn leave(&self, build: &Build, outcome: &'static str) {
        if let Some((phase, lasted)) = self.inner.under_way.leave(&build.id) {
            self.phase(phase, outcome, lasted);
        }
    }

    fn phase(&self, phase: &'static str, outcome: &'static str, lasted: Duration) {
        let labels = [("phase", phase), ("outcome", outcome)];
        self.inner.phases.get_or_create(&labels).observe(lasted.as_secs_f64());
    }
}

impl Default for Inner {
    fn default() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let mut add = Adding(&mut registry);
        let inner = Self {
            finished: add.one("builds_finished", "Builds that ended, by outcome and cause of failure", Family::default()),
            phases: add.of(
                "build_phase_duration",
                "How long builds were in a phase, and how it ended: done, failed, cancelled, or lost with its host",
                Unit::Seconds,
                Family::new_with_constructor(|| Histogram::new(LONG)),
            ),
            under_way: Phases::default(),
            boots: add.of(
                "vm_boot_duration",
                "From the processes of a build's VM running to its agent's Hello",
                Unit::Seconds,
                Histogram::new(BOOT),
            ),
            lag: add.of(
                "event_lag",
                "From the arrival of a build's events to their being durable, by batches",
                Unit::Seconds,
                Histogram::new(WRITE),
            ),
            events: add.one("build_events", "Events of builds that were stored", Counter::default()),
            log_bytes: add.of("build_log", "Log content that was stored", Unit::Bytes, Counter::default()),
            source_bytes: add.of("build_source", "Sources of builds that were accepted", Unit::Bytes, Counter::default()),
            staged_bytes: add.of("build_staged", "What builds pushed to staging", Unit::Bytes, Counter::default()),
            write_errors: add.one(
                "build_write_errors",
                "Writes of builds and their events that the store failed, by what was tried",
                Family::default(),
            ),
            instances_started: add.one("instances_started", "Instances whose program began to run", Counter::default()),
            instances_ended: add.one(
                "instances_ended",
                "Instances that ended: exited with their program, failed, or were cancelled before it ran",
                Family::default(),
            ),
            removed: add.one("removed", "What was removed because it was old, by what it was", Family::default()),
            removed_log_bytes: add.of("removed_log", "Logs that were removed, as they were stored", Unit::Bytes, Counter::default()),
            removed_blob_bytes: add.of("removed_blob", "Blobs that were removed from the registry", Unit::Bytes, Counter::default()),
            requests: add.one(
                "http_requests",
                "Requests that were answered, by method, route and class of status",
                Family::default(),
            ),
            refusals: add.one("http_errors", "Refusals of API and registry, by their code", Family::default()),
            registry: Registry::default(),
        };
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("server", "The server", version);
        // A series that begins with its first event has no rate for it.
        for status in [Status::Ready, Status::Cancelled] {
            let labels = [("outcome", status.as_str()), ("cause", "none")];
            drop(inner.finished.get_or_create(&labels));
        }
        for outcome in ENDS {
            drop(inner.instances_ended.get_or_create(&[("outcome", outcome)]));
        }
        for what in REMOVED {
            drop(inner.removed.get_or_create(&[("what", what)]));
        }
        for kind in FailureKind::ALL {
            let labels = [("outcome", Status::Failed.as_str()), ("cause", kind.as_str())];
            drop(inner.finished.get_or_create(&labels));
        }
        Self { registry, ..inner }
    }
}

/// Registers what it hands on.
struct Adding<'r>(&'r mut Registry);

impl Adding<'_> {
    fn one<M: Measure>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    fn of<M: Measure>(&mut self, name: &str, help: &str, unit: Unit, metric: M) -> M {
        self.0.register_with_unit(name, help, unit, metric.clone());
        metric
    }
}

/// What can be registered and kept.
trait Measure: Clone + prometheus_client::registry::Metric {}

impl<M: Clone + prometheus_client::registry::Metric> Measure for M {}

/// A registry of what is looked up.
fn momentary(now: &Now) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let gauge = |value: i64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(value);
        gauge
    };
    if let Some(Unfinished { queued, oldest, building, pushing }) = now.builds {
        registry.register("queue_builds", "Builds that wait for a VM", gauge(queued.into()));
        let waits: Gauge<f64, std::sync::atomic::AtomicU64> = Gauge::default();
        waits.set(oldest.map_or(0.0, |since| between(since, now.at).as_secs_f64()));
        let help = "How long the oldest of them waits";
        registry.register_with_unit("queue_oldest", help, Unit::Seconds, waits);
        let active = Family::<Words<1>, Gauge>::default();
        for (status, count) in [(Status::Building, building), (Status::Pushing, pushing)] {
            active.get_or_create(&[("status", status.as_str())]).set(count.into());
        }
        registry.register("active_builds", "Builds that a driver has, by status", active);
    }
    let count = |n: usize| gauge(i64::try_from(n).unwrap_or(i64::MAX));
    let instances = Family::<Words<1>, Gauge>::default();
    for (state, n) in State::ALL.into_iter().zip(now.instances) {
        instances
            .get_or_create(&[("state", state.as_str())])
            .set(i64::try_from(n).unwrap_or(i64::MAX));
    }
    registry.register("instances", "Instances that there are, by state", instances);
    registry.register("kept_vms", "VMs of failed builds that can be entered", count(now.kept));
    registry.register("exec_sessions", "Sessions in VMs", count(now.sessions));
    registry
}

fn between(from: Millis, to: Millis) -> Duration {
    Duration::from_millis(u64::try_from(to - from).unwrap_or(0))
}
