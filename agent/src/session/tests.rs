#![allow(clippy::unwrap_used)]
//! A scripted host on the other end of the wire, and a scripted engine. Time is paused: it moves
//! only when everybody waits.

mod staying;

use std::future::Future;
use std::io;

use kiln_protocol::event::{
    Built, Event, Failure, FailureKind, Log, LogStream, NumberedEvent, Outcome, Phase, Step,
    StepState,
};
use kiln_protocol::frame::{self, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, Reject, RejectReason, TOKEN_LEN};
use kiln_protocol::job::{BuildId, BuildJob, Dockerfile, Limits, Role, StepNetwork};
use kiln_protocol::message::{AgentToHost, HostToAgent, MAX_SOURCE_CHUNK, SOURCE_WINDOW};
use kiln_protocol::secret::{SecretAnswer, SecretId, SecretSpec, SecretValue};
use kiln_protocol::version::{Features, SUPPORTED, Version};
use tokio::io::{AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::link::DIAL_DEADLINE;
use super::work::fail;
use super::*;
use crate::engine::Work;
use crate::events::{MAX_UNACKNOWLEDGED, Report, Reporter, WAITING_REPORTS};

/// Each dial arrives at the test.
struct ToTest(mpsc::UnboundedSender<DuplexStream>);

impl Connector for ToTest {
    type Stream = DuplexStream;
    async fn connect(&self, port: u32) -> io::Result<DuplexStream> {
        assert_eq!(port, 5001);
        let (near, far) = tokio::io::duplex(64 * 1024);
        self.0.send(far).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(near)
    }
}

/// An engine that does what a test says.
struct Scripted<F>(F);

impl<F, R> Engine for Scripted<F>
where
    F: Fn(Work, Reporter, CancellationToken) -> R + Send + Sync,
    R: Future<Output = Outcome> + Send,
{
    async fn run(self, work: Work, reporter: Reporter, cancel: CancellationToken) -> Outcome {
        (self.0)(work, reporter, cancel).await
    }
}

/// The host's end of one connection.
struct Peer {
    reader: FrameReader<ReadHalf<DuplexStream>>,
    writer: WriteHalf<DuplexStream>,
    hello: Hello,
}

impl Peer {
    async fn send(&mut self, message: HostToAgent) {
        frame::write(&mut self.writer, &message).await.unwrap();
    }
    async fn next(&mut self) -> AgentToHost {
        self.reader.read().await.unwrap()
    }
    async fn event(&mut self) -> NumberedEvent {
        match self.next().await {
            AgentToHost::Event(event) => event,
            other => panic!("{other:?}"),
        }
    }
    /// The next event, whatever else comes before it.
    async fn next_event(&mut self) -> NumberedEvent {
        loop {
            if let AgentToHost::Event(event) = self.next().await {
                return event;
            }
        }
    }
    /// The outcome, and the events before it.
    async fn outcome(&mut self) -> (Outcome, Vec<NumberedEvent>) {
        let mut events = Vec::new();
        loop {
            match self.next().await {
                AgentToHost::Event(event) => events.push(event),
                AgentToHost::Outcome(outcome) => return (outcome, events),
                _ => {}
            }
        }
    }
    async fn send_source(&mut self, archive: &[u8]) {
        for piece in archive.chunks(1000) {
            self.send(HostToAgent::Source(piece.to_vec())).await;
        }
        self.send(HostToAgent::SourceEnd { total: archive.len() as u64 }).await;
    }
    async fn finish(mut self, fixture: Fixture) {
        self.send(HostToAgent::Finish).await;
        fixture.session.await.unwrap().unwrap();
    }
}

struct Fixture {
    dials: mpsc::UnboundedReceiver<DuplexStream>,
    session: JoinHandle<Result<(), SessionError>>,
    dir: tempfile::TempDir,
}

impl Fixture {
    async fn dialled(&mut self) -> Peer {
        let (reader, writer) = tokio::io::split(self.dials.recv().await.unwrap());
        let mut reader = FrameReader::new(reader);
        let hello = reader.read::<Hello>().await.unwrap();
        Peer { reader, writer, hello }
    }
    async fn welcome(&mut self, token: u8, acknowledged: u64) -> Peer {
        let mut peer = self.dialled().await;
        let reply = HelloReply::Welcome(welcome(token, acknowledged));
        frame::write(&mut peer.writer, &reply).await.unwrap();
        peer
    }
    /// Up to the job.
    async fn with_job(&mut self, job: Job) -> Peer {
        let mut peer = self.welcome(1, 0).await;
        peer.send(HostToAgent::Job(Box::new(job))).await;
        peer
    }
    /// Up to the engine's start.
    async fn building(&mut self, job: Job) -> Peer {
        let mut peer = self.with_job(job).await;
        assert_eq!(peer.event().await.event, Event::Phase(Phase::Unpacking));
        peer.send_source(&archive()).await;
        assert_eq!(peer.next_event().await.event, Event::Phase(Phase::Building));
        peer
    }
}

fn welcome(token: u8, acknowledged: u64) -> Welcome {
    Welcome {
        version: Version(1),
        features: Features::RESUME,
        resume_token: [token; TOKEN_LEN],
        nonce: [9; TOKEN_LEN],
        time_ms: 0,
        entropy: [0; TOKEN_LEN],
        acknowledged,
    }
}

fn start<F, R>(engine: F) -> Fixture
where
    F: Fn(Work, Reporter, CancellationToken) -> R + Send + Sync + 'static,
    R: Future<Output = Outcome> + Send + 'static,
{
    let (to_test, dials) = mpsc::unbounded_channel();
    let dir = tempfile::tempdir().unwrap();
    let places = Places {
        certificates: "/nonexistent/certificates".into(),
        secrets: dir.path().join("secrets"),
        source: dir.path().join("source"),
        dockerfile: dir.path().join("Dockerfile"),
        instance: crate::run::Places {
            device: dir.path().join("disk"),
            scratch: dir.path().join("scratch"),
            files: dir.path().join("files"),
            ..crate::run::Places::default()
        },
    };
    let identity = Identity { agent: "kiln-agent test".into(), image: "image".into() };
    let session = tokio::spawn(async move {
        let session = Session::open(Arc::new(ToTest(to_test)), identity).await?;
        assert_eq!(session.welcome().nonce, [9; TOKEN_LEN]);
        session.run(Scripted(engine), places, |_, _| Ok(())).await
    });
    Fixture { dials, session, dir }
}

fn job() -> Job {
    Job {
        build: BuildId::new("b1").unwrap(),
        role: Role::Build(BuildJob {
            dockerfile: Dockerfile::InSource("Dockerfile".into()),
            target: Some("stage".into()),
            build_args: vec![("K".into(), "V".into())],
            network: StepNetwork::Proxy,
            base_digest: None,
            egress_ca: vec![],
            secrets: vec![],
            keep_failed: false,
            upstreams: vec![],
        }),
        limits: Limits {
            timeout_ms: 600_000,
            spent_ms: 0,
            log_bytes: 1 << 20,
            processes: 77,
            source_bytes: 1 << 20,
            source_entries: 100,
        },
    }
}

fn archive_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, name, content).unwrap();
    builder.into_inner().unwrap()
}

