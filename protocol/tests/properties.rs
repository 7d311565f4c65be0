//! What holds for all messages and all bytes: what is encoded is decoded, and what a hostile peer
//! sends neither panics nor costs more memory than it sent.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::pin::Pin;
use std::task::{Context, Poll};

use kiln_protocol::event::{
    Built, Event, Exited, Failure, FailureKind, Lockfile, Log, LogStream, Name, NumberedEvent,
    Outcome, Phase, Step, StepEnd, StepState,
};
use kiln_protocol::exec::{
    Copy, Ended, Exec, HostToSession, Open, Place, SessionToHost, Stream, Terminal,
};
use kiln_protocol::frame::{FrameError, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, Reject, Resume, Welcome};
use kiln_protocol::job::{BuildId, BuildJob, Dockerfile, Job, Limits, Role, StepNetwork};
use kiln_protocol::message::{AgentToHost, AgentUsage, HostToAgent};
use kiln_protocol::preamble::{self, Preamble};
use kiln_protocol::run::RunJob;
use kiln_protocol::secret::{SecretAnswer, SecretId, SecretSpec, SecretValue};
use kiln_protocol::version::{Features, Version, VersionRange};
use proptest::prelude::*;
use support::{CAUSES, Kind, Message, REASONS, every_message};
use tokio::io::{AsyncRead, ReadBuf};

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..600)
}

fn hello() -> impl Strategy<Value = Hello> {
    let resume = (any::<[u8; 32]>(), any::<u64>())
        .prop_map(|(token, acknowledged)| Resume { token, acknowledged });
    let versions = (any::<u16>(), any::<u16>())
        .prop_map(|(min, max)| VersionRange { min: Version(min), max: Version(max) });
    (
        any::<[u8; 4]>(),
        versions,
        any::<u64>(),
        any::<(String, String)>(),
        proptest::option::of(resume),
    )
        .prop_map(|(magic, versions, features, (agent, image), resume)| Hello {
            magic,
            versions,
            features: Features(features),
            agent,
            image,
            resume,
        })
}

fn reply() -> impl Strategy<Value = HelloReply> {
    let welcome = (any::<(u16, u64, u64, u64)>(), any::<[[u8; 32]; 3]>()).prop_map(
        |((version, features, time_ms, acknowledged), [resume_token, nonce, entropy])| {
            HelloReply::Welcome(Welcome {
                version: Version(version),
                features: Features(features),
                resume_token,
                nonce,
                time_ms,
                entropy,
                acknowledged,
            })
        },
    );
    let reject = (proptest::sample::select(&REASONS[..]), any::<String>())
        .prop_map(|(reason, message)| HelloReply::Reject(Reject { reason, message }));
    prop_oneof![welcome, reject]
}

fn secret_id() -> impl Strategy<Value = SecretId> {
    "[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}".prop_map(|id| SecretId::new(id).unwrap())
}

fn job() -> impl Strategy<Value = Job> {
    let dockerfile = prop_oneof![
        any::<String>().prop_map(Dockerfile::InSource),
        bytes().prop_map(Dockerfile::Inline)
    ];
    let network = prop_oneof![Just(StepNetwork::None), Just(StepNetwork::Proxy)];
    let args = proptest::collection::vec(any::<(String, String)>(), 0..4);
    let secret = (secret_id(), any::<Option<String>>())
        .prop_map(|(id, variable)| SecretSpec { id, variable });
    let secrets = proptest::collection::vec(secret, 0..4);
    let build = (
        dockerfile,
        any::<Option<String>>(),
        args,
        network,
        any::<Option<String>>(),
        secrets,
        any::<bool>(),
        proptest::collection::vec(any::<String>(), 0..4),
    )
        .prop_map(
            |(
                dockerfile,
                target,
                build_args,
                network,
                base_digest,
                secrets,
                keep_failed,
                upstreams,
            )| {
                BuildJob {
                    dockerfile,
                    target,
                    build_args,
                    network,
                    base_digest,
                    egress_ca: vec![],
                    secrets,
                    keep_failed,
                    upstreams,
                }
            },
        );
    let run = (
        any::<(String, String, String, u8)>(),
        proptest::collection::vec(any::<String>(), 0..4),
        proptest::collection::vec(any::<(String, String)>(), 0..4),
    )
        .prop_map(|((hostname, user, working_dir, stop_signal), args, env)| RunJob {
            hostname,
            args,
            env,
            user,
            working_dir,
            stop_signal,
        });
    let role = prop_oneof![build.prop_map(Role::Build), run.prop_map(Role::Run)];
    let limits = (any::<(u64, u64, u64)>(), any::<(u32, u32)>());
    ("[a-z0-9-]{1,64}", role, limits).prop_map(
        |(id, role, ((time, log, source), (procs, entries)))| Job {
            build: BuildId::new(id).unwrap(),
            role,
            limits: Limits {
                timeout_ms: time,
                spent_ms: time / 2,
                log_bytes: log,
                processes: procs,
                source_bytes: source,
                source_entries: entries.into(),
            },
        },
    )
}

