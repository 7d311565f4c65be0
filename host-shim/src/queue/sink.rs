//! What the guest reports, on its way into the store.

use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::event::{Event, NumberedEvent, Phase, StepState};
use kiln_protocol::message::AgentUsage;
use kiln_protocol::secret::{SecretAnswer, SecretId};
use tokio::time::Instant;

use super::egress_log::EgressRecord;
use super::journal::Journal;
use super::workshop::Workshop;
use crate::build::{Build, Change, Status};
use crate::events::payload;
use crate::exec::Doorway;
use crate::gateway::guests::GuestContext;
use crate::secrets::{self, Masker};
use crate::session::{Sink, Tokens};
use crate::store::{Fence, NewEvent};

/// Stores a build's events and follows its phases.
pub(super) struct BuildSink<'d> {
    workshop: &'d Workshop,
    build: &'d mut Build,
    fence: Fence,
    context: Arc<GuestContext>,
    vm_started: Instant,
    hello: Option<Instant>,
    begun: bool,
    /// By the guest's clock, when its engine began with the Dockerfile.
    building_at: Option<u64>,
    /// What counts towards the log limit so far.
    charged: u64,
    /// Knows the secrets that the guest was given.
    masker: Masker,
    /// Opened when the VM begins; closed with the session.
    doorway: Doorway,
    /// What steps reach, where they have a network.
    egress: Option<Arc<EgressRecord>>,
    /// For the server that comes after this one.
    journal: Arc<Journal>,
}

/// What an honest guest, which ends its build at the limit by itself, still tells after that: how its step ended.
const LAST_EVENTS: u64 = 64 * 1024;

/// The guest sent more log content than the build may have.
#[derive(Debug, thiserror::Error)]
#[error("the build printed more than its log limit of {0} bytes")]
pub(super) struct LogLimit(pub(super) u64);

impl<'d> BuildSink<'d> {
    pub(super) fn new(
        workshop: &'d Workshop,
        build: &'d mut Build,
        fence: Fence,
        context: Arc<GuestContext>,
        vm_started: Instant,
        doorway: Doorway,
        journal: Arc<Journal>,
    ) -> Self {
        Self {
            workshop,
            build,
            fence,
            context,
            vm_started,
            hello: None,
            begun: false,
            building_at: None,
            charged: 0,
            masker: Masker::default(),
            doorway,
            egress: None,
            journal,
        }
    }

    /// With what is told of the steps' network.
    pub(super) fn with_egress(mut self, egress: Option<Arc<EgressRecord>>) -> Self {
        self.egress = egress;
        self
    }

    /// Of a VM that began with an earlier server: it can be entered at once.
    pub(super) fn begun_before(mut self) -> Self {
        self.begun = true;
        self.doorway.begun();
        self
    }

    /// What else there is to mask of the build, once its session is over.
    pub(super) fn into_masker(self) -> Masker {
        self.masker
    }

    /// Whether the VM has reported anything of the build.
    pub(super) fn begun(&self) -> bool {
        self.begun
    }

    /// How long the build may run.
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_secs(self.build.request.timeout_seconds.into())
    }

    /// Takes the guest's secrets out of what is shown.
    fn mask(&mut self, event: &mut Event) {
        if self.masker.is_empty() {
            return;
        }
        match event {
            Event::Log(log) => {
                log.content = self.masker.part(log.stream, log.step, &log.content, log.partial);
            }
            Event::Step(step) => step.name = self.masker.text(&step.name),
            Event::Phase(_) | Event::Name(_) => {}
        }
    }

    async fn store(&mut self, batch: &mut Vec<NewEvent>) -> anyhow::Result<()> {
        if !batch.is_empty() {
            self.workshop.events.append(&self.build.id, batch).await?;
            batch.clear();
        }
        Ok(())
    }

    /// The engine pushes from now on: its uploads are taken.
    async fn pushing(&mut self, event: &NumberedEvent) -> anyhow::Result<()> {
        if self.build.status == Status::Building {
            let told = NewEvent {
                at: crate::clock::now(),
                agent_seq: Some(event.seq),
                payload: payload::status(Status::Pushing, None),
            };
            let now = crate::clock::now();
            let id = &self.build.id;
            let told = [told];
            let change = self.workshop.events.change(id, self.fence, Change::Push, now, &told);
            // What the driver knows beyond the stored state is stored at the end.
            self.build.status = change.await?.status;
        }
        self.context.set_pushing(true);
        Ok(())
    }

    /// Counts towards the log limit.
    fn charge(&mut self, bytes: u64) -> anyhow::Result<()> {
        self.charged = self.charged.saturating_add(bytes);
        if self.charged > self.workshop.log_limit.saturating_add(LAST_EVENTS) {
            return Err(LogLimit(self.workshop.log_limit).into());
        }
        Ok(())
    }

    fn note(&mut self, numbered: &NumberedEvent) -> anyhow::Result<()> {
        let usage = &mut self.build.usage;
        match &numbered.event {
            Event::Log(log) => {
                usage.log_bytes = Some(usage.log_bytes.unwrap_or(0) + log.content.len() as u64);
            }
            Event::Step(step) => {
                if let StepState::Ended(end) = &step.state {
                    usage.memory_peak_bytes =
                        usage.memory_peak_bytes.max(Some(end.memory_peak_bytes));
                }
            }
            Event::Phase(Phase::Building) => self.building_at = Some(numbered.at_ms),
            Event::Phase(Phase::Pushing) => {
                usage.engine_build_ms =
                    self.building_at.map(|from| numbered.at_ms.saturating_sub(from));
            }
            Event::Phase(_) | Event::Name(_) => {}
        }
        self.charge(numbered.event.cost())
    }
}

