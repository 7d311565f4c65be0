//! Runs an instance in a VM: room, image, disk, VM, session. Whatever happens, the VM is gone at the end.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_protocol::event::{Event, NumberedEvent, Outcome, Phase};
use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::job::{Job, Limits, Role};
use kiln_protocol::message::AgentUsage;
use kiln_protocol::run::RunJob;
use kiln_protocol::secret::{SecretAnswer, SecretId};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::disk::{self, Disk, DiskError};
use super::instance::{Change, End, State};
use super::places::Places;
use super::quota::Quota;
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
/// What the agent says of a program that is not there.
const NOT_FOUND: u8 = 127;
/// As much of a program's name as is repeated, in characters.
const MAX_NAME: usize = 200;
/// Of SIGKILL.
const KILLED: u8 = 128 + 9;

/// Runs instances in VMs.
pub struct Machines {
    workshop: Arc<Workshop>,
    places: Places,
    quota: Quota,
    /// The server ends now.
    abandon: CancellationToken,
}

impl Machines {
    /// In these places; their disks count in this quota.
    pub fn new(
        workshop: Arc<Workshop>,
        places: Places,
        quota: Quota,
        abandon: CancellationToken,
    ) -> Self {
        Self { workshop, places, quota, abandon }
    }

    async fn disk(&self, work: &Work, owner: &Owner) -> Result<Disk, End> {
        let held = self.quota.hold(&owner.instance().tenant);
        let (backing, cancel) = (&self.workshop.backing, owner.cancel());
        let disk = disk::prepare(backing, &work.image, owner.dir(), held, cancel).await;
        disk.map_err(|error| match error {
            DiskError::Cancelled => never_ran(),
            error => {
                let why = chain(&error);
                tracing::error!(id = %owner.instance().id, error = why, "an instance has no disk");
                End::failed(why)
            }
        })
    }