fn host_message() -> impl Strategy<Value = HostToAgent> {
    prop_oneof![
        job().prop_map(|job| HostToAgent::Job(Box::new(job))),
        bytes().prop_map(HostToAgent::Source),
        any::<u64>().prop_map(|total| HostToAgent::SourceEnd { total }),
        any::<u64>().prop_map(|seq| HostToAgent::Acknowledge { seq }),
        Just(HostToAgent::Cancel),
        Just(HostToAgent::Finish),
        (secret_id(), answer()).prop_map(|(id, answer)| HostToAgent::Secret { id, answer }),
    ]
}

fn answer() -> impl Strategy<Value = SecretAnswer> {
    prop_oneof![
        bytes().prop_map(|value| SecretAnswer::Value(SecretValue::new(value))),
        Just(SecretAnswer::Missing),
        Just(SecretAnswer::Denied),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let stream =
        prop_oneof![Just(LogStream::Stdout), Just(LogStream::Stderr), Just(LogStream::Kiln)];
    let log = (stream, any::<Option<u32>>(), any::<bool>(), bytes()).prop_map(
        |(stream, step, partial, content)| Event::Log(Log { stream, step, partial, content }),
    );
    let ended =
        any::<(i32, u64, u64, u32)>().prop_map(|(exit_code, duration, memory, oom_kills)| {
            StepState::Ended(StepEnd {
                exit_code,
                duration_ms: duration,
                memory_peak_bytes: memory,
                oom_kills,
            })
        });
    let state = prop_oneof![Just(StepState::Started), ended];
    let step = (any::<u32>(), any::<String>(), state)
        .prop_map(|(index, name, state)| Event::Step(Step { index, name, state }));
    let phase = prop_oneof![
        Just(Phase::Unpacking),
        Just(Phase::Building),
        Just(Phase::Pushing),
        Just(Phase::Running)
    ];
    let name =
        any::<(Option<u32>, String)>().prop_map(|(step, host)| Event::Name(Name { step, host }));
    prop_oneof![log, step, phase.prop_map(Event::Phase), name]
}

fn outcome() -> impl Strategy<Value = Outcome> {
    let lockfile = any::<(String, [u8; 32])>().prop_map(|(path, sha256)| Lockfile { path, sha256 });
    let built = (any::<(String, String)>(), proptest::collection::vec(lockfile, 0..4)).prop_map(
        |((digest, engine), lockfiles)| Outcome::Built(Built { digest, engine, lockfiles }),
    );
    let failed = (
        proptest::sample::select(&FailureKind::ALL[..]),
        any::<String>(),
        any::<(Option<u32>, Option<i32>, Option<String>)>(),
    )
        .prop_map(|(kind, message, (step, exit_code, detail))| {
            Outcome::Failed(Failure { kind, message, step, exit_code, detail })
        });
    let exited = any::<u8>().prop_map(|code| Outcome::Exited(Exited { code }));
    prop_oneof![built, failed, Just(Outcome::Cancelled), exited]
}

fn agent_message() -> impl Strategy<Value = AgentToHost> {
    prop_oneof![
        (any::<(u64, u64)>(), event()).prop_map(|((seq, at_ms), event)| {
            AgentToHost::Event(NumberedEvent { seq, at_ms, event })
        }),
        any::<u64>().prop_map(|total| AgentToHost::SourceTaken { total }),
        Just(AgentToHost::EngineStarted),
        secret_id().prop_map(|id| AgentToHost::SecretRequest { id }),
        outcome().prop_map(AgentToHost::Outcome),
        any::<(u64, Option<u64>)>().prop_map(|(memory_peak_bytes, engine_spawn_us)| {
            AgentToHost::Usage(AgentUsage { memory_peak_bytes, engine_spawn_us })
        }),
    ]
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![any::<bool>().prop_map(|secrets| Place::Job { secrets }), Just(Place::Vm)]
}

fn size() -> impl Strategy<Value = Terminal> {
    any::<(u16, u16)>().prop_map(|(rows, cols)| Terminal { rows, cols })
}

fn open() -> impl Strategy<Value = Open> {
    let exec = (
        place(),
        proptest::collection::vec(any::<String>(), 0..4),
        proptest::collection::vec(any::<(String, String)>(), 0..4),
        any::<(Option<String>, Option<String>)>(),
        proptest::option::of(size()),
    )
        .prop_map(|(place, command, env, (directory, user), terminal)| {
            Open::Exec(Exec { place, command, env, directory, user, terminal })
        });
    let copy = || (place(), any::<String>()).prop_map(|(place, path)| Copy { place, path });
    prop_oneof![exec, copy().prop_map(Open::CopyOut), copy().prop_map(Open::CopyIn)]
}

fn to_session() -> impl Strategy<Value = HostToSession> {
    prop_oneof![
        open().prop_map(|open| HostToSession::Open(Box::new(open))),
        bytes().prop_map(HostToSession::Input),
        Just(HostToSession::InputEnd),
        size().prop_map(HostToSession::Resize),
        any::<u8>().prop_map(HostToSession::Signal),
    ]
}

fn of_session() -> impl Strategy<Value = SessionToHost> {
    let stream = prop_oneof![Just(Stream::Out), Just(Stream::Err)];
    let failed = (proptest::sample::select(&CAUSES[..]), any::<String>())
        .prop_map(|(cause, why)| Ended::Failed { cause, why });
    let exited = any::<u8>().prop_map(|code| Ended::Exited { code });
    prop_oneof![
        Just(SessionToHost::Started),
        any::<u64>().prop_map(|total| SessionToHost::InputTaken { total }),
        (stream, bytes()).prop_map(|(stream, bytes)| SessionToHost::Output { stream, bytes }),
        prop_oneof![failed, exited].prop_map(SessionToHost::Ended),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        hello().prop_map(Message::Hello),
        reply().prop_map(Message::Reply),
        host_message().prop_map(Message::Host),
        agent_message().prop_map(Message::Agent),
        to_session().prop_map(Message::ToSession),
        of_session().prop_map(Message::OfSession),
    ]
}

/// A golden frame's value with a few bytes changed, cut, repeated or added: nearer to what a
/// decoder believes than random bytes are.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let seeds: Vec<Vec<u8>> =
        every_message().iter().map(|(_, m)| m.encode().unwrap()[4..].to_vec()).collect();
    let edit = (0..4u8, any::<prop::sample::Index>(), any::<u8>());
    (proptest::sample::select(seeds), proptest::collection::vec(edit, 1..8)).prop_map(
        |(mut value, edits)| {
            for (what, at, byte) in edits {
                let at = at.index(value.len() + 1);
                match what {
                    0 if at < value.len() => value[at] = byte,
                    1 => value.truncate(at),
                    2 => value.extend_from_within(at..),
                    _ => value.insert(at, byte),
                }
                value.truncate(64 * 1024);
            }
            value
        },
    )
}

