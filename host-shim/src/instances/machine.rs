//! Runs an instance in a VM: room, image, disk, VM, session. Whatever happens, the VM is gone at the end.
//!
//! Builds and instances share the host's room for VMs. Instances have no end of their own, so they take all but
//! one place of it (where there is only one, that one): builds go on however many instances there are.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_protocol::event::{Event, NumberedEvent, Outcome, Phase};
use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::job::{Job, Limits, Role};
use kiln_protocol::message::AgentUsage;
use kiln_protocol::secret::{SecretAnswer, SecretId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::disk;
use super::instance::{Change, End, State};
use super::{Owner, Runner, Work};
use crate::causes::chain;
use crate::events::payload;
use crate::exec::Doorway;
use crate::queue::Workshop;
use crate::session;
use crate::vmm::{Vm, VmSpec};

/// As for builds: generous, for software emulation on a busy host.
const BOOT_DEADLINE: Duration = Duration::from_secs(45);
/// How many VMs are booted before it is given up: a boot can hang under software emulation.
const BOOTS: u32 = 2;
/// The agent gives the program 10 s after its stop signal, and then kills it.
const STOP_GRACE: Duration = Duration::from_secs(12);
/// How long a session may take to read what a VM that ended had still sent.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Processes of an instance at one time.
const MAX_PROCESSES: u32 = 4096;
/// Of the disk for what an instance writes, in GiB. It is sparse, and builds have a template of this size.
const SCRATCH_GB: u32 = 10;
/// Of SIGKILL.
const KILLED: u8 = 128 + 9;

/// Runs instances in VMs.
pub struct Machines {
    workshop: Arc<Workshop>,
    /// Of the host, builds included.
    room: Arc<Semaphore>,
    /// Of instances.
    own: Arc<Semaphore>,
    /// The server ends now.
    abandon: CancellationToken,
}

impl Machines {
    /// Shares `room`, of which there are `max_vms` places, with builds.
    pub fn new(
        workshop: Arc<Workshop>,
        room: Arc<Semaphore>,
        max_vms: usize,
        abandon: CancellationToken,
    ) -> Self {
        let own = Arc::new(Semaphore::new(max_vms.saturating_sub(1).max(1)));
        Self { workshop, room, own, abandon }
    }

    async fn place(&self) -> Option<[OwnedSemaphorePermit; 2]> {
        let own = Arc::clone(&self.own).acquire_owned().await.ok()?;
        let room = Arc::clone(&self.room).acquire_owned().await.ok()?;
        Some([own, room])
    }

    /// The image's disk. It has no name any more: it goes with its last descriptor.
    async fn disk(&self, work: &Work, owner: &Owner) -> Result<Arc<File>, End> {
        let (layout, path) = (owner.dir().join("layout"), owner.dir().join("disk"));
        let failed = |what: &str, error: &dyn std::error::Error| {
            tracing::error!(id = %owner.instance().id, error = chain(error), "{what}");
            End::failed(format!("{what}: {}", chain(error)))
        };
        let pulling = work.image.write_layout(&self.workshop.backing, &layout);
        match owner.cancel().run_until_cancelled(pulling).await {
            None => return Err(never_ran()),
            Some(Ok(())) => {}
            Some(Err(error)) => return Err(failed("the image could not be pulled", &error)),
        }
        let made = disk::make(layout.clone(), path, owner.cancel().clone()).await;
        let disk = made.map_err(|error| {
            if error.is_cancelled() {
                return never_ran();
            }
            failed("the image's disk could not be made", &error)
        })?;
        let removed = tokio::fs::remove_dir_all(&layout).await;
        removed.map_err(|error| failed("the image's layout could not be removed", &error))?;
        Ok(Arc::new(disk))
    }

    /// Runs a VM to its end. Tells besides whether it hung before it began.
    async fn attend(&self, vm: Vm, owner: &mut Owner, job: Job) -> (End, bool) {
        let nonce: [u8; TOKEN_LEN] = crate::random::bytes();
        let params = session::Params {
            job,
            started: vm.started().into(),
            source: None,
            nonce,
            boot_deadline: BOOT_DEADLINE,
            cancel_grace: STOP_GRACE,
        };
        let cancel = owner.cancel().clone();
        let limit = self.workshop.log_limit;
        let doorway = Doorway::new(owner.door().clone(), vm.dialer(), nonce);
        let mut sink = Sink { owner, limit, charged: 0, begun: false, doorway };
        let mut ended = false;
        let over = {
            let session = session::run(Arc::clone(&vm.control), &mut sink, params, cancel);
            tokio::pin!(session);
            tokio::select! {
                biased;
                () = self.abandon.cancelled() => Err(End::failed("the host was shut down while the instance ran")),
                end = &mut session => Ok(end),
                exit = vm.exited() => {
                    ended = true;
                    // What the VM had sent before it ended is still in the sockets.
                    match timeout(LAST_WORDS, &mut session).await {
                        Ok(end @ (session::End::Outcome(_) | session::End::Cancelled(Some(_)))) => Ok(end),
                        _ => Err(End::failed(format!("the VM was lost: {exit}"))),
                    }
                }
            }
        };
        let begun = sink.begun;
        // Nobody is let in any more, and who is inside is told.
        drop(sink);
        let ran = owner.instance().state == State::Running;
        let end = over.map_or_else(|end| end, |over| of_session(over, ran));
        if !begun && let Some(console) = vm.console_tail().await {
            tracing::warn!(vm = vm.id(), console, "the VM did not begin");
        }
        if let Err(error) = vm.destroy().await {
            tracing::error!(error = chain(&error), "the VM was not removed completely");
        }
        (end, !begun && !ended)
    }

    fn job(&self, owner: &Owner, work: &Work) -> Job {
        let limits = Limits {
            // It ends when it ends, or when somebody ends it.
            timeout_ms: u64::MAX,
            spent_ms: 0,
            log_bytes: self.workshop.log_limit,
            processes: MAX_PROCESSES,
            source_bytes: 0,
            source_entries: 0,
        };
        let build = owner.instance().id.as_job().clone();
        Job { build, role: Role::Run(work.job.clone()), limits }
    }
}

#[async_trait]
impl Runner for Machines {
    #[tracing::instrument(name = "instance", skip_all, fields(id = %owner.instance().id, tenant = %owner.instance().tenant))]
    async fn run(&self, owner: &mut Owner, work: Work) -> End {
        let cancel = owner.cancel().clone();
        let Some(Some(_place)) = cancel.run_until_cancelled(self.place()).await else {
            return never_ran();
        };
        if let Err(error) = owner.change(Change::Initialize).await {
            return End::failed(format!("the host could not store its state: {}", chain(&error)));
        }
        let disk = match self.disk(&work, owner).await {
            Ok(disk) => disk,
            Err(end) => return end,
        };
        let mut boots = 1;
        loop {
            let spec = VmSpec {
                id: owner.instance().id.to_string(),
                memory_mb: owner.instance().memory_mb,
                cpus: owner.instance().vcpus,
                disk_gb: SCRATCH_GB,
                image: Some(Arc::clone(&disk)),
            };
            let vm = match cancel.run_until_cancelled(self.workshop.vmm.start(spec)).await {
                None => return never_ran(),
                Some(Ok(vm)) => vm,
                Some(Err(error)) => {
                    tracing::error!(error = chain(&error), "cannot start a VM");
                    return End::failed(format!("the host could not start a VM: {error}"));
                }
            };
            let (end, hung) = self.attend(vm, owner, self.job(owner, &work)).await;
            if !hung || boots == BOOTS || cancel.is_cancelled() || self.abandon.is_cancelled() {
                return end;
            }
            tracing::warn!(why = end.message, "a VM did not begin; trying another");
            boots += 1;
        }
    }
}

/// It was ended before its program ran.
fn never_ran() -> End {
    End::failed("it was stopped before its program ran")
}

/// What the end of a session says of the instance, whose program has run or not.
fn of_session(end: session::End, ran: bool) -> End {
    match end {
        session::End::Outcome(outcome) | session::End::Cancelled(Some(outcome)) => {
            of_outcome(outcome)
        }
        session::End::Cancelled(None) if !ran => never_ran(),
        session::End::Cancelled(None) => End {
            exit_code: Some(KILLED),
            message: Some("it did not end in time after it was asked to, and was killed".into()),
        },
        session::End::Lost(why) => End::failed(format!("the VM was lost: {why}")),
        session::End::Protocol(why) => {
            End::failed(format!("the VM's agent broke the protocol: {why}"))
        }
        session::End::Kept(_) => End::failed("the VM's agent kept a build's step"),
        session::End::Version(why) => End::failed(why),
        session::End::Store(error) => End::failed(format!("{error:#}")),
    }
}

fn of_outcome(outcome: Outcome) -> End {
    match outcome {
        Outcome::Exited(exited) => End::exited(exited.code),
        Outcome::Failed(failure) => End::failed(failure.message),
        Outcome::Cancelled => never_ran(),
        Outcome::Built(_) => End::failed("the VM's agent ended an instance as if it were a build"),
    }
}

/// Takes what the guest reports.
struct Sink<'a> {
    owner: &'a mut Owner,
    limit: u64,
    charged: u64,
    begun: bool,
    /// Opened when the program runs; closed with the session.
    doorway: Doorway,
}