    /// Runs a VM to its end. Tells besides whether it hung before it began.
    async fn attend(&self, vm: Vm, owner: &mut Owner, run: &RunJob) -> (End, bool) {
        let nonce: [u8; TOKEN_LEN] = crate::random::bytes();
        let params = session::Params {
            job: self.job(owner, run),
            started: vm.started().into(),
            source: None,
            nonce,
            boot_deadline: BOOT_DEADLINE,
            cancel_grace: STOP_GRACE,
            resumed: None,
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
                () = self.abandon.cancelled() => Err(End::failed("it did not end in time, and was killed")),
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
        let program = run.args.first().filter(|_| !ran).map(String::as_str);
        let end = over.map_or_else(|end| end, |over| of_session(over, program));
        if !begun && let Some(console) = vm.console_tail().await {
            tracing::warn!(vm = vm.id(), console, "the VM did not begin");
        }
        if let Err(error) = vm.destroy().await {
            tracing::error!(error = chain(&error), "the VM was not removed completely");
        }
        (end, !begun && !ended)
    }

    fn job(&self, owner: &Owner, run: &RunJob) -> Job {
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
        Job { build, role: Role::Run(run.clone()), limits }
    }
}

#[async_trait]
impl Runner for Machines {
    #[tracing::instrument(name = "instance", skip_all, fields(id = %owner.instance().id, tenant = %owner.instance().tenant))]
    async fn run(&self, owner: &mut Owner, work: Work) -> End {
        let cancel = owner.cancel().clone();
        let place = self.places.place(&owner.instance().tenant, owner.instance().memory_mb);
        let Some(Some(_place)) = cancel.run_until_cancelled(place).await else {
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
                image: Some(Arc::clone(&disk.file)),
            };
            let vm = match cancel.run_until_cancelled(self.workshop.start(spec)).await {
                None => return never_ran(),
                Some(Ok(vm)) => vm,
                Some(Err(error)) => {
                    tracing::error!(error = chain(&error), "cannot start a VM");
                    return End::failed(format!("the host could not start a VM: {error}"));
                }
            };
            let (end, hung) = self.attend(vm, owner, &work.job).await;
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

/// What the end of a session says of the instance; with the program where that has not run.
fn of_session(end: session::End, not_run: Option<&str>) -> End {
    match end {
        session::End::Outcome(outcome) | session::End::Cancelled(Some(outcome)) => {
            of_outcome(outcome, not_run)
        }
        session::End::Cancelled(None) if not_run.is_some() => never_ran(),
        session::End::Cancelled(None) => End {
            exit_code: Some(KILLED),
            message: Some("it did not end in time after it was asked to, and was killed".into()),
        },
        session::End::Lost(why) => End::failed(format!("the VM was lost: {why}")),
        session::End::Protocol(why) => {
            End::failed(format!("the VM's agent broke the protocol: {why}"))
        }
        session::End::NotResumed => End::failed("the VM's agent did not come back"),
        session::End::Kept(_) => End::failed("the VM's agent kept a build's step"),
        session::End::Version(why) => End::failed(why),
        session::End::Store(error) => End::failed(format!("{error:#}")),
    }
}

fn of_outcome(outcome: Outcome, not_run: Option<&str>) -> End {
    match outcome {
        Outcome::Exited(exited) => End {
            exit_code: Some(exited.code),
            message: not_run.map(|program| not_started(program, exited.code)),
        },
        Outcome::Failed(failure) => End::failed(failure.message),
        Outcome::Cancelled => never_ran(),
        Outcome::Built(_) => End::failed("the VM's agent ended an instance as if it were a build"),
    }
}

/// The program has not run, and the agent says by its exit code why; its words are in the log.
fn not_started(program: &str, code: u8) -> String {
    let mut name: String = program.chars().take(MAX_NAME).collect();
    if name.len() < program.len() {
        name.push('…');
    }
    match code {
        NOT_FOUND => format!("the program {name:?} was not found in the image"),
        _ => format!("the program {name:?} cannot be executed"),
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
                Event::Phase(_) | Event::Step(_) | Event::Name(_) => {
                    anyhow::bail!("an instance has no such event")
                }
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
            assert_eq!(of_session(end, None), End::exited(3));
        }
        let killed = of_session(session::End::Cancelled(None), None);
        assert_eq!(killed.exit_code, Some(137));
        assert_eq!(of_session(session::End::Cancelled(None), Some("sh")), never_ran());
        let failed = Outcome::Failed(Failure {
            kind: FailureKind::Internal,
            message: "why".into(),
            step: None,
            exit_code: None,
            detail: None,
        });
        assert_eq!(of_session(session::End::Outcome(failed), None), End::failed("why"));
        let built = Built { digest: String::new(), engine: String::new(), lockfiles: vec![] };
        for end in [
            session::End::Outcome(Outcome::Built(built)),
            session::End::Outcome(Outcome::Cancelled),
            session::End::Lost("x".into()),
            session::End::Protocol("x".into()),
            session::End::Version("x".into()),
            session::End::Store(LogLimit(1).into()),
        ] {
            let end = of_session(end, None);
            assert!(end.exit_code.is_none() && end.message.is_some(), "{end:?}");
        }
    }

    #[test]
    fn a_program_that_did_not_start_is_told_by_its_name() {
        let ended = |program: &str, code| {
            let outcome = Outcome::Exited(Exited { code });
            of_session(session::End::Outcome(outcome), Some(program))
        };
        let missing = ended("none\u{1b}such", 127);
        assert_eq!(missing.exit_code, Some(127));
        let expected = "the program \"none\\u{1b}such\" was not found in the image";
        assert_eq!(missing.message.as_deref(), Some(expected));
        let denied = ended("/etc/passwd", 126).message.unwrap_or_default();
        assert_eq!(denied, "the program \"/etc/passwd\" cannot be executed");
        for (length, cut) in [(MAX_NAME, false), (MAX_NAME + 1, true)] {
            let message = ended(&"ä".repeat(length), 127).message.unwrap_or_default();
            assert_eq!(message.contains('…'), cut, "{length}");
        }
    }
}