/// What decodes is a value of its own: encoded and decoded again it is the same.
fn decodes_safely(value: &[u8]) {
    for kind in Kind::ALL {
        let Ok(message) = kind.decode(value) else { continue };
        let again = message.encode().unwrap();
        // Never more than was received: postcard's shortest form of the same value.
        assert!(again.len() - 4 <= value.len());
        assert_eq!(kind.decode(&again[4..]).unwrap(), message);
    }
}

/// Of a frame's value: small ones, and those around what a reader reads at once.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![0..300_usize, 16_000..17_000_usize, 65_000..67_000_usize, 100_000..300_000_usize]
}

/// A connection whose bytes come in pieces of these sizes, over and over, and none at once.
struct Pieces<'a> {
    left: &'a [u8],
    sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
    piece: &'a [u8],
}

impl<'a> Pieces<'a> {
    fn new(left: &'a [u8], sizes: &'a [usize]) -> Self {
        Self { left, sizes: sizes.iter().cycle(), piece: &[] }
    }
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.piece.is_empty() && !self.left.is_empty() {
            let size = self.sizes.next().map_or(1, |size| *size);
            (self.piece, self.left) = self.left.split_at(size.min(self.left.len()));
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let count = self.piece.len().min(buffer.remaining());
        buffer.put_slice(&self.piece[..count]);
        self.piece = &self.piece[count..];
        Poll::Ready(Ok(()))
    }
}

