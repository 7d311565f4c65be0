//! The session against an agent that is a real peer over the protocol.

use std::io::{Seek, SeekFrom, Write};
use std::time::Duration;

use kiln_protocol::event::{
    Built, Event, Failure, FailureKind, Log, LogStream, MAX_LOG_BYTES, Phase,
};
use kiln_protocol::frame::{self, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, MAGIC, RejectReason, Resume, Welcome};
use kiln_protocol::job::{BuildId, BuildJob, Dockerfile, Limits, Role, StepNetwork};
use kiln_protocol::message::{AgentToHost, AgentUsage, HostToAgent, SOURCE_WINDOW};
use kiln_protocol::secret::{SecretAnswer, SecretId, SecretValue};
use kiln_protocol::version::{Features, SUPPORTED, Version, VersionRange};
use tokio::io::{DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;

const NONCE: [u8; TOKEN_LEN] = [9; TOKEN_LEN];

struct Dialled(mpsc::Receiver<DuplexStream>);

impl Connections for Dialled {
    type Stream = DuplexStream;
    async fn accept(&mut self) -> std::io::Result<DuplexStream> {
        match self.0.recv().await {
            Some(stream) => Ok(stream),
            None => std::future::pending().await,
        }
    }
}

#[derive(Default)]
struct Stored {
    events: Vec<NumberedEvent>,
    engine_started: bool,
    usage: Option<AgentUsage>,
    asked: Vec<String>,
}

impl Sink for Stored {
    async fn events(&mut self, events: Vec<NumberedEvent>) -> anyhow::Result<()> {
        self.events.extend(events);
        Ok(())
    }
    async fn hello(&mut self, agent: &str, _image: &str) {
        assert_eq!(agent, "test");
    }
    async fn engine_started(&mut self) {
        self.engine_started = true;
    }
    async fn agent_usage(&mut self, usage: AgentUsage) {
        self.usage = Some(usage);
    }
    async fn secret(&mut self, id: &SecretId) -> anyhow::Result<SecretAnswer> {
        self.asked.push(id.to_string());
        Ok(SecretAnswer::Value(SecretValue::new(format!("value of {id}").into_bytes())))
    }
}

struct Host {
    dial: mpsc::Sender<DuplexStream>,
    cancel: CancellationToken,
    session: JoinHandle<(End, Stored)>,
}

/// Starts a session that sends a source of `source` bytes.
fn host(source: usize) -> Host {
    host_that(source, false)
}

/// The same, of a build whose failed step is to stay.
fn host_that_keeps() -> Host {
    host_that(10, true)
}

fn host_that(source: usize, keep_failed: bool) -> Host {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![5; source]).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let build = BuildJob {
        dockerfile: Dockerfile::InSource("Dockerfile".into()),
        target: None,
        build_args: vec![],
        network: StepNetwork::None,
        base_digest: None,
        egress_ca: vec![],
        secrets: vec![],
        keep_failed,
        upstreams: vec![],
    };
    let limits = Limits {
        timeout_ms: 1000,
        spent_ms: 0,
        log_bytes: 1000,
        processes: 10,
        source_bytes: 1000,
        source_entries: 10,
    };
    let params = Params {
        job: Job { build: BuildId::new("b").unwrap(), role: Role::Build(build), limits },
        started: Instant::now().checked_sub(Duration::from_secs(3)).unwrap(),
        source: Some(tokio::fs::File::from_std(file)),
        cancel_grace: CANCEL_GRACE,
        resumed: None,
        nonce: NONCE,
        boot_deadline: Duration::from_secs(60),
    };
    let (dial, dialled) = mpsc::channel(4);
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    let session = tokio::spawn(async move {
        let mut sink = Stored::default();
        let end = run(Dialled(dialled), &mut sink, params, stop).await;
        (end, sink)
    });
    Host { dial, cancel, session }
}

struct Agent {
    reader: FrameReader<ReadHalf<DuplexStream>>,
    writer: WriteHalf<DuplexStream>,
}

