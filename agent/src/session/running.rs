//! A session that runs: everything it knows, and what it does about everything that happens.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kiln_protocol::event::{Event, Failure, FailureKind, Outcome, cut_text};
use kiln_protocol::frame::FrameError;
use kiln_protocol::hello::{Resume, TOKEN_LEN, Welcome};
use kiln_protocol::job::{Job, Role};
use kiln_protocol::message::{AgentToHost, HostToAgent};
use kiln_protocol::secret::{SecretAnswer, SecretId};
use kiln_protocol::version::Features;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::link::{DIAL_DEADLINE, DialError, Link, Moved, dial};
use super::stop::{Ending, Progress, Stop};
use super::usage::usage;
use super::work::{build, crashed, fail};
use super::{
    DELIVERY_WAIT, FINISH_WAIT, Identity, JOB_WAIT, KEEP_GRACE, Places, STOP_GRACE, Session,
    SessionError,
};
use crate::engine::Engine;
use crate::events::{self, Outbox, Report, Reporter, WAITING_REPORTS};
use crate::run;
use crate::source::{Feeder, feed};
use crate::vsock::Connector;

type Redial<S> = Pin<Box<dyn Future<Output = Result<(Link<S>, Welcome), DialError>> + Send>>;

/// All that a running session knows.
pub struct Running<C: Connector, E, P> {
    connector: Arc<C>,
    identity: Identity,
    /// The connection; while it is broken, `redial` is under way.
    link: Option<Link<C::Stream>>,
    redial: Option<Redial<C::Stream>>,
    /// The current resume token; `None` when the host does not resume.
    token: Option<[u8; TOKEN_LEN]>,
    welcomed: Instant,
    outbox: Outbox,
    progress: Progress,
    job: Option<Box<Job>>,
    /// What a job needs, until there is one.
    start: Option<(E, Places, P)>,
    feeder: Option<Feeder>,
    working: Option<Working>,
    stop: Option<Stop>,
    logged: u64,
    engine_started: Unsent,
    engine_spawn: Option<Duration>,
    asking: Option<Asking>,
    taken_sent: u64,
    /// After a resume nothing is said about the source until all that arrived has been taken.
    taken_resync: bool,
    outcome: Option<Outcome>,
    outcome_sent: bool,
    /// Whether the failed step stays, and with it what runs the build.
    held: bool,
    /// What it is a deadline for follows from the state.
    deadline: Instant,
}

/// A build that runs.
struct Working {
    task: JoinHandle<Outcome>,
    reports: mpsc::Receiver<Report>,
    ending: Ending,
}

/// A secret that was asked for and has not come.
struct Asking {
    id: SecretId,
    answer: oneshot::Sender<SecretAnswer>,
    /// Whether this connection was told.
    sent: bool,
}

/// Whether something has happened, and whether this connection was told.
#[derive(Clone, Copy, Default)]
struct Unsent {
    happened: bool,
    sent: bool,
}

/// Something that a session waits for.
enum Turn<S> {
    Link(Result<Moved, FrameError>),
    Redialled(Result<(Link<S>, Welcome), DialError>),
    Ended(Outcome),
    Report(Report),
    SourceTaken,
    Deadline,
}

/// Whether the session goes on.
enum Then {
    GoOn,
    Finish,
}

