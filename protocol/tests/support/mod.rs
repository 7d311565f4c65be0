//! One value of every message there is, named, and generators of any.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a test's values are known")]

use kiln_protocol::event::{
    Built, Event, Exited, Failure, FailureKind, Lockfile, Log, LogStream, Name, NumberedEvent,
    Outcome, Phase, Step, StepEnd, StepState,
};
use kiln_protocol::exec::{
    Cause, Copy, Ended, Exec, HostToSession, Open, Place, SessionToHost, Stream, Terminal,
};
use kiln_protocol::frame::{self, FrameError};
use kiln_protocol::hello::{
    Hello, HelloReply, MAGIC, Reject, RejectReason, Resume, TOKEN_LEN, Welcome,
};
use kiln_protocol::job::{BuildId, BuildJob, Dockerfile, Job, Limits, Role, StepNetwork};
use kiln_protocol::message::{AgentToHost, AgentUsage, HostToAgent};
use kiln_protocol::run::RunJob;
use kiln_protocol::secret::{SecretAnswer, SecretId, SecretSpec, SecretValue};
use kiln_protocol::version::{Features, Version, VersionRange};

/// Any frame's value, of the control connection or of a session's.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    Hello(Hello),
    Reply(HelloReply),
    Host(HostToAgent),
    Agent(AgentToHost),
    ToSession(HostToSession),
    OfSession(SessionToHost),
}

/// Which of the six a frame is, by its place in the conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Hello,
    Reply,
    Host,
    Agent,
    ToSession,
    OfSession,
}

impl Kind {
    pub const ALL: [Self; 6] =
        [Self::Hello, Self::Reply, Self::Host, Self::Agent, Self::ToSession, Self::OfSession];

    /// Decodes a frame's value as this kind of message.
    pub fn decode(self, value: &[u8]) -> Result<Message, FrameError> {
        match self {
            Self::Hello => frame::decode(value).map(Message::Hello),
            Self::Reply => frame::decode(value).map(Message::Reply),
            Self::Host => frame::decode(value).map(Message::Host),
            Self::Agent => frame::decode(value).map(Message::Agent),
            Self::ToSession => frame::decode(value).map(Message::ToSession),
            Self::OfSession => frame::decode(value).map(Message::OfSession),
        }
    }
}

impl Message {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Reply(_) => Kind::Reply,
            Self::Host(_) => Kind::Host,
            Self::Agent(_) => Kind::Agent,
            Self::ToSession(_) => Kind::ToSession,
            Self::OfSession(_) => Kind::OfSession,
        }
    }

    /// The frame, length included.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        match self {
            Self::Hello(m) => frame::encode(m),
            Self::Reply(m) => frame::encode(m),
            Self::Host(m) => frame::encode(m),
            Self::Agent(m) => frame::encode(m),
            Self::ToSession(m) => frame::encode(m),
            Self::OfSession(m) => frame::encode(m),
        }
    }
}

/// Every message, with the name of its golden file.
pub fn every_message() -> Vec<(String, Message)> {
    let mut all = hellos();
    all.extend(host_messages().into_iter().map(|m| (host_name(&m), Message::Host(m))));
    all.extend(agent_messages().into_iter().map(|m| (agent_name(&m), Message::Agent(m))));
    all.extend(to_session().into_iter().map(|m| (to_session_name(&m), Message::ToSession(m))));
    all.extend(of_session().into_iter().map(|m| (of_session_name(&m), Message::OfSession(m))));
    all
}

fn hellos() -> Vec<(String, Message)> {
    let hello = |resume| Hello {
        magic: MAGIC,
        versions: VersionRange { min: Version(1), max: Version(300) },
        features: Features::RESUME,
        agent: "kiln-agent 0.1.0".into(),
        image: "sha256:0123".into(),
        resume,
    };
    let resume = Resume { token: token(0x10), acknowledged: 1000 };
    let mut all = vec![
        ("hello".to_owned(), Message::Hello(hello(None))),
        ("hello-resume".to_owned(), Message::Hello(hello(Some(resume)))),
        (
            "reply-welcome".to_owned(),
            Message::Reply(HelloReply::Welcome(Welcome {
                version: Version(1),
                features: Features::RESUME,
                resume_token: token(0x20),
                nonce: token(0x40),
                time_ms: 1_767_225_600_000,
                entropy: token(0x60),
                acknowledged: 0,
            })),
        ),
    ];
    for reason in REASONS {
        let reject = Reject { reason, message: "why, for people".into() };
        let name = format!("reply-reject-{}", reason_name(reason));
        all.push((name, Message::Reply(HelloReply::Reject(reject))));
    }
    all
}