/// The guest sent more log content than the instance may have.
#[derive(Debug, thiserror::Error)]
#[error("the instance printed more than its log limit of {0} bytes")]
struct LogLimit(u64);

impl session::Sink for Sink<'_> {
    async fn events(&mut self, events: Vec<NumberedEvent>) -> anyhow::Result<()> {
        self.begun = true;
        self.doorway.begun();
        let mut lines = vec![];
        for event in events {
            match &event.event {
                Event::Log(log) => {
                    self.charged = self.charged.saturating_add(log.cost());
                    if self.charged > self.limit {
                        return Err(LogLimit(self.limit).into());
                    }
                    if let Some(new) = payload::from_agent(&event, crate::clock::now()) {
                        let mut line = new.payload;
                        line["timestamp"] = crate::api::types::rfc3339(new.at).into();
                        lines.push(line);
                    }
                }
                Event::Phase(Phase::Running) => self.owner.change(Change::Run).await?,
                Event::Phase(_) | Event::Step(_) => anyhow::bail!("an instance has no such event"),
            }
        }
        if !lines.is_empty() {
            self.owner.print(&lines).await?;
        }
        Ok(())
    }

    async fn hello(&mut self, agent: &str, image: &str) {
        tracing::info!(agent = %agent.escape_default(), image = %image.escape_default(), "the agent connected");
    }

    async fn engine_started(&mut self) {}

    async fn agent_usage(&mut self, _usage: AgentUsage) {}

    async fn secret(&mut self, _id: &SecretId) -> anyhow::Result<SecretAnswer> {
        Ok(SecretAnswer::Denied)
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::event::{Built, Exited, Failure, FailureKind};

    use super::*;

    #[test]
    fn every_end_of_a_session_is_an_instances_end() {
        let exited = Outcome::Exited(Exited { code: 3 });
        for end in [session::End::Outcome(exited.clone()), session::End::Cancelled(Some(exited))] {
            assert_eq!(of_session(end, true), End::exited(3));
        }
        let killed = of_session(session::End::Cancelled(None), true);
        assert_eq!(killed.exit_code, Some(137));
        assert_eq!(of_session(session::End::Cancelled(None), false), never_ran());
        let failed = Outcome::Failed(Failure {
            kind: FailureKind::Internal,
            message: "why".into(),
            step: None,
            exit_code: None,
            detail: None,
        });
        assert_eq!(of_session(session::End::Outcome(failed), true), End::failed("why"));
        let built = Built { digest: String::new(), engine: String::new(), lockfiles: vec![] };
        for end in [
            session::End::Outcome(Outcome::Built(built)),
            session::End::Outcome(Outcome::Cancelled),
            session::End::Lost("x".into()),
            session::End::Protocol("x".into()),
            session::End::Version("x".into()),
            session::End::Store(LogLimit(1).into()),
        ] {
            let end = of_session(end, true);
            assert!(end.exit_code.is_none() && end.message.is_some(), "{end:?}");
        }
    }
}
