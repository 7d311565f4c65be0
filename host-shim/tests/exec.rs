//! Sessions against an agent that is a real peer, and one that does not behave.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/agent.rs"]
mod agent;

use std::time::Duration;

use agent::{Agent, NONCE, Vm};
use async_trait::async_trait;
use bytes::Bytes;
use kiln::exec::bridge::{self, Bounds};
use kiln::exec::{ClientInput, ClientOutput, Dial, Door, Entrance, Gone, How, Outcome, Said};
use kiln::token::Lapse;
use kiln::vmm::DialError;
use kiln_protocol::exec::{
    Cause, Ended, Exec, HostToSession, MAX_CHUNK, MAX_WHY, Open, Place, SessionToHost, Stream,
    Terminal,
};
use kiln_protocol::frame::{self, MAX_FRAME};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// A client that says what a test says, and is lost with it.
struct Says(mpsc::Receiver<Result<Said, Gone>>);

impl ClientInput for Says {
    async fn next(&mut self) -> Result<Said, Gone> {
        self.0.recv().await.unwrap_or(Err(Gone::Lost))
    }
}

/// A client that takes one piece at a time.
struct Takes(mpsc::Sender<(Stream, Vec<u8>)>);

impl ClientOutput for Takes {
    async fn output(&mut self, stream: Stream, bytes: Vec<u8>) -> Result<(), Gone> {
        self.0.send((stream, bytes)).await.map_err(|_| Gone::Lost)
    }

    async fn ping(&mut self) -> Result<(), Gone> {
        if self.0.is_closed() { Err(Gone::Lost) } else { Ok(()) }
    }
}

struct Session {
    says: mpsc::Sender<Result<Said, Gone>>,
    shown: mpsc::Receiver<(Stream, Vec<u8>)>,
    stop: CancellationToken,
    end_token: watch::Sender<Option<Lapse>>,
    running: tokio::task::JoinHandle<Outcome>,
}

const PING: Duration = Duration::from_millis(20);

fn command() -> Exec {
    Exec {
        place: Place::Job { secrets: false },
        command: vec!["x".into()],
        env: vec![],
        directory: None,
        user: None,
        terminal: Some(Terminal { rows: 24, cols: 80 }),
    }
}

fn begin(entrance: Entrance, timeout: Option<Duration>) -> Session {
    let (says, said) = mpsc::channel(1);
    let (show, shown) = mpsc::channel(1);
    let stop = CancellationToken::new();
    let (end_token, lapse) = watch::channel(None);
    let bounds = Bounds { timeout, stop: stop.clone(), lapse, ping: PING };
    let running = tokio::spawn(async move {
        let (mut input, mut output) = (Says(said), Takes(show));
        let open = Open::Exec(command());
        let before = std::future::ready(Ok(()));
        bridge::run(&entrance, open, bounds, before, &mut input, &mut output).await
    });
    Session { says, shown, stop, end_token, running }
}

impl Session {
    /// All that is printed, and the end.
    async fn end(mut self) -> (Vec<u8>, Outcome) {
        let mut printed = vec![];
        while let Some((_, bytes)) = self.shown.recv().await {
            printed.extend(bytes);
        }
        (printed, self.running.await.unwrap())
    }

    async fn say(&self, said: Said) {
        self.says.send(Ok(said)).await.unwrap();
    }
}

fn exited(code: u8) -> Outcome {
    Outcome { how: How::Exited, exit_code: Some(code), why: None, cause: None }
}

#[tokio::test]
async fn all_that_a_client_says_arrives_in_order_and_in_pieces() {
    let vm = Vm::new();
    let session = begin(vm.entrance(), None);
    let (mut agent, exec) = vm.started().await;
    assert_eq!(exec, command());
    let large: Vec<u8> = (0..=255).cycle().take(2 * MAX_CHUNK + 1).collect();
    session.say(Said::Input(Bytes::from(large.clone()))).await;
    let mut sizes = vec![];
    let mut got = vec![];
    while got.len() < large.len() {
        let piece = agent.input().await.unwrap();
        sizes.push(piece.len());
        got.extend(piece);
    }
    assert_eq!((got, sizes), (large, vec![MAX_CHUNK, MAX_CHUNK, 1]));
    let size = Terminal { rows: 1, cols: 2 };
    for (said, heard) in [
        (Said::Resize(size), HostToSession::Resize(size)),
        (Said::Signal(15), HostToSession::Signal(15)),
        (Said::InputEnd, HostToSession::InputEnd),
    ] {
        session.say(said).await;
        assert_eq!(agent.hear().await.unwrap(), heard);
    }
    agent.print(Stream::Out, &[0, 255]).await;
    agent.exit(3).await;
    assert_eq!(session.end().await, (vec![0, 255], exited(3)));
    agent.hung_up().await;
}