impl Sink for BuildSink<'_> {
    async fn events(&mut self, reported: Vec<NumberedEvent>) -> anyhow::Result<()> {
        let arrived = Instant::now();
        self.begun = true;
        self.doorway.begun();
        self.masker.prepare().await;
        let mut batch = Vec::with_capacity(reported.len());
        for mut event in reported {
            self.note(&event)?;
            self.mask(&mut event.event);
            if let Event::Name(name) = &event.event {
                // Where there is no network, nobody asks.
                if let Some(egress) = &self.egress {
                    egress.asked(name.step, &name.host);
                }
            } else if event.event == Event::Phase(Phase::Pushing) {
                self.store(&mut batch).await?;
                self.pushing(&event).await?;
            } else if let Some(event) = payload::from_agent(&event, crate::clock::now()) {
                batch.push(event);
            }
        }
        self.store(&mut batch).await?;
        crate::points::point("events");
        self.workshop.events.metrics().durable(arrived.elapsed());
        Ok(())
    }

    async fn hello(&mut self, agent: &str, image: &str) {
        let now = Instant::now();
        self.hello = Some(now);
        let boot = now - self.vm_started;
        crate::points::point("hello");
        self.build.usage.boot_ms = u64::try_from(boot.as_millis()).ok();
        self.workshop.events.booted(self.build, boot);
        tracing::info!(agent = %agent.escape_default(), image = %image.escape_default(), boot_ms = boot.as_millis(), "the agent connected");
    }

    async fn engine_started(&mut self) {
        if let Some(hello) = self.hello.take() {
            self.build.usage.engine_start_ms = u64::try_from(hello.elapsed().as_millis()).ok();
        }
    }

    async fn agent_usage(&mut self, agent: AgentUsage) {
        let usage = &mut self.build.usage;
        usage.engine_spawn_ms = agent.engine_spawn_us.map(|us| us / 1000);
        usage.agent_memory_peak_bytes = Some(agent.memory_peak_bytes);
    }

    async fn secret(&mut self, id: &SecretId) -> anyhow::Result<SecretAnswer> {
        let Workshop { store, vault, .. } = self.workshop;
        let answer = secrets::answer(store.as_ref(), vault, self.build, id).await?;
        let given = matches!(answer, SecretAnswer::Value(_));
        tracing::info!(secret = %id, given, "the build asked for a secret");
        // Before the guest has it, and can print it or send it.
        if let (SecretAnswer::Value(value), Some(egress)) = (&answer, &self.egress) {
            egress.learn(id, value).await;
        }
        if let SecretAnswer::Value(value) = &answer
            && let Err(why) = self.masker.learn(id.as_str(), value).await
        {
            let line = format!("warning: the secret {id} {why}");
            let warning = payload::of_host(crate::clock::now(), payload::kiln_log(&line));
            self.store(&mut vec![warning]).await?;
        }
        Ok(answer)
    }

    fn tokens(&mut self, tokens: &Tokens) {
        self.journal.change(|notes| notes.tokens = Some(tokens.clone()));
        crate::points::point("tokens");
    }

    fn source_sent(&mut self) {
        let usage = self.build.usage;
        self.journal.change(|notes| {
            notes.source_sent = true;
            notes.usage = usage;
        });
    }
}