fn archive() -> Vec<u8> {
    archive_of("Dockerfile", b"FROM scratch\n")
}

fn built() -> Outcome {
    Outcome::Built(Built {
        digest: "sha256:abc".into(),
        engine: "scripted".into(),
        lockfiles: vec![],
    })
}

fn line(text: &str) -> Event {
    let content = text.as_bytes().to_vec();
    Event::Log(Log { stream: LogStream::Stdout, step: Some(1), partial: false, content })
}

fn failure(outcome: Outcome) -> Failure {
    match outcome {
        Outcome::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

fn seqs(events: &[NumberedEvent]) -> Vec<u64> {
    events.iter().map(|event| event.seq).collect()
}

#[tokio::test(start_paused = true)]
async fn a_build_goes_from_hello_to_finish() {
    let mut fixture = start(async |work: Work, reporter: Reporter, _| {
        assert_eq!(std::fs::read_to_string(&work.dockerfile).unwrap(), "FROM scratch\n");
        assert_eq!(work.dockerfile, work.context.join("Dockerfile"));
        assert_eq!((work.processes, work.target.as_deref()), (77, Some("stage")));
        assert_eq!(work.network, StepNetwork::Proxy);
        reporter.report(Report::EngineStarted { spawn: Duration::from_millis(9) }).await;
        reporter.report(Report::Event(line("hello"))).await;
        built()
    });
    let mut peer = fixture.welcome(1, 0).await;
    assert_eq!(peer.hello.check(), Ok(()));
    assert_eq!((peer.hello.versions, peer.hello.image.as_str()), (SUPPORTED, "image"));
    assert!(peer.hello.resume.is_none());
    peer.send(HostToAgent::Job(Box::new(job()))).await;
    peer.send_source(&archive()).await;
    let (mut taken, mut started, mut events) = (0, false, Vec::new());
    let mut usage = None;
    let outcome = loop {
        match peer.next().await {
            AgentToHost::Event(event) => events.push(event),
            AgentToHost::SourceTaken { total } => taken = total,
            AgentToHost::EngineStarted => started = true,
            AgentToHost::Usage(agent) => usage = Some(agent),
            AgentToHost::Outcome(outcome) => break outcome,
            AgentToHost::Kept => panic!("nothing failed"),
            AgentToHost::SecretRequest { id } => panic!("{id}"),
        }
    };
    assert_eq!(outcome, built());
    assert!(started);
    assert_eq!(usage.unwrap().engine_spawn_us, Some(9000));
    assert_eq!(taken, archive().len() as u64);
    assert_eq!(seqs(&events), [1, 2, 3]);
    assert_eq!(events[2].event, line("hello"));
    assert!(events[0].at_ms > 1_600_000_000_000);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn an_instance_whose_disk_is_none_is_told_and_no_engine_runs() {
    let mut fixture = start(async |_, _, _| panic!("an engine runs"));
    std::fs::write(fixture.dir.path().join("disk"), [0; 4096]).unwrap();
    let run = kiln_protocol::run::RunJob {
        hostname: "h".into(),
        args: vec!["/app".into()],
        env: vec![],
        user: String::new(),
        working_dir: "/".into(),
        stop_signal: 15,
    };
    let mut peer = fixture.with_job(Job { role: Role::Run(run), ..job() }).await;
    let (outcome, events) = peer.outcome().await;
    let failure = failure(outcome);
    assert_eq!((failure.kind, events), (FailureKind::Internal, vec![]));
    assert!(failure.message.contains("neither ext4 nor EROFS"), "{}", failure.message);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_source_of_many_windows_arrives() {
    let mut fixture = start(async |work: Work, _, _| {
        assert_eq!(std::fs::metadata(work.context.join("Dockerfile")).unwrap().len(), 6 << 20);
        built()
    });
    let mut job = job();
    job.limits.source_bytes = 6 << 20;
    let Role::Build(build) = &mut job.role else { panic!("{job:?}") };
    build.dockerfile = Dockerfile::Inline(b"FROM scratch".to_vec());
    let mut peer = fixture.with_job(job).await;
    let archive = archive_of("Dockerfile", &vec![7; 6 << 20]);
    let (mut sent, mut taken) = (0, 0);
    for piece in archive.chunks(MAX_SOURCE_CHUNK) {
        sent += piece.len() as u64;
        while sent - taken > SOURCE_WINDOW {
            if let AgentToHost::SourceTaken { total } = peer.next().await {
                taken = total;
            }
        }
        peer.send(HostToAgent::Source(piece.to_vec())).await;
    }
    peer.send(HostToAgent::SourceEnd { total: sent }).await;
    assert_eq!(peer.outcome().await.0, built());
    let inline = fixture.dir.path().join("Dockerfile");
    assert_eq!(std::fs::read(inline).unwrap(), b"FROM scratch");
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_breaks_the_rules_of_the_source_is_left() {
    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.with_job(job()).await;
    peer.send(HostToAgent::Source(vec![0; 10])).await;
    peer.send(HostToAgent::SourceEnd { total: 11 }).await;
    let error = fixture.session.await.unwrap().unwrap_err();
    assert!(matches!(error, SessionError::Source(FeedError::Length { .. })), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_rejected_agent_ends_and_says_why() {
    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.dialled().await;
    let reject = Reject { reason: RejectReason::Version, message: "too old".into() };
    frame::write(&mut peer.writer, &HelloReply::Reject(reject)).await.unwrap();
    let error = fixture.session.await.unwrap().unwrap_err();
    let SessionError::Dial(error) = error else { panic!("{error}") };
    assert!(error.to_string().contains("too old"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_host_out_of_reach_is_dialled_for_thirty_seconds() {
    let begun = Instant::now();
    let mut fixture = start(async |_, _, _| built());
    let mut dials = 0;
    while let Some(stream) = fixture.dials.recv().await {
        drop(stream);
        dials += 1;
    }
    assert!(dials > 10, "{dials}");
    assert!(begun.elapsed() <= DIAL_DEADLINE, "{:?}", begun.elapsed());
    let error = fixture.session.await.unwrap().unwrap_err();
    assert!(matches!(error, SessionError::Dial(DialError::OutOfReach(_))), "{error}");
}

#[tokio::test(start_paused = true)]
async fn no_job_ends_the_session() {
    let mut fixture = start(async |_, _, _| built());
    let _peer = fixture.welcome(1, 0).await;
    assert!(matches!(fixture.session.await.unwrap(), Err(SessionError::NoJob)));
}

#[tokio::test(start_paused = true)]
async fn a_job_over_its_bounds_fails_by_name() {
    let mut fixture = start(async |_, _, _| built());
    let mut job = job();
    let Role::Build(build) = &mut job.role else { panic!("{job:?}") };
    build.target = Some("t".repeat(kiln_protocol::job::MAX_JOB_TEXT + 1));
    let mut peer = fixture.with_job(job).await;
    let failure = failure(peer.outcome().await.0);
    assert!(failure.message.contains("target"), "{}", failure.message);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_bad_source_fails_by_the_name_of_its_entry() {
    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.with_job(job()).await;
    let mut bad = archive_of("xx/evil", b"");
    bad[..2].copy_from_slice(b"..");
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes().copy_from_slice(&bad[..512]);
    header.set_cksum();
    bad[..512].copy_from_slice(header.as_bytes());
    peer.send_source(&bad).await;
    let failure = failure(peer.outcome().await.0);
    assert_eq!(failure.kind, FailureKind::SourceInvalid);
    assert!(failure.message.contains("`../evil`"), "{}", failure.message);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_missing_dockerfile_fails_by_its_path() {
    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.with_job(job()).await;
    peer.send_source(&archive_of("other", b"")).await;
    let failure = failure(peer.outcome().await.0);
    assert_eq!(failure.kind, FailureKind::DockerfileMissing);
    assert!(failure.message.contains("`Dockerfile`"), "{}", failure.message);
    peer.finish(fixture).await;
}

/// A job with the secrets `npm` and `pip`.
fn secret_job() -> Job {
    let mut job = job();
    if let Role::Build(build) = &mut job.role {
        let spec = |id| SecretSpec { id: SecretId::new(id).unwrap(), variable: None };
        build.secrets = vec![spec("npm"), spec("pip")];
    }
    job
}

fn answer(id: &str, answer: SecretAnswer) -> HostToAgent {
    HostToAgent::Secret { id: SecretId::new(id).unwrap(), answer }
}

impl Peer {
    /// The next thing that the build asks for, whatever else comes before it.
    async fn asked(&mut self) -> String {
        loop {
            if let AgentToHost::SecretRequest { id } = self.next().await {
                return id.into();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn secrets_are_asked_for_one_by_one_and_again_after_a_resume() {
    let mut fixture = start(async |work: Work, _, _| {
        let values = work.secrets.iter().map(|secret| std::fs::read(&secret.file).unwrap());
        assert_eq!(values.collect::<Vec<_>>(), [b"hunter2\n".to_vec(), b"\0".to_vec()]);
        built()
    });
    let mut peer = fixture.with_job(secret_job()).await;
    peer.send_source(&archive()).await;
    assert_eq!(peer.asked().await, "npm");
    // Nobody answers any more.
    drop(peer);
    let mut peer = fixture.welcome(2, 0).await;
    assert_eq!(peer.asked().await, "npm");
    let value = |bytes: &[u8]| SecretAnswer::Value(SecretValue::new(bytes.to_vec()));
    // What was not asked for is not taken.
    peer.send(answer("pip", value(b"wrong"))).await;
    peer.send(answer("npm", value(b"hunter2\n"))).await;
    assert_eq!(peer.asked().await, "pip");
    peer.send(answer("npm", value(b"again"))).await;
    peer.send(answer("pip", value(b"\0"))).await;
    let (outcome, events) = peer.outcome().await;
    assert_eq!(outcome, built());
    assert_eq!(events.last().unwrap().event, Event::Phase(Phase::Building));
    assert!(!fixture.dir.path().join("secrets").exists(), "they are wiped");
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_secret_that_is_missing_fails_the_build_before_the_engine_runs() {
    let mut fixture = start(async |_, _, _| panic!("the engine runs"));
    let mut peer = fixture.with_job(secret_job()).await;
    peer.send_source(&archive()).await;
    assert_eq!(peer.asked().await, "npm");
    peer.send(answer("npm", SecretAnswer::Missing)).await;
    let (outcome, _) = peer.outcome().await;
    let failure = failure(outcome);
    assert_eq!(failure.kind, FailureKind::SecretMissing);
    assert!(failure.message.contains("\"npm\""), "{}", failure.message);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn what_the_machine_cannot_prepare_fails_the_build() {
    let (to_test, dials) = mpsc::unbounded_channel();
    let dir = tempfile::tempdir().unwrap();
    let places = Places {
        certificates: "/nonexistent/certificates".into(),
        secrets: dir.path().join("secrets"),
        source: dir.path().join("s"),
        dockerfile: dir.path().join("d"),
        instance: crate::run::Places::default(),
    };
    let session = tokio::spawn(async move {
        let identity = Identity { agent: String::new(), image: String::new() };
        let session = Session::open(Arc::new(ToTest(to_test)), identity).await?;
        let engine = Scripted(async |_, _, _| built());
        session.run(engine, places, |_, _| Err("no egress port".into())).await
    });
    let mut fixture = Fixture { dials, session, dir };
    let mut peer = fixture.with_job(job()).await;
    assert_eq!(failure(peer.outcome().await.0).message, "no egress port");
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_cancel_ends_the_engine_and_its_last_reports_come_first() {
    let mut fixture = start(async |_, reporter: Reporter, cancel: CancellationToken| {
        cancel.cancelled().await;
        reporter.report(Report::Event(line("killed"))).await;
        built()
    });
    let mut peer = fixture.building(job()).await;
    let begun = Instant::now();
    peer.send(HostToAgent::Cancel).await;
    let (outcome, events) = peer.outcome().await;
    assert_eq!(outcome, Outcome::Cancelled);
    assert_eq!(events.last().unwrap().event, line("killed"));
    assert!(begun.elapsed() < Duration::from_millis(50), "{:?}", begun.elapsed());
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_cancel_does_not_wait_for_an_engine_that_hangs() {
    let mut fixture = start(async |_, _, _| std::future::pending().await);
    let mut peer = fixture.building(job()).await;
    let begun = Instant::now();
    peer.send(HostToAgent::Cancel).await;
    assert_eq!(peer.outcome().await.0, Outcome::Cancelled);
    assert!(begun.elapsed() <= STOP_GRACE + Duration::from_millis(50), "{:?}", begun.elapsed());
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_cancel_gets_through_before_the_job_and_while_the_source_arrives() {
    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.welcome(1, 0).await;
    peer.send(HostToAgent::Cancel).await;
    assert_eq!(peer.outcome().await.0, Outcome::Cancelled);
    peer.finish(fixture).await;

    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.with_job(job()).await;
    peer.send(HostToAgent::Source(archive()[..700].to_vec())).await;
    peer.send(HostToAgent::Cancel).await;
    assert_eq!(peer.outcome().await.0, Outcome::Cancelled);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_cancel_gets_through_when_nothing_else_does() {
    let mut fixture = start(async |_, reporter: Reporter, cancel: CancellationToken| {
        let flood = async {
            loop {
                reporter.report(Report::Event(line("flood"))).await;
            }
        };
        tokio::select! {
            () = flood => built(),
            () = cancel.cancelled() => built(),
        }
    });
    let mut peer = fixture
        .building(Job { limits: Limits { log_bytes: u64::MAX, ..job().limits }, ..job() })
        .await;
    // Nothing is acknowledged, so the flood stands still; the host does not even read.
    peer.send(HostToAgent::Cancel).await;
    let (outcome, events) = peer.outcome().await;
    assert_eq!(outcome, Outcome::Cancelled);
    assert!(events.len() <= MAX_UNACKNOWLEDGED + WAITING_REPORTS, "{}", events.len());
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_full_buffer_stops_the_engine_until_the_host_acknowledges() {
    const LINES: usize = MAX_UNACKNOWLEDGED + 1000;
    let reported = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = Arc::clone(&reported);
    let mut fixture = start(move |_, reporter: Reporter, _| {
        let counter = Arc::clone(&counter);
        async move {
            for n in 0..LINES {
                reporter.report(Report::Event(line(&n.to_string()))).await;
                counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
            built()
        }
    });
    let mut peer = fixture.building(job()).await;
    let mut last = 2;
    while last < MAX_UNACKNOWLEDGED as u64 {
        last = peer.event().await.seq;
    }
    // Everybody waits: time moves and nothing else.
    let quiet = tokio::time::timeout(Duration::from_secs(5), peer.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    let reported = reported.load(std::sync::atomic::Ordering::SeqCst);
    assert!(reported <= MAX_UNACKNOWLEDGED + WAITING_REPORTS, "{reported}");

    peer.send(HostToAgent::Acknowledge { seq: last }).await;
    let (outcome, events) = peer.outcome().await;
    assert_eq!(outcome, built());
    assert_eq!(seqs(&events), (last + 1..=LINES as u64 + 2).collect::<Vec<_>>());
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_build_out_of_time_fails_and_names_the_step() {
    let mut fixture = start(async |_, reporter: Reporter, cancel: CancellationToken| {
        let step = Step { index: 4, name: "make world".into(), state: StepState::Started };
        reporter.report(Report::Event(Event::Step(step))).await;
        cancel.cancelled().await;
        built()
    });
    let begun = Instant::now();
    let mut job = job();
    job.limits.spent_ms = 100_000;
    let mut peer = fixture.building(job).await;
    let failure = failure(peer.outcome().await.0);
    assert_eq!((failure.kind, failure.step), (FailureKind::TimedOut, Some(4)));
    assert!(failure.message.contains("600 s") && failure.message.contains("make world"));
    let took = begun.elapsed();
    assert!((500..502).contains(&took.as_secs()), "{took:?}");
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn the_log_limit_holds_at_and_breaks_above() {
    for (bytes, fits) in [(100, true), (101, false)] {
        let mut fixture =
            start(move |_, reporter: Reporter, cancel: CancellationToken| async move {
                reporter.report(Report::Event(line(&"x".repeat(bytes)))).await;
                if !fits {
                    cancel.cancelled().await;
                }
                built()
            });
        let limits = Limits { log_bytes: 100, ..job().limits };
        let mut peer = fixture.building(Job { limits, ..job() }).await;
        let outcome = peer.outcome().await.0;
        if fits {
            assert_eq!(outcome, built());
        } else {
            let failure = failure(outcome);
            assert_eq!(failure.kind, FailureKind::LogLimit);
            assert!(failure.message.contains("100 bytes"), "{}", failure.message);
        }
        peer.finish(fixture).await;
    }
}

#[tokio::test(start_paused = true)]
async fn lines_without_content_count_for_the_log_limit() {
    let mut fixture = start(async |_, reporter: Reporter, cancel: CancellationToken| {
        for _ in 0..7 {
            reporter.report(Report::Event(line(""))).await;
        }
        cancel.cancelled().await;
        built()
    });
    let limits = Limits { log_bytes: 100, ..job().limits };
    let mut peer = fixture.building(Job { limits, ..job() }).await;
    assert_eq!(failure(peer.outcome().await.0).kind, FailureKind::LogLimit);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn the_last_reports_count_for_the_log_limit_too() {
    let mut fixture = start(async |_, reporter: Reporter, _| {
        reporter.report(Report::Event(line(&"x".repeat(11)))).await;
        built()
    });
    let limits = Limits { log_bytes: 10, ..job().limits };
    let mut peer = fixture.building(Job { limits, ..job() }).await;
    assert_eq!(failure(peer.outcome().await.0).kind, FailureKind::LogLimit);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_panics_is_an_outcome() {
    let mut fixture = start(async |_, _, _| panic!("the engine's own fault"));
    let mut peer = fixture.building(job()).await;
    assert_eq!(failure(peer.outcome().await.0).kind, FailureKind::Internal);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn an_outcome_over_its_bounds_is_cut() {
    let mut fixture = start(async |_, _, _| {
        let mut failure = fail(FailureKind::StepFailed, "m");
        failure.message = "m".repeat(100_000);
        failure.detail = Some("d".repeat(100_000));
        Outcome::Failed(failure)
    });
    let mut peer = fixture.building(job()).await;
    let (outcome, _) = peer.outcome().await;
    assert_eq!(outcome.check(), Ok(()));
    assert_eq!(failure(outcome).kind, FailureKind::StepFailed);
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_broken_connection_is_resumed_with_the_latest_token() {
    let go_on = Arc::new(Notify::new());
    let wait = Arc::clone(&go_on);
    let mut fixture = start(move |_, reporter: Reporter, _| {
        let wait = Arc::clone(&wait);
        async move {
            reporter.report(Report::EngineStarted { spawn: Duration::from_millis(9) }).await;
            for n in 3..=6 {
                reporter.report(Report::Event(line(&n.to_string()))).await;
            }
            wait.notified().await;
            reporter.report(Report::Event(line("7"))).await;
            built()
        }
    });
    let mut peer = fixture.building(job()).await;
    while peer.next_event().await.seq < 6 {}
    peer.send(HostToAgent::Acknowledge { seq: 4 }).await;
    // The acknowledgement is read before the end of the stream.
    drop(peer);

    let mut peer = fixture.welcome(2, 5).await;
    let resume = peer.hello.resume.clone().unwrap();
    assert_eq!((resume.token, resume.acknowledged), ([1; TOKEN_LEN], 4));
    assert_eq!(peer.next_event().await.seq, 6);
    drop(peer);

    // A host that forgot acknowledgements does not get those events again.
    let mut peer = fixture.welcome(3, 0).await;
    let resume = peer.hello.resume.clone().unwrap();
    assert_eq!((resume.token, resume.acknowledged), ([2; TOKEN_LEN], 5));
    assert_eq!(peer.next().await, AgentToHost::EngineStarted);
    assert_eq!(peer.next_event().await.seq, 6);
    go_on.notify_one();
    let (outcome, events) = peer.outcome().await;
    assert_eq!((outcome, seqs(&events)), (built(), vec![7]));
    drop(peer);

    // The outcome is repeated until Finish.
    let mut peer = fixture.welcome(4, 7).await;
    assert_eq!(peer.outcome().await, (built(), vec![]));
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_build_that_ends_while_the_host_is_gone_keeps_its_outcome() {
    let go_on = Arc::new(Notify::new());
    let wait = Arc::clone(&go_on);
    let mut fixture = start(move |_, _, _| {
        let wait = Arc::clone(&wait);
        async move {
            wait.notified().await;
            built()
        }
    });
    drop(fixture.building(job()).await);
    go_on.notify_one();
    // Some attempts find nobody.
    for _ in 0..5 {
        drop(fixture.dials.recv().await.unwrap());
    }
    let mut peer = fixture.welcome(2, 0).await;
    let (outcome, events) = peer.outcome().await;
    assert_eq!((outcome, seqs(&events)), (built(), vec![1, 2]));
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_source_goes_on_after_a_resume_where_the_first_message_says() {
    let mut fixture = start(async |_, _, _| built());
    let archive = archive();
    let mut peer = fixture.with_job(job()).await;
    peer.send(HostToAgent::Source(archive[..600].to_vec())).await;
    while !matches!(peer.next().await, AgentToHost::SourceTaken { .. }) {}
    peer.send(HostToAgent::Source(archive[600..1000].to_vec())).await;
    drop(peer);

    let mut peer = fixture.welcome(2, 0).await;
    // The host does not know either whether the job got through.
    peer.send(HostToAgent::Job(Box::new(job()))).await;
    let from = loop {
        if let AgentToHost::SourceTaken { total } = peer.next().await {
            break usize::try_from(total).unwrap();
        }
    };
    assert!(from == 600 || from == 1000, "{from}");
    peer.send(HostToAgent::Source(archive[from..].to_vec())).await;
    peer.send(HostToAgent::SourceEnd { total: archive.len() as u64 }).await;
    assert_eq!(peer.outcome().await.0, built());
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_stays_away_or_cannot_resume_ends_the_session() {
    let mut fixture = start(async |_, _, _| std::future::pending().await);
    drop(fixture.building(job()).await);
    while let Some(stream) = fixture.dials.recv().await {
        drop(stream);
    }
    let error = fixture.session.await.unwrap().unwrap_err();
    assert!(matches!(error, SessionError::Dial(DialError::OutOfReach(_))), "{error}");

    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.dialled().await;
    let welcome = Welcome { features: Features::NONE, ..welcome(1, 0) };
    frame::write(&mut peer.writer, &HelloReply::Welcome(welcome)).await.unwrap();
    drop(peer);
    assert!(matches!(fixture.session.await.unwrap(), Err(SessionError::Broken(_))));
}

#[tokio::test(start_paused = true)]
async fn without_finish_the_agent_leaves_after_ten_seconds() {
    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.building(job()).await;
    assert_eq!(peer.outcome().await.0, built());
    let begun = Instant::now();
    fixture.session.await.unwrap().unwrap();
    assert!(begun.elapsed() <= FINISH_WAIT + Duration::from_millis(1));
}

#[tokio::test(start_paused = true)]
async fn a_second_job_and_bad_frames_and_false_acknowledgements_end_the_session() {
    let mut fixture = start(async |_, _, _| std::future::pending().await);
    let mut peer = fixture.building(job()).await;
    let other = Job { build: BuildId::new("b2").unwrap(), ..job() };
    peer.send(HostToAgent::Job(Box::new(other))).await;
    assert!(matches!(fixture.session.await.unwrap(), Err(SessionError::SecondJob)));

    let mut fixture = start(async |_, _, _| std::future::pending().await);
    let mut peer = fixture.building(job()).await;
    peer.writer.write_all(&[0, 0, 0, 1, 99]).await.unwrap();
    assert!(matches!(fixture.session.await.unwrap(), Err(SessionError::Frame(_))));

    let mut fixture = start(async |_, _, _| std::future::pending().await);
    let mut peer = fixture.building(job()).await;
    peer.send(HostToAgent::Acknowledge { seq: 99 }).await;
    assert!(matches!(fixture.session.await.unwrap(), Err(SessionError::Acknowledgement(_))));
}

#[tokio::test(start_paused = true)]
async fn another_version_is_not_spoken() {
    let mut fixture = start(async |_, _, _| built());
    let mut peer = fixture.dialled().await;
    let welcome = Welcome { version: Version(2), ..welcome(1, 0) };
    frame::write(&mut peer.writer, &HelloReply::Welcome(welcome)).await.unwrap();
    let error = fixture.session.await.unwrap().unwrap_err();
    assert!(matches!(error, SessionError::Dial(DialError::Version(Version(2)))), "{error}");
}