/// The agent may say that it starts a command before it knows whether it can.
#[tokio::test]
async fn a_command_that_could_not_be_started_was_refused() {
    for (cause, how, code) in [
        (Cause::NotFound, How::Refused, 127),
        (Cause::NotExecutable, How::Refused, 126),
        (Cause::NoStep, How::Refused, 125),
        (Cause::Invalid, How::Refused, 125),
        (Cause::Internal, How::Failed, 125),
    ] {
        let vm = Vm::new();
        let session = begin(vm.entrance(), None);
        vm.started().await.0.fail(cause, "why").await;
        let outcome = session.end().await.1;
        assert_eq!(
            outcome,
            Outcome { how, exit_code: Some(code), why: Some("why".into()), cause: Some(cause) }
        );
    }
}

/// What was printed before the end arrives whole, however slowly it is taken; what comes after the end never does.
#[tokio::test]
async fn the_end_comes_after_all_output_and_before_nothing() {
    let vm = Vm::new();
    let mut session = begin(vm.entrance(), None);
    let (mut agent, _) = vm.started().await;
    let agent = tokio::spawn(async move {
        for n in 0..100 {
            agent.print(Stream::Out, &[n; 1000]).await;
        }
        agent.exit(0).await;
        // Goes on as if nothing had ended.
        while frame::write(&mut agent.writer, &SessionToHost::Started).await.is_ok() {}
    });
    for n in 0..100 {
        tokio::task::yield_now().await;
        assert_eq!(session.shown.recv().await.unwrap().1, [n; 1000]);
    }
    assert!(session.shown.recv().await.is_none());
    assert_eq!(session.running.await.unwrap(), exited(0));
    agent.await.unwrap();
}

/// Runs an agent that does something wrong; gives what the client is told. The host has to hang up.
async fn told<F: Future<Output = Agent>>(misbehave: impl FnOnce(Agent) -> F) -> Outcome {
    let vm = Vm::new();
    let session = begin(vm.entrance(), None);
    let (agent, _) = vm.session().await;
    let mut agent = misbehave(agent).await;
    let outcome = session.end().await.1;
    agent.hung_up().await;
    outcome
}

#[tokio::test]
async fn an_agent_that_breaks_the_protocol_is_given_up() {
    let output = |len| SessionToHost::Output { stream: Stream::Out, bytes: vec![0; len] };
    let ended = || SessionToHost::Ended(Ended::Exited { code: 0 });
    let why = "w".repeat(MAX_WHY + 1);
    let too_long = SessionToHost::Ended(Ended::Failed { cause: Cause::Internal, why });
    for wrong in [
        vec![output(1)],
        vec![ended()],
        vec![SessionToHost::Started, SessionToHost::Started],
        vec![SessionToHost::Started, output(MAX_CHUNK + 1)],
        vec![too_long],
    ] {
        let outcome = told(async |mut agent| {
            for message in wrong {
                agent.say(message).await;
            }
            agent
        })
        .await;
        assert_eq!((outcome.how, outcome.exit_code), (How::Failed, Some(125)), "{outcome:?}");
        assert!(outcome.why.unwrap().contains("broke the protocol"));
    }
    for bytes in [
        (u32::try_from(MAX_FRAME).unwrap() + 1).to_be_bytes().to_vec(),
        vec![0xff; 64],
        vec![0, 0, 0, 0],
        vec![0, 0, 0, 2, 0, 0],
    ] {
        let outcome = told(async |mut agent| {
            agent.writer.write_all(&bytes).await.unwrap();
            agent
        })
        .await;
        assert_eq!(outcome.how, How::Failed, "{outcome:?}");
    }
}