pub const REASONS: [RejectReason; 4] =
    [RejectReason::NotKiln, RejectReason::Version, RejectReason::Resume, RejectReason::Taken];

fn host_messages() -> Vec<HostToAgent> {
    vec![
        job(Dockerfile::InSource("sub/Dockerfile".into()), StepNetwork::None),
        job(Dockerfile::Inline(b"FROM scratch\n".to_vec()), StepNetwork::Proxy),
        run_job(),
        HostToAgent::Source(vec![0x1f, 0x8b, 0x00, 0xff]),
        HostToAgent::SourceEnd { total: 5_000_000_000 },
        HostToAgent::Acknowledge { seq: 129 },
        HostToAgent::Cancel,
        HostToAgent::Finish,
        secret(SecretAnswer::Value(SecretValue::new(b"hunter2\n".to_vec()))),
        secret(SecretAnswer::Missing),
        secret(SecretAnswer::Denied),
    ]
}

fn secret(answer: SecretAnswer) -> HostToAgent {
    HostToAgent::Secret { id: SecretId::new("npm.token").unwrap(), answer }
}

fn job(dockerfile: Dockerfile, network: StepNetwork) -> HostToAgent {
    let inline = matches!(dockerfile, Dockerfile::Inline(_));
    HostToAgent::Job(Box::new(Job {
        build: BuildId::new("b0-1").unwrap(),
        role: Role::Build(BuildJob {
            dockerfile,
            target: inline.then(|| "final".into()),
            build_args: vec![("B".into(), "2".into()), ("A".into(), String::new())],
            network,
            base_digest: inline.then(|| "sha256:ef".into()),
            egress_ca: if inline { b"PEM".to_vec() } else { vec![] },
            secrets: inline.then(secrets).unwrap_or_default(),
            keep_failed: inline,
            upstreams: if inline { vec!["docker.io".into(), "quay.io".into()] } else { vec![] },
        }),
        limits: limits(),
    }))
}

fn secrets() -> Vec<SecretSpec> {
    let spec = |id: &str, variable| SecretSpec { id: SecretId::new(id).unwrap(), variable };
    vec![spec("npm.token", None), spec("pip", Some("PIP_TOKEN".into()))]
}

fn run_job() -> HostToAgent {
    HostToAgent::Job(Box::new(Job {
        build: BuildId::new("i0-1").unwrap(),
        role: Role::Run(RunJob {
            hostname: "web".into(),
            args: vec!["/bin/serve".into(), "--port".into(), "80".into()],
            env: vec![("B".into(), "2".into()), ("A".into(), String::new())],
            user: "app:staff".into(),
            working_dir: "/srv".into(),
            stop_signal: 3,
        }),
        limits: limits(),
    }))
}

fn limits() -> Limits {
    Limits {
        timeout_ms: 600_000,
        spent_ms: 2_300,
        log_bytes: 256 << 20,
        processes: 1024,
        source_bytes: 4096 << 20,
        source_entries: 1_000_000,
    }
}