/// The next message by reads that are dropped whenever they have to wait.
async fn undeterred(reader: &mut FrameReader<Pieces<'_>>) -> Result<HostToAgent, FrameError> {
    loop {
        tokio::select! {
            biased;
            read = reader.read() => return read,
            () = std::future::ready(()) => {}
        }
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_encoded_is_decoded(message in message()) {
        let frame = message.encode().unwrap();
        prop_assert_eq!(message.kind().decode(&frame[4..]).unwrap(), message);
    }

    #[test]
    fn a_stream_of_frames_is_read_in_order(messages in proptest::collection::vec(host_message(), 1..6)) {
        let stream: Vec<u8> =
            messages.iter().flat_map(|m| kiln_protocol::frame::encode(m).unwrap()).collect();
        block_on(async {
            let mut reader = FrameReader::new(&stream[..]);
            for message in &messages {
                assert_eq!(reader.read::<HostToAgent>().await.unwrap(), *message);
            }
            assert!(matches!(reader.read::<HostToAgent>().await, Err(FrameError::Closed)));
        });
    }

    #[test]
    fn random_bytes_never_panic(value in proptest::collection::vec(any::<u8>(), 0..2048)) {
        decodes_safely(&value);
    }

    #[test]
    fn mutated_messages_never_panic(value in mutated()) {
        decodes_safely(&value);
    }

    #[test]
    fn a_random_stream_ends_in_an_error(stream in bytes()) {
        block_on(async {
            let mut reader = FrameReader::new(&stream[..]);
            // Every read takes at least the prefix, so that this many are enough for an end.
            for _ in 0..=stream.len() / 4 {
                if let Err(FrameError::Closed | FrameError::Io(_) | FrameError::TooLarge(_)) =
                    reader.read::<AgentToHost>().await
                {
                    return;
                }
            }
            panic!("the stream goes on behind its end");
        });
    }

    #[test]
    fn preambles_go_both_ways_or_are_refused(bytes in any::<[u8; preamble::LEN]>(), head in any::<bool>()) {
        let mut bytes = bytes;
        if head {
            bytes[..5].copy_from_slice(b"KLNP\x01");
            bytes[5] %= 5;
            bytes[6..8].fill(0);
        }
        if let Ok(preamble) = Preamble::decode(&bytes) {
            prop_assert_eq!(preamble.encode(), bytes);
        }
    }
}

proptest! {
    // Each is megabytes.
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn frames_in_any_pieces_are_the_same(
        sizes in proptest::collection::vec(length(), 1..6),
        pieces in proptest::collection::vec(prop_oneof![1..9_usize, 1..200_000_usize], 1..40),
    ) {
        let messages: Vec<HostToAgent> = sizes.iter().enumerate().map(|(at, size)| {
            HostToAgent::Source((0..*size).map(|n| u8::try_from((n * 31 + at) % 251).unwrap()).collect())
        }).collect();
        let stream: Vec<u8> =
            messages.iter().flat_map(|m| kiln_protocol::frame::encode(m).unwrap()).collect();
        block_on(async {
            let mut reader = FrameReader::new(Pieces::new(&stream, &pieces));
            for message in &messages {
                assert_eq!(undeterred(&mut reader).await.unwrap(), *message);
            }
            assert!(matches!(undeterred(&mut reader).await, Err(FrameError::Closed)));
        });
        // Or one by one, each with a reader of its own.
        block_on(async {
            let mut stream = Pieces::new(&stream, &pieces);
            for message in &messages {
                let read: HostToAgent = kiln_protocol::frame::read(&mut stream).await.unwrap();
                assert_eq!(read, *message);
            }
        });
        // Or cut short.
        let cut = stream.len() - 1 - pieces[0] % stream.len();
        let whole = messages.iter().scan(0, |end, m| {
            *end += kiln_protocol::frame::encode(m).unwrap().len();
            Some(*end)
        });
        let ends: Vec<usize> = whole.take_while(|end| *end <= cut).collect();
        block_on(async {
            let mut reader = FrameReader::new(Pieces::new(&stream[..cut], &pieces));
            for message in &messages[..ends.len()] {
                assert_eq!(undeterred(&mut reader).await.unwrap(), *message);
            }
            let end = undeterred(&mut reader).await.unwrap_err();
            let between = ends.last().copied().unwrap_or(0) == cut;
            assert_eq!(matches!(end, FrameError::Closed), between, "{end}");
            assert_eq!(matches!(end, FrameError::Io(_)), !between, "{end}");
        });
    }
}