impl Agent {
    async fn dial(host: &Host) -> Self {
        let (guest, end) = tokio::io::duplex(64 * 1024);
        host.dial.send(end).await.unwrap();
        let (reader, writer) = tokio::io::split(guest);
        Self { reader: FrameReader::new(reader), writer }
    }

    async fn hello(host: &Host, resume: Option<Resume>) -> (Self, HelloReply) {
        let mut agent = Self::dial(host).await;
        frame::write(&mut agent.writer, &hello(resume)).await.unwrap();
        let reply = agent.reader.read().await.unwrap();
        (agent, reply)
    }

    async fn welcomed(host: &Host) -> (Self, Welcome) {
        let (agent, reply) = Self::hello(host, None).await;
        let HelloReply::Welcome(welcome) = reply else { panic!("{reply:?}") };
        (agent, welcome)
    }

    async fn say(&mut self, message: AgentToHost) {
        frame::write(&mut self.writer, &message).await.unwrap();
    }

    async fn hear(&mut self) -> HostToAgent {
        self.reader.read().await.unwrap()
    }

    /// Takes job and source as an agent does; returns the source's length.
    async fn take_source(&mut self) -> u64 {
        let HostToAgent::Job(job) = self.hear().await else { panic!("no job") };
        // The VM was started three seconds ago.
        assert!((3000..60_000).contains(&job.limits.spent_ms), "{}", job.limits.spent_ms);
        let mut taken = 0;
        loop {
            match self.hear().await {
                HostToAgent::Source(bytes) => {
                    taken += bytes.len() as u64;
                    self.say(AgentToHost::SourceTaken { total: taken }).await;
                }
                HostToAgent::SourceEnd { total } => {
                    assert_eq!(total, taken);
                    return total;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn acknowledged(&mut self, up_to: u64) {
        loop {
            match self.hear().await {
                HostToAgent::Acknowledge { seq } if seq == up_to => return,
                HostToAgent::Acknowledge { seq } => assert!(seq < up_to),
                other => panic!("{other:?}"),
            }
        }
    }
}

fn hello(resume: Option<Resume>) -> Hello {
    Hello {
        magic: MAGIC,
        versions: SUPPORTED,
        features: Features::RESUME,
        agent: "test".into(),
        image: String::new(),
        resume,
    }
}

fn log(seq: u64, content: &[u8]) -> AgentToHost {
    let log =
        Log { stream: LogStream::Stdout, step: Some(1), partial: false, content: content.into() };
    AgentToHost::Event(NumberedEvent { seq, at_ms: 1, event: Event::Log(log) })
}

fn built() -> AgentToHost {
    AgentToHost::Outcome(Outcome::Built(Built {
        digest: "sha256:0".into(),
        engine: "e".into(),
        lockfiles: vec![],
    }))
}

fn failed() -> AgentToHost {
    AgentToHost::Outcome(Outcome::Failed(Failure {
        kind: FailureKind::StepFailed,
        message: "step 1 failed with exit code 42".into(),
        step: Some(1),
        exit_code: Some(42),
        detail: None,
    }))
}

fn seqs(stored: &Stored) -> Vec<u64> {
    stored.events.iter().map(|e| e.seq).collect()
}

#[tokio::test]
async fn a_session_from_hello_to_outcome() {
    let host = host(3_000_000);
    let (mut agent, welcome) = Agent::welcomed(&host).await;
    assert_eq!((welcome.version, welcome.nonce, welcome.acknowledged), (Version(1), NONCE, 0));
    assert_eq!(agent.take_source().await, 3_000_000);
    agent.say(AgentToHost::EngineStarted).await;
    agent.say(log(1, b"one")).await;
    agent.say(log(2, b"two")).await;
    agent.acknowledged(2).await;
    let usage = AgentUsage { memory_peak_bytes: 5 << 20, engine_spawn_us: Some(9) };
    agent.say(AgentToHost::Usage(usage)).await;
    agent.say(built()).await;
    assert_eq!(agent.hear().await, HostToAgent::Finish);
    let (end, stored) = host.session.await.unwrap();
    assert!(matches!(end, End::Outcome(Outcome::Built(_))), "{end:?}");
    assert_eq!(seqs(&stored), [1, 2]);
    assert!(stored.engine_started);
    assert_eq!(stored.usage, Some(usage));
}

#[tokio::test]
async fn the_source_stays_within_its_window() {
    let host = host(5_000_000);
    let (mut agent, _) = Agent::welcomed(&host).await;
    assert!(matches!(agent.hear().await, HostToAgent::Job(_)));
    let mut got = 0;
    while got < SOURCE_WINDOW {
        let HostToAgent::Source(bytes) = agent.hear().await else { panic!("not the source") };
        got += bytes.len() as u64;
    }
    assert_eq!(got, SOURCE_WINDOW);
    // Nothing taken: the next word of the host is not source.
    agent.say(log(1, b"x")).await;
    assert_eq!(agent.hear().await, HostToAgent::Acknowledge { seq: 1 });
    agent.say(AgentToHost::SourceTaken { total: 1 }).await;
    assert_eq!(agent.hear().await, HostToAgent::Source(vec![5]));
}

#[tokio::test]
async fn a_resumed_session_stores_nothing_twice() {
    let host = host(10);
    let (mut agent, welcome) = Agent::welcomed(&host).await;
    agent.take_source().await;
    agent.say(log(1, b"1")).await;
    agent.say(log(2, b"2")).await;
    agent.acknowledged(2).await;
    drop(agent);
    let resume = Resume { token: welcome.resume_token, acknowledged: 1 };
    let (mut agent, reply) = Agent::hello(&host, Some(resume)).await;
    let HelloReply::Welcome(again) = reply else { panic!("{reply:?}") };
    assert_eq!(again.acknowledged, 2);
    assert_ne!(again.resume_token, welcome.resume_token);
    for seq in 1..=3 {
        agent.say(log(seq, b"x")).await;
    }
    agent.acknowledged(3).await;
    agent.say(built()).await;
    let (end, stored) = host.session.await.unwrap();
    assert!(matches!(end, End::Outcome(_)), "{end:?}");
    assert_eq!(seqs(&stored), [1, 2, 3]);
}

#[tokio::test]
async fn strangers_are_refused_while_the_session_goes_on() {
    let host = host(10);
    let (mut agent, welcome) = Agent::welcomed(&host).await;
    agent.take_source().await;
    let (_, reply) = Agent::hello(&host, None).await;
    assert!(matches!(reply, HelloReply::Reject(r) if r.reason == RejectReason::Taken));
    let mut token = welcome.resume_token;
    token[0] ^= 1;
    let (_, reply) = Agent::hello(&host, Some(Resume { token, acknowledged: 0 })).await;
    assert!(matches!(reply, HelloReply::Reject(r) if r.reason == RejectReason::Resume));
    agent.say(built()).await;
    assert!(matches!(host.session.await.unwrap().0, End::Outcome(_)));
}

fn resume(token: [u8; TOKEN_LEN]) -> Resume {
    Resume { token, acknowledged: 0 }
}

#[tokio::test]
async fn an_old_token_does_not_resume_once_the_new_one_has_arrived() {
    let host = host(10);
    let (mut agent, first) = Agent::welcomed(&host).await;
    agent.take_source().await;
    drop(agent);
    let (mut agent, reply) = Agent::hello(&host, Some(resume(first.resume_token))).await;
    let HelloReply::Welcome(second) = reply else { panic!("{reply:?}") };
    // Both at one time: whoever has the old token and was in the line when the agent was heard comes too late.
    agent.say(log(1, b"x")).await;
    let (_, reply) = Agent::hello(&host, Some(resume(first.resume_token))).await;
    assert!(matches!(reply, HelloReply::Reject(r) if r.reason == RejectReason::Resume));
    agent.acknowledged(1).await;
    drop(agent);
    // Nor when the connection has broken since: the agent has its own.
    let (_, reply) = Agent::hello(&host, Some(resume(first.resume_token))).await;
    assert!(matches!(reply, HelloReply::Reject(r) if r.reason == RejectReason::Resume));
    let (mut agent, reply) = Agent::hello(&host, Some(resume(second.resume_token))).await;
    let HelloReply::Welcome(third) = reply else { panic!("{reply:?}") };
    assert_eq!(third.acknowledged, 1);
    agent.say(built()).await;
    assert!(matches!(host.session.await.unwrap().0, End::Outcome(_)));
}

/// The host has sent it, and has forgotten the token that was shown for it; the agent never read it.
#[tokio::test]
async fn a_welcome_that_was_lost_does_not_spend_the_token() {
    let host = host(10);
    let (mut agent, first) = Agent::welcomed(&host).await;
    agent.take_source().await;
    for seq in 1..=3 {
        agent.say(log(seq, b"x")).await;
    }
    agent.acknowledged(3).await;
    drop(agent);
    let mut unread = vec![];
    for read in [false, true, false] {
        let mut agent = Agent::dial(&host).await;
        frame::write(&mut agent.writer, &hello(Some(resume(first.resume_token)))).await.unwrap();
        if read {
            let HelloReply::Welcome(welcome) = agent.reader.read().await.unwrap() else {
                panic!("refused")
            };
            assert_eq!(welcome.acknowledged, 3);
            unread.push(welcome.resume_token);
        }
    }
    let (agent, reply) = Agent::hello(&host, Some(resume(first.resume_token))).await;
    let HelloReply::Welcome(last) = reply else { panic!("{reply:?}") };
    // What is stored stays stored, whatever the agent says that it knows.
    assert_eq!(last.acknowledged, 3);
    assert!(!unread.contains(&last.resume_token));
    drop(agent);
    // Nobody ever read these, but one who listens in: they are not the newest, and were shown by nobody.
    for token in unread {
        let (_, reply) = Agent::hello(&host, Some(resume(token))).await;
        assert!(matches!(reply, HelloReply::Reject(r) if r.reason == RejectReason::Resume));
    }
    let (mut agent, reply) = Agent::hello(&host, Some(resume(last.resume_token))).await;
    assert!(matches!(reply, HelloReply::Welcome(_)), "{reply:?}");
    for seq in 1..=4 {
        agent.say(log(seq, b"x")).await;
    }
    agent.acknowledged(4).await;
    agent.say(built()).await;
    let (end, stored) = host.session.await.unwrap();
    assert!(matches!(end, End::Outcome(_)), "{end:?}");
    assert_eq!(seqs(&stored), [1, 2, 3, 4]);
}

/// An agent that has nothing to say does not prove that it was welcomed. One that was not has given up by then.
#[tokio::test(start_paused = true)]
async fn a_token_that_was_answered_is_not_good_for_ever() {
    let in_time = RESUME_DEADLINE.saturating_sub(Duration::from_millis(1));
    for (waits, good) in [(in_time, true), (RESUME_DEADLINE, false)] {
        let host = host(10);
        let (mut agent, first) = Agent::welcomed(&host).await;
        agent.take_source().await;
        agent.say(log(1, b"x")).await;
        agent.acknowledged(1).await;
        let (_agent, reply) = Agent::hello(&host, Some(resume(first.resume_token))).await;
        assert!(matches!(reply, HelloReply::Welcome(_)), "{reply:?}");
        tokio::time::sleep(waits).await;
        let (_other, reply) = Agent::hello(&host, Some(resume(first.resume_token))).await;
        assert_eq!(matches!(reply, HelloReply::Welcome(_)), good, "{waits:?}: {reply:?}");
    }
}

#[tokio::test]
async fn a_cancel_is_told_and_ends_the_session() {
    let host = host(10);
    let (mut agent, _) = Agent::welcomed(&host).await;
    agent.take_source().await;
    host.cancel.cancel();
    assert_eq!(agent.hear().await, HostToAgent::Cancel);
    agent.say(log(1, b"last words")).await;
    agent.say(AgentToHost::Outcome(Outcome::Cancelled)).await;
    let (end, stored) = host.session.await.unwrap();
    assert!(matches!(end, End::Cancelled(_)));
    assert_eq!(seqs(&stored), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_cancel_does_not_wait_for_a_deaf_agent() {
    let host = host(10);
    let (_agent, _) = Agent::welcomed(&host).await;
    let begun = Instant::now();
    host.cancel.cancel();
    assert!(matches!(host.session.await.unwrap().0, End::Cancelled(_)));
    assert!(begun.elapsed() <= CANCEL_GRACE + Duration::from_millis(10));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_begin_its_job_is_lost_and_one_that_begins_is_not() {
    let host = host(3);
    let (mut agent, _) = Agent::welcomed(&host).await;
    agent.take_source().await;
    let (end, _) = host.session.await.unwrap();
    let End::Lost(why) = end else { panic!("{end:?}") };
    assert!(why.contains("did not begin its job within 60 s"), "{why}");

    let host = self::host(3);
    let (mut agent, _) = Agent::welcomed(&host).await;
    agent.take_source().await;
    agent.say(log(1, b"x")).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(!host.session.is_finished());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_never_dials_is_lost() {
    let host = host(10);
    assert!(matches!(host.session.await.unwrap().0, End::Lost(_)));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_come_back_is_lost() {
    let host = host(10);
    let (mut agent, _) = Agent::welcomed(&host).await;
    agent.take_source().await;
    // SourceEnd reaches the agent before the host's writer notes it: one round trip orders them.
    agent.say(log(1, b"x")).await;
    agent.acknowledged(1).await;
    drop(agent);
    let (end, _) = host.session.await.unwrap();
    assert!(matches!(&end, End::Lost(why) if why.contains("did not come back")), "{end:?}");
}

#[tokio::test]
async fn a_version_that_is_not_spoken_is_refused_by_name() {
    let host = host(10);
    let mut agent = Agent::dial(&host).await;
    let versions = VersionRange { min: Version(200), max: Version(201) };
    frame::write(&mut agent.writer, &Hello { versions, ..hello(None) }).await.unwrap();
    let reply = agent.reader.read().await.unwrap();
    assert!(matches!(reply, HelloReply::Reject(r) if r.reason == RejectReason::Version));
    let (end, _) = host.session.await.unwrap();
    assert!(matches!(&end, End::Version(why) if why.contains("v200 to v201")), "{end:?}");
}

/// What ends a session as a breach of the protocol.
async fn breach(say: Vec<AgentToHost>) -> End {
    let host = host(10);
    let (mut agent, _) = Agent::welcomed(&host).await;
    for message in say {
        agent.say(message).await;
    }
    host.session.await.unwrap().0
}

#[tokio::test]
async fn breaches_of_the_protocol_end_the_session() {
    let kept = vec![AgentToHost::Kept, failed()];
    let oversized = vec![log(1, &vec![0; MAX_LOG_BYTES + 1])];
    let gap = vec![log(1, b"1"), log(3, b"3")];
    let from_two = vec![log(2, b"2")];
    let long_message = "m".repeat(kiln_protocol::event::MAX_REPORT_TEXT + 1);
    let failure = Failure {
        kind: FailureKind::Internal,
        message: long_message,
        step: None,
        exit_code: None,
        detail: None,
    };
    let outcome = vec![AgentToHost::Outcome(Outcome::Failed(failure))];
    for say in [kept, oversized, gap, from_two, outcome] {
        let end = breach(say).await;
        assert!(matches!(end, End::Protocol(_)), "{end:?}");
    }
}

/// Whoever enters the VM may be root there, and get hold of the agent's connection.
#[tokio::test]
async fn nothing_counts_after_a_step_was_kept() {
    let host = host_that_keeps();
    let (mut agent, _) = Agent::welcomed(&host).await;
    agent.take_source().await;
    agent.say(log(1, b"before")).await;
    agent.acknowledged(1).await;
    // All at one time, so that the host has it at hand when it ends the session.
    let after = [log(2, b"after"), AgentToHost::EngineStarted, built()];
    let said = [vec![AgentToHost::Kept, failed()], after.into()].concat();
    let frames: Vec<u8> = said.iter().flat_map(|m| frame::encode(m).unwrap()).collect();
    tokio::io::AsyncWriteExt::write_all(&mut agent.writer, &frames).await.unwrap();
    let Host { dial, session, .. } = host;
    let (end, stored) = session.await.unwrap();
    assert!(matches!(&end, End::Kept(failure) if failure.exit_code == Some(42)), "{end:?}");
    assert_eq!(seqs(&stored), [1]);
    assert!(!stored.engine_started);
    // The agent is not told to finish: its VM is to stay. And nobody takes it back.
    assert!(agent.reader.read::<HostToAgent>().await.is_err());
    let (_guest, far) = tokio::io::duplex(64);
    assert!(dial.send(far).await.is_err());
}

/// A step that is kept has failed: whoever says so and then something else is not believed either.
#[tokio::test]
async fn a_build_whose_step_is_kept_ends_in_no_other_way() {
    for outcome in [built(), AgentToHost::Outcome(Outcome::Cancelled)] {
        let host = host_that_keeps();
        let (mut agent, _) = Agent::welcomed(&host).await;
        agent.take_source().await;
        agent.say(AgentToHost::Kept).await;
        agent.say(outcome).await;
        let end = host.session.await.unwrap().0;
        assert!(matches!(&end, End::Protocol(why) if why.contains("kept")), "{end:?}");
    }
}

#[tokio::test]
async fn a_frame_that_does_not_decode_ends_the_session_after_what_came_before() {
    use tokio::io::AsyncWriteExt;
    let host = host(10);
    let (mut agent, _) = Agent::welcomed(&host).await;
    let phase = Event::Phase(Phase::Building);
    agent.say(AgentToHost::Event(NumberedEvent { seq: 1, at_ms: 1, event: phase })).await;
    agent.writer.write_all(&[0, 0, 0, 1, 0xFF]).await.unwrap();
    let (end, stored) = host.session.await.unwrap();
    assert!(matches!(end, End::Protocol(_)), "{end:?}");
    assert_eq!(seqs(&stored), [1]);
}

#[tokio::test]
async fn dials_that_the_agent_gave_up_do_not_count() {
    let host = host(10);
    drop(Agent::dial(&host).await);
    let mut half = Agent::dial(&host).await;
    tokio::io::AsyncWriteExt::write_all(&mut half.writer, &[0, 0]).await.unwrap();
    drop(half);
    let (mut agent, _) = Agent::welcomed(&host).await;
    agent.take_source().await;
    agent.say(built()).await;
    assert!(matches!(host.session.await.unwrap().0, End::Outcome(_)));
}

#[tokio::test]
async fn a_first_word_that_is_no_hello_ends_the_session() {
    let host = host(10);
    let mut agent = Agent::dial(&host).await;
    frame::write(&mut agent.writer, &Hello { magic: *b"HTTP", ..hello(None) }).await.unwrap();
    assert!(matches!(host.session.await.unwrap().0, End::Protocol(_)));
}

#[tokio::test]
async fn a_secret_that_is_asked_for_is_given_and_a_flood_of_requests_ends_the_session() {
    let host = host(10);
    let (mut agent, _) = Agent::welcomed(&host).await;
    agent.take_source().await;
    let id = SecretId::new("npm").unwrap();
    agent.say(AgentToHost::SecretRequest { id: id.clone() }).await;
    let HostToAgent::Secret { id: given, answer: SecretAnswer::Value(value) } = agent.hear().await
    else {
        panic!("no secret");
    };
    assert_eq!((given, value.expose()), (id.clone(), &b"value of npm"[..]));
    // Somebody else has to read what is said, or the guest waits for ever.
    let Agent { mut reader, mut writer } = agent;
    let read = tokio::spawn(async move { while reader.read::<HostToAgent>().await.is_ok() {} });
    for _ in 0..2000 {
        let request = AgentToHost::SecretRequest { id: id.clone() };
        if frame::write(&mut writer, &request).await.is_err() {
            break;
        }
    }
    let (end, stored) = host.session.await.unwrap();
    assert!(matches!(end, End::Protocol(_)), "{end:?}");
    assert_eq!(stored.asked.len(), 1000);
    read.await.unwrap();
}