#[tokio::test]
async fn an_agent_that_hangs_up_early_is_told_from_a_vm_that_ended() {
    for parts in [&[][..], &[0, 0, 0], &[0, 0, 0, 9, 1]] {
        let vm = Vm::new();
        let session = begin(vm.entrance(), None);
        let (mut agent, _) = vm.started().await;
        agent.writer.write_all(parts).await.unwrap();
        drop(agent);
        let outcome = session.end().await.1;
        assert_eq!((outcome.how, outcome.exit_code), (How::Failed, Some(125)));
    }
    let vm = Vm::new();
    let door = Door::default();
    let opened = door.open(vm.entrance());
    let session = begin(door.entrance().unwrap(), None);
    let (mut agent, _) = vm.started().await;
    agent.print(Stream::Out, b"last words").await;
    drop((agent, opened));
    let (printed, outcome) = session.end().await;
    assert_eq!(printed, b"last words");
    assert_eq!((outcome.how, outcome.exit_code), (How::VmEnded, Some(125)));
}

/// A VM that is over, and an agent that hangs on to its connection.
#[tokio::test]
async fn an_agent_that_outlives_its_vm_is_not_waited_for() {
    let vm = Vm::new();
    let door = Door::default();
    let opened = door.open(vm.entrance());
    let session = begin(door.entrance().unwrap(), None);
    let (mut agent, _) = vm.started().await;
    drop(opened);
    let outcome = session.end().await.1;
    assert_eq!(outcome.how, How::VmEnded);
    agent.hung_up().await;
}

#[tokio::test]
async fn who_prints_for_ever_is_ended_by_time_and_by_the_server() {
    for stops in [false, true] {
        let vm = Vm::new();
        let timeout = (!stops).then(|| Duration::from_millis(200));
        let mut session = begin(vm.entrance(), timeout);
        let (mut agent, _) = vm.started().await;
        let printing = tokio::spawn(async move {
            let piece = SessionToHost::Output { stream: Stream::Out, bytes: vec![b'y'; MAX_CHUNK] };
            while frame::write(&mut agent.writer, &piece).await.is_ok() {}
        });
        assert!(session.shown.recv().await.is_some());
        if stops {
            session.stop.cancel();
        }
        let outcome = session.end().await.1;
        let expected =
            if stops { (How::ServerStopped, Some(125)) } else { (How::TimedOut, Some(124)) };
        assert_eq!((outcome.how, outcome.exit_code), expected);
        // It was hung up on.
        printing.await.unwrap();
    }
}

#[tokio::test]
async fn a_token_that_opens_nothing_any_more_ends_its_session_and_says_why() {
    for (lapse, word) in [(Lapse::Revoked, "is revoked"), (Lapse::Expired, "has expired")] {
        let vm = Vm::new();
        let session = begin(vm.entrance(), None);
        let (mut agent, _) = vm.started().await;
        session.end_token.send_replace(Some(lapse));
        let outcome = session.end().await.1;
        assert_eq!((outcome.how, outcome.exit_code), (How::Revoked, Some(125)));
        let why = outcome.why.unwrap();
        assert!(why.contains(word), "{why}");
        agent.hung_up().await;
    }
}

/// Both directions are stuck: nothing is taken by the client or by the command. All ends all the same.
#[tokio::test]
async fn time_ends_what_is_stuck_in_both_directions() {
    let vm = Vm::new();
    let session = begin(vm.entrance(), Some(Duration::from_millis(500)));
    let (agent, _) = vm.started().await;
    let Agent { reader, mut writer, .. } = agent;
    let piece = SessionToHost::Output { stream: Stream::Out, bytes: vec![b'y'; MAX_CHUNK] };
    let printing = tokio::spawn(async move {
        let mut sent = 0;
        while frame::write(&mut writer, &piece).await.is_ok() {
            sent += 1;
        }
        sent
    });
    let mut said = 0;
    while !session.running.is_finished() {
        let input = Ok(Said::Input(Bytes::from(vec![0; MAX_CHUNK])));
        match tokio::time::timeout(PING, session.says.send(input)).await {
            Ok(Ok(())) => said += 1,
            Ok(Err(_)) => break,
            Err(_) => {}
        }
    }
    let outcome = session.running.await.unwrap();
    assert_eq!(outcome.how, How::TimedOut);
    // What a socket holds and a few pieces: the rest stayed with those who had it.
    let sent: usize = printing.await.unwrap();
    assert!(said < 64 && sent < 64, "{said} {sent}");
    drop(reader);
}