impl<C, E, P> Running<C, E, P>
where
    C: Connector,
    E: Engine + Send + Sync + 'static,
    P: FnOnce(&Job, &Reporter) -> Result<(), String>,
{
    /// A session that waits for its job.
    pub fn new(session: Session<C>, engine: E, places: Places, prepare: P) -> Self {
        let Session { connector, identity, link, welcome, welcomed } = session;
        Self {
            connector,
            identity,
            link: Some(link),
            redial: None,
            token: token(&welcome),
            welcomed,
            outbox: Outbox::new(),
            progress: Progress::default(),
            job: None,
            start: Some((engine, places, prepare)),
            feeder: None,
            working: None,
            stop: None,
            logged: 0,
            engine_started: Unsent::default(),
            engine_spawn: None,
            asking: None,
            taken_sent: 0,
            taken_resync: false,
            outcome: None,
            outcome_sent: false,
            held: false,
            deadline: welcomed + JOB_WAIT,
        }
    }

    /// Runs until the host says Finish, or leaves the agent no other choice.
    pub async fn run(mut self) -> Result<(), SessionError> {
        loop {
            self.fill()?;
            let then = match self.turn().await {
                Turn::Link(Ok(Moved::Frame(message))) => self.message(message)?,
                Turn::Link(Err(error)) => self.broken(error)?,
                Turn::Redialled(dialled) => self.resumed(dialled?)?,
                Turn::Ended(outcome) => self.conclude(outcome)?,
                Turn::Report(report) => self.reports(report)?,
                Turn::Link(Ok(Moved::Wrote)) | Turn::SourceTaken => Then::GoOn,
                Turn::Deadline => self.late()?,
            };
            if let Then::Finish = then {
                return Ok(());
            }
        }
    }

    /// Waits for whatever comes first. Every part may be dropped half-way.
    async fn turn(&mut self) -> Turn<C::Stream> {
        let has_room = self.outbox.has_room();
        let (task, reports) = match &mut self.working {
            Some(working) => (Some(&mut working.task), Some(&mut working.reports)),
            None => (None, None),
        };
        tokio::select! {
            biased;
            moved = or_never(self.link.as_mut().map(Link::moved)) => Turn::Link(moved),
            dialled = or_never(self.redial.as_mut()) => Turn::Redialled(dialled),
            () = sleep_until(self.deadline) => Turn::Deadline,
            outcome = or_never(task) => Turn::Ended(
                outcome.unwrap_or_else(|error| Outcome::Failed(crashed(&error))),
            ),
            () = or_never(self.feeder.as_mut().map(Feeder::moved)) => Turn::SourceTaken,
            report = or_never(reports.filter(|_| has_room).map(received)) => Turn::Report(report),
        }
    }

    /// Makes ready what this connection has to be told, as far as there is room.
    fn fill(&mut self) -> Result<(), SessionError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        while link.has_room() {
            if self.engine_started.happened && !self.engine_started.sent {
                self.engine_started.sent = true;
                link.send(&AgentToHost::EngineStarted).map_err(SessionError::Frame)?;
            } else if let Some(total) = self.feeder.as_ref().and_then(|feeder| {
                let news = feeder.taken() > self.taken_sent && !self.taken_resync;
                (news || self.taken_resync && feeder.is_drained()).then(|| feeder.taken())
            }) {
                self.taken_sent = total;
                self.taken_resync = false;
                link.send(&AgentToHost::SourceTaken { total }).map_err(SessionError::Frame)?;
            } else if let Some(asking) = self.asking.as_mut().filter(|asking| !asking.sent) {
                asking.sent = true;
                let id = asking.id.clone();
                link.send(&AgentToHost::SecretRequest { id }).map_err(SessionError::Frame)?;
            } else if let Some(frame) = self.outbox.next_frame() {
                link.send_frame(frame);
            } else if let Some(outcome) = self.outcome.as_ref().filter(|_| !self.outcome_sent) {
                self.outcome_sent = true;
                self.deadline = if self.held { far() } else { Instant::now() + FINISH_WAIT };
                if self.held {
                    link.send(&AgentToHost::Kept).map_err(SessionError::Frame)?;
                }
                link.send(&AgentToHost::Usage(usage(self.engine_spawn)))
                    .map_err(SessionError::Frame)?;
                link.send(&AgentToHost::Outcome(outcome.clone())).map_err(SessionError::Frame)?;
            } else {
                break;
            }
        }
        Ok(())
    }

    fn message(&mut self, message: HostToAgent) -> Result<Then, SessionError> {
        match message {
            HostToAgent::Job(job) => return self.begin(job),
            HostToAgent::Source(bytes) => {
                if let Some(feeder) = &mut self.feeder {
                    feeder.push(bytes)?;
                }
            }
            HostToAgent::SourceEnd { total } => {
                if let Some(feeder) = &mut self.feeder {
                    feeder.end(total)?;
                }
            }
            HostToAgent::Acknowledge { seq } => self.outbox.acknowledge(seq)?,
            HostToAgent::Cancel => {
                self.stop(Stop::Cancelled);
                if self.working.is_none() && self.outcome.is_none() {
                    return self.conclude(Outcome::Cancelled);
                }
            }
            HostToAgent::Secret { id, answer } => {
                // After a resume it may come twice.
                if let Some(asking) = self.asking.take_if(|asking| asking.id == id) {
                    // Who asked may have given up.
                    let _ = asking.answer.send(answer);
                }
            }
            HostToAgent::Finish => return Ok(Then::Finish),
        }
        Ok(Then::GoOn)
    }

    fn begin(&mut self, job: Box<Job>) -> Result<Then, SessionError> {
        let Some((engine, places, prepare)) = self.start.take() else {
            // After a resume the host may not know whether the job got through.
            let known = self.job.as_ref().is_none_or(|known| *known == job);
            return if known { Ok(Then::GoOn) } else { Err(SessionError::SecondJob) };
        };
        if self.outcome.is_some() {
            return Ok(Then::GoOn);
        }
        tracing::info!(build = %job.build, "a job");
        if let Err(error) = job.check() {
            return self.conclude(Outcome::Failed(fail(FailureKind::Internal, error.to_string())));
        }
        let (reporter, reports) = events::channel();
        if let Err(problem) = prepare(&job, &reporter) {
            return self.conclude(Outcome::Failed(fail(FailureKind::Internal, problem)));
        }
        let ending = Ending::default();
        let end = ending.clone();
        let task = match &job.role {
            Role::Build(_) => {
                let (feeder, feed) = feed();
                self.feeder = Some(feeder);
                tokio::spawn(build(engine, (*job).clone(), places, feed, reporter, end))
            }
            Role::Run(run) => {
                let (places, run) = (places.instance, run.clone());
                tokio::spawn(run::run(places, run, job.limits.processes, reporter, end.whole))
            }
        };
        self.working = Some(Working { task, reports, ending });
        let left_ms = job.limits.timeout_ms.saturating_sub(job.limits.spent_ms);
        self.deadline = after(self.welcomed, left_ms);
        self.job = Some(job);
        Ok(Then::GoOn)
    }

    /// Takes a report, and those that are there already.
    fn reports(&mut self, first: Report) -> Result<Then, SessionError> {
        self.take(first)?;
        // No more than can wait at one time: who reports fills up again meanwhile, and a flood of lines
        // would keep the link from its turn.
        for _ in 1..WAITING_REPORTS {
            let Some(working) = self.working.as_mut().filter(|_| self.outbox.has_room()) else {
                break;
            };
            let Ok(report) = working.reports.try_recv() else { break };
            self.take(report)?;
        }
        Ok(Then::GoOn)
    }

    fn take(&mut self, report: Report) -> Result<(), SessionError> {
        let event = match report {
            Report::Event(event) => event,
            Report::EngineStarted { spawn } => {
                self.engine_spawn = Some(spawn);
                self.engine_started.happened = true;
                return Ok(());
            }
            Report::Held(failure) => {
                self.hold(*failure);
                return Ok(());
            }
            Report::Ask { id, answer } => {
                self.asking = Some(Asking { id, answer, sent: false });
                return Ok(());
            }
        };
        if let Some(log_bytes) = self.job.as_ref().map(|job| job.limits.log_bytes) {
            self.logged = self.logged.saturating_add(event.cost());
            if self.logged > log_bytes {
                self.stop(Stop::LogLimit { log_bytes });
                // How steps end is told all the same.
                if matches!(event, Event::Log(_) | Event::Name(_)) {
                    return Ok(());
                }
            }
        }
        // What is ended is named as it was then.
        if self.stop.is_none() {
            self.progress.see(&event);
        }
        self.outbox.push(now_ms(), event).map_err(SessionError::Frame)
    }

    /// Ends the build early. The first reason counts.
    fn stop(&mut self, reason: Stop) {
        let Some(working) = &self.working else { return };
        if self.stop.is_none() {
            tracing::info!(?reason, "the build is stopped");
            self.stop = Some(reason);
            let grace = if self.may_stay(reason) {
                working.ending.step.cancel();
                KEEP_GRACE
            } else {
                working.ending.whole.cancel();
                self.stop_grace()
            };
            self.feeder = None;
            self.deadline = Instant::now() + grace;
        }
    }

    /// Whether only the step that runs is to be ended, so that it stays.
    fn may_stay(&self, reason: Stop) -> bool {
        let is_kept = matches!(
            self.job.as_ref().map(|job| &job.role),
            Some(Role::Build(build)) if build.keep_failed
        );
        is_kept && reason != Stop::Cancelled && self.progress.is_in_a_step()
    }

    /// How long what runs may take to end by itself.
    fn stop_grace(&self) -> Duration {
        match self.job.as_ref().map(|job| &job.role) {
            Some(Role::Run(_)) => run::STOP_GRACE + STOP_GRACE,
            Some(Role::Build(_)) | None => STOP_GRACE,
        }
    }

    /// The build has ended: what it reported last, then the outcome.
    fn conclude(&mut self, outcome: Outcome) -> Result<Then, SessionError> {
        if let Some(working) = &mut self.working {
            working.task.abort();
            working.reports.close();
        }
        // More than the outbox has room for, but no more than the channel holds.
        while let Some(report) = self.working.as_mut().and_then(|w| w.reports.try_recv().ok()) {
            self.take(report)?;
        }
        self.working = None;
        let outcome = match self.stop {
            // Somebody ended it, and it ended: how is still news.
            Some(Stop::Cancelled) if matches!(outcome, Outcome::Exited(_)) => outcome,
            Some(reason) => reason.outcome(&self.progress),
            None => fit(outcome),
        };
        tracing::info!(outcome = outcome_name(&outcome), "the job has ended");
        self.outcome = Some(outcome);
        self.start = None;
        self.deadline = Instant::now() + DELIVERY_WAIT;
        Ok(Then::GoOn)
    }

    /// The build has failed, and its failed step stays until Finish, or until the host switches the VM off.
    fn hold(&mut self, failure: Failure) {
        let outcome = match self.stop {
            None => Outcome::Failed(failure),
            // A build that is cancelled ends.
            Some(Stop::Cancelled) => return,
            Some(reason) => reason.outcome_with(&self.progress, failure.detail),
        };
        self.held = true;
        self.outcome = Some(fit(outcome));
        self.deadline = Instant::now() + DELIVERY_WAIT;
    }

    fn late(&mut self) -> Result<Then, SessionError> {
        match (&self.outcome, &self.working, &self.job) {
            (Some(_), ..) if self.outcome_sent => Ok(Then::Finish),
            (Some(_), ..) => Err(SessionError::Undelivered),
            (None, Some(_), _) if self.stop.is_some() => self.conclude(Outcome::Cancelled),
            (None, Some(_), Some(job)) => {
                let timeout_ms = job.limits.timeout_ms;
                self.stop(Stop::TimedOut { timeout_ms });
                Ok(Then::GoOn)
            }
            (None, ..) => Err(SessionError::NoJob),
        }
    }

    fn broken(&mut self, error: FrameError) -> Result<Then, SessionError> {
        match error {
            FrameError::Closed | FrameError::Io(_) => {}
            _ => return Err(SessionError::Frame(error)),
        }
        if self.held && self.outcome_sent {
            // The host has all that there is, and lets the VM be.
            self.link = None;
            return Ok(Then::GoOn);
        }
        let Some(token) = self.token else { return Err(SessionError::Broken(error)) };
        tracing::warn!(%error, "the host is gone; dialling again");
        let resume = Resume { token, acknowledged: self.outbox.acknowledged() };
        let (connector, identity) = (Arc::clone(&self.connector), self.identity.clone());
        self.link = None;
        self.redial = Some(Box::pin(dial(connector, identity, Some(resume))));
        if self.outcome.is_some() {
            // The dial has its own deadline, and what follows it starts anew.
            self.deadline = Instant::now() + DIAL_DEADLINE + DELIVERY_WAIT;
        }
        Ok(Then::GoOn)
    }

    fn resumed(
        &mut self,
        (link, welcome): (Link<C::Stream>, Welcome),
    ) -> Result<Then, SessionError> {
        tracing::info!("the session is resumed");
        self.redial = None;
        self.link = Some(link);
        self.token = token(&welcome);
        self.outbox.acknowledge(welcome.acknowledged)?;
        self.outbox.rewind();
        self.engine_started.sent = false;
        if let Some(asking) = &mut self.asking {
            asking.sent = false;
        }
        self.taken_resync = self.feeder.is_some();
        self.outcome_sent = false;
        if self.outcome.is_some() {
            self.deadline = Instant::now() + DELIVERY_WAIT;
        }
        Ok(Then::GoOn)
    }
}