fn agent_messages() -> Vec<AgentToHost> {
    let event =
        |event| AgentToHost::Event(NumberedEvent { seq: 7, at_ms: 1_767_225_600_001, event });
    let log = |stream, step, partial| {
        event(Event::Log(Log { stream, step, partial, content: b"caf\xc3\xa9 \xff\x1b".to_vec() }))
    };
    let step = |state| event(Event::Step(Step { index: 2, name: "make -j2".into(), state }));
    let mut all = vec![
        log(LogStream::Stdout, Some(2), false),
        log(LogStream::Stderr, Some(2), true),
        log(LogStream::Kiln, None, false),
        step(StepState::Started),
        step(StepState::Ended(StepEnd {
            exit_code: -1,
            duration_ms: 1234,
            memory_peak_bytes: 1 << 30,
            oom_kills: 1,
        })),
        event(Event::Phase(Phase::Unpacking)),
        event(Event::Phase(Phase::Building)),
        event(Event::Phase(Phase::Pushing)),
        event(Event::Phase(Phase::Running)),
        event(Event::Name(Name { step: Some(2), host: "deb.example".into() })),
        AgentToHost::SourceTaken { total: 262_144 },
        AgentToHost::EngineStarted,
        AgentToHost::Kept,
        AgentToHost::SecretRequest { id: SecretId::new("npm.token").unwrap() },
        AgentToHost::Outcome(Outcome::Built(Built {
            digest: "sha256:abcd".into(),
            engine: "buildah 1.39.3".into(),
            lockfiles: vec![Lockfile { path: "web/yarn.lock".into(), sha256: [0xab; 32] }],
        })),
        AgentToHost::Outcome(Outcome::Cancelled),
        AgentToHost::Outcome(Outcome::Exited(Exited { code: 137 })),
        AgentToHost::Usage(AgentUsage {
            memory_peak_bytes: 9 << 20,
            engine_spawn_us: Some(17_000),
        }),
        AgentToHost::Usage(AgentUsage { memory_peak_bytes: 9 << 20, engine_spawn_us: None }),
    ];
    all.extend(FailureKind::ALL.into_iter().map(|kind| {
        let blames = kind == FailureKind::StepFailed;
        AgentToHost::Outcome(Outcome::Failed(Failure {
            kind,
            message: "what happened".into(),
            step: blames.then_some(3),
            exit_code: blames.then_some(127),
            detail: blames.then(|| "last lines".into()),
        }))
    }));
    all
}

fn to_session() -> Vec<HostToSession> {
    let exec = Exec {
        place: Place::Job { secrets: true },
        command: vec!["sh".into(), "-c".into(), "id".into()],
        env: vec![("B".into(), "2".into()), ("A".into(), String::new())],
        directory: Some("/srv".into()),
        user: Some("app:staff".into()),
        terminal: Some(Terminal { rows: 24, cols: 300 }),
    };
    let bare = Exec {
        place: Place::Vm,
        command: vec!["dmesg".into()],
        env: vec![],
        directory: None,
        user: None,
        terminal: None,
    };
    let copy = Copy { place: Place::Job { secrets: false }, path: "out/app".into() };
    let open = |open| HostToSession::Open(Box::new(open));
    vec![
        open(Open::Exec(exec)),
        open(Open::Exec(bare)),
        open(Open::CopyOut(copy.clone())),
        open(Open::CopyIn(copy)),
        HostToSession::Input(vec![0x00, 0xff, 0x1b]),
        HostToSession::InputEnd,
        HostToSession::Resize(Terminal { rows: 1, cols: 65_535 }),
        HostToSession::Signal(15),
    ]
}

fn of_session() -> Vec<SessionToHost> {
    let output = |stream| SessionToHost::Output { stream, bytes: b"caf\xc3\xa9 \xff\x1b".to_vec() };
    let mut all = vec![
        SessionToHost::Started,
        SessionToHost::InputTaken { total: 1_000_000 },
        output(Stream::Out),
        output(Stream::Err),
        SessionToHost::Ended(Ended::Exited { code: 137 }),
    ];
    all.extend(
        CAUSES.map(|cause| {
            SessionToHost::Ended(Ended::Failed { cause, why: "why, for people".into() })
        }),
    );
    all
}

pub const CAUSES: [Cause; 5] =
    [Cause::NotFound, Cause::NotExecutable, Cause::NoStep, Cause::Invalid, Cause::Internal];

// The matches below name every variant: a new one does not compile until it has a name, and the
// test over the names then asks for its golden file.

fn reason_name(reason: RejectReason) -> &'static str {
    match reason {
        RejectReason::NotKiln => "not-kiln",
        RejectReason::Version => "version",
        RejectReason::Resume => "resume",
        RejectReason::Taken => "taken",
    }
}