/// The command reads no input, so that the client is not listened to: what is written to it tells.
#[tokio::test]
async fn a_client_that_is_lost_behind_its_input_is_noticed() {
    let vm = Vm::new();
    let Session { says, shown, running, .. } = begin(vm.entrance(), None);
    let (mut agent, _) = vm.started().await;
    loop {
        let input = Ok(Said::Input(Bytes::from(vec![0; MAX_CHUNK])));
        if tokio::time::timeout(5 * PING, says.send(input)).await.is_err() {
            break;
        }
    }
    assert!(!running.is_finished());
    drop((says, shown));
    let outcome = running.await.unwrap();
    assert_eq!((outcome.how, outcome.exit_code), (How::ClientLost, None));
    agent.hung_up().await;
}

#[tokio::test]
async fn a_client_that_goes_or_misbehaves_ends_its_session() {
    for (gone, how) in
        [(Gone::Lost, How::ClientLost), (Gone::Misused("nonsense".into()), How::Failed)]
    {
        let vm = Vm::new();
        let session = begin(vm.entrance(), None);
        let (mut agent, _) = vm.started().await;
        session.says.send(Err(gone)).await.unwrap();
        assert_eq!(session.end().await.1.how, how);
        agent.hung_up().await;
    }
}

/// An agent that has closed its side for input, as one does whose command ended, is still heard.
#[tokio::test]
async fn input_that_nobody_takes_any_more_does_not_hide_the_end() {
    let vm = Vm::new();
    let session = begin(vm.entrance(), None);
    let (agent, _) = vm.started().await;
    let Agent { reader, mut writer, .. } = agent;
    drop(reader);
    for _ in 0..10 {
        session.say(Said::Input(Bytes::from_static(b"more"))).await;
    }
    let end = SessionToHost::Ended(Ended::Exited { code: 7 });
    frame::write(&mut writer, &end).await.unwrap();
    assert_eq!(session.end().await.1, exited(7));
}

/// An agent that takes connections and never says anything.
#[tokio::test(start_paused = true)]
async fn an_agent_that_says_nothing_is_not_waited_for() {
    let vm = Vm::new();
    let session = begin(vm.entrance(), None);
    let mut stream = vm.stream().await;
    let outcome = session.end().await.1;
    assert_eq!((outcome.how, outcome.exit_code), (How::Refused, Some(125)));
    let mut bytes = vec![];
    stream.read_to_end(&mut bytes).await.unwrap();
    assert!(bytes.starts_with(b"KLNP\x01\x03\0\0") && bytes[8..40] == NONCE);
}

/// What has to be done first was not done: the VM is reached, and told nothing.
#[tokio::test]
async fn nothing_is_begun_that_could_not_be_written_down() {
    let vm = Vm::new();
    let (entrance, stop) = (vm.entrance(), CancellationToken::new());
    let running = tokio::spawn(async move {
        let (_says, said) = mpsc::channel(1);
        let (mut input, mut output) = (Says(said), Takes(mpsc::channel(1).0));
        let lapse = watch::channel(None).1;
        let bounds = Bounds { timeout: None, lapse, stop, ping: PING };
        let open = Open::Exec(command());
        let before = std::future::ready(Err(Outcome::refused("the disk is full")));
        bridge::run(&entrance, open, bounds, before, &mut input, &mut output).await
    });
    let mut bytes = vec![];
    vm.stream().await.read_to_end(&mut bytes).await.unwrap();
    assert!(bytes.is_empty(), "{bytes:?}");
    assert_eq!(running.await.unwrap(), Outcome::refused("the disk is full"));
}

struct Unreachable;

#[async_trait]
impl Dial for Unreachable {
    async fn dial(&self) -> Result<kiln::exec::Line, DialError> {
        Err(DialError::Nobody(5002))
    }
}

#[tokio::test]
async fn a_vm_that_cannot_be_reached_is_named() {
    let outcome = begin(Entrance::new(Unreachable, NONCE), None).end().await.1;
    assert_eq!((outcome.how, outcome.exit_code), (How::Refused, Some(125)));
    let why = outcome.why.unwrap();
    assert!(why.contains("nothing in the VM takes connections on port 5002"), "{why}");
}