/// The token to resume with, if the host resumes at all.
fn token(welcome: &Welcome) -> Option<[u8; TOKEN_LEN]> {
    welcome.features.has(Features::RESUME).then_some(welcome.resume_token)
}

/// The future's value, or nothing ever.
async fn or_never<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// The next report. When nobody is left to report, the build's end is what comes next.
async fn received(reports: &mut mpsc::Receiver<Report>) -> Report {
    match reports.recv().await {
        Some(report) => report,
        None => std::future::pending().await,
    }
}

/// A limit may be so large that no clock can hold it.
fn after(start: Instant, ms: u64) -> Instant {
    start + Duration::from_millis(ms).min(FAR)
}

/// No deadline.
fn far() -> Instant {
    Instant::now() + FAR
}

const FAR: Duration = Duration::from_hours(365 * 24);

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Keeps an outcome within the protocol's bounds.
fn fit(mut outcome: Outcome) -> Outcome {
    if let Outcome::Failed(failure) = &mut outcome {
        failure.message = cut_text(&failure.message);
        failure.detail = failure.detail.as_deref().map(cut_text);
    }
    match outcome.check() {
        Ok(()) => outcome,
        Err(error) => Outcome::Failed(fail(FailureKind::Internal, error.to_string())),
    }
}

fn outcome_name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Built(_) => "built",
        Outcome::Cancelled => "cancelled",
        Outcome::Exited(_) => "exited",
        Outcome::Failed(failure) => failure.kind.as_str(),
    }
}