fn host_name(message: &HostToAgent) -> String {
    let name = match message {
        HostToAgent::Job(job) => match &job.role {
            Role::Build(build) => match (&build.dockerfile, build.network) {
                (Dockerfile::InSource(_), StepNetwork::None) => "job-build-in-source-none",
                (Dockerfile::InSource(_), StepNetwork::Proxy) => "job-build-in-source-proxy",
                (Dockerfile::Inline(_), StepNetwork::None) => "job-build-inline-none",
                (Dockerfile::Inline(_), StepNetwork::Proxy) => "job-build-inline-proxy",
            },
            Role::Run(_) => "job-run",
        },
        HostToAgent::Source(_) => "source",
        HostToAgent::SourceEnd { .. } => "source-end",
        HostToAgent::Acknowledge { .. } => "acknowledge",
        HostToAgent::Cancel => "cancel",
        HostToAgent::Finish => "finish",
        HostToAgent::Secret { answer: SecretAnswer::Value(_), .. } => "secret-value",
        HostToAgent::Secret { answer: SecretAnswer::Missing, .. } => "secret-missing",
        HostToAgent::Secret { answer: SecretAnswer::Denied, .. } => "secret-denied",
    };
    format!("host-{name}")
}

fn agent_name(message: &AgentToHost) -> String {
    let name = match message {
        AgentToHost::Event(numbered) => match &numbered.event {
            Event::Log(log) => match log.stream {
                LogStream::Stdout => "event-log-stdout",
                LogStream::Stderr => "event-log-stderr",
                LogStream::Kiln => "event-log-kiln",
            },
            Event::Step(step) => match step.state {
                StepState::Started => "event-step-started",
                StepState::Ended(_) => "event-step-ended",
            },
            Event::Phase(Phase::Unpacking) => "event-phase-unpacking",
            Event::Phase(Phase::Building) => "event-phase-building",
            Event::Phase(Phase::Pushing) => "event-phase-pushing",
            Event::Phase(Phase::Running) => "event-phase-running",
            Event::Name(_) => "event-name",
        },
        AgentToHost::SourceTaken { .. } => "source-taken",
        AgentToHost::EngineStarted => "engine-started",
        AgentToHost::Kept => "kept",
        AgentToHost::SecretRequest { .. } => "secret-request",
        AgentToHost::Usage(AgentUsage { engine_spawn_us: Some(_), .. }) => "usage",
        AgentToHost::Usage(AgentUsage { engine_spawn_us: None, .. }) => "usage-without-engine",
        AgentToHost::Outcome(Outcome::Built(_)) => "outcome-built",
        AgentToHost::Outcome(Outcome::Cancelled) => "outcome-cancelled",
        AgentToHost::Outcome(Outcome::Exited(_)) => "outcome-exited",
        AgentToHost::Outcome(Outcome::Failed(failure)) => {
            return format!("agent-outcome-failed-{}", failure.kind.as_str().replace('_', "-"));
        }
    };
    format!("agent-{name}")
}

fn to_session_name(message: &HostToSession) -> String {
    let name = match message {
        HostToSession::Open(open) => match &**open {
            Open::Exec(Exec { terminal: Some(_), .. }) => "open-exec-terminal",
            Open::Exec(Exec { terminal: None, .. }) => "open-exec",
            Open::CopyOut(_) => "open-copy-out",
            Open::CopyIn(_) => "open-copy-in",
        },
        HostToSession::Input(_) => "input",
        HostToSession::InputEnd => "input-end",
        HostToSession::Resize(_) => "resize",
        HostToSession::Signal(_) => "signal",
    };
    format!("session-host-{name}")
}

fn of_session_name(message: &SessionToHost) -> String {
    let name = match message {
        SessionToHost::Started => "started",
        SessionToHost::InputTaken { .. } => "input-taken",
        SessionToHost::Output { stream: Stream::Out, .. } => "output-out",
        SessionToHost::Output { stream: Stream::Err, .. } => "output-err",
        SessionToHost::Ended(Ended::Exited { .. }) => "ended-exited",
        SessionToHost::Ended(Ended::Failed { cause, .. }) => match cause {
            Cause::NotFound => "ended-failed-not-found",
            Cause::NotExecutable => "ended-failed-not-executable",
            Cause::NoStep => "ended-failed-no-step",
            Cause::Invalid => "ended-failed-invalid",
            Cause::Internal => "ended-failed-internal",
        },
    };
    format!("session-agent-{name}")
}

/// A token that shows in hex where it is and that its order is kept.
pub fn token(first: u8) -> [u8; TOKEN_LEN] {
    std::array::from_fn(|i| first + u8::try_from(i).unwrap())
}
