//! Sessions over a socket, with a runtime that starts the command beside us.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use kiln_protocol::exec::{
    Cause, Copy, Ended, Exec, HostToSession, INPUT_WINDOW, Open, Place, SessionToHost, Stream,
    Terminal,
};
use kiln_protocol::frame::{self, FrameError, FrameReader};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::launch::Places;
use super::target::{Enterable, Target};
use super::{processes, session};

/// For what takes milliseconds on an idle machine.
const SOON: Duration = Duration::from_secs(60);

struct Host {
    frames: FrameReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
    served: JoinHandle<Result<(), FrameError>>,
    _dir: tempfile::TempDir,
}

impl Host {
    /// Opens a session in a step whose environment has STEP=7, in `/`.
    async fn open(exec: Exec) -> Self {
        Self::begin(Open::Exec(exec)).await
    }

    async fn begin(open: Open) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("runtime");
        fs::write(&program, include_str!("testdata/runtime.py")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let config = dir.path().join("config.json");
        let own = r#"{"process":{"args":["x"],"env":["STEP=7","PATH=/usr/bin:/bin"],"cwd":"/"}}"#;
        fs::write(&config, own).unwrap();
        let enterable = Enterable::default();
        enterable.open(Target {
            id: "step".into(),
            root: None,
            config,
            cgroup: "/kiln/steps/1".into(),
            secrets: false,
        });
        let files = dir.path().join("sessions");
        let cgroup_mount = dir.path().join("cgroup");
        fs::create_dir_all(cgroup_mount.join("kiln/steps/1")).unwrap();
        let places = Places { program, agent: "/nowhere".into(), files, cgroup_mount };
        let (here, there) = UnixStream::pair().unwrap();
        let served = tokio::spawn(async move { session::serve(there, &places, &enterable).await });
        let (read, write) = here.into_split();
        let mut host = Self { frames: FrameReader::new(read), write, served, _dir: dir };
        host.say(&HostToSession::Open(Box::new(open))).await;
        host
    }

    async fn say(&mut self, message: &HostToSession) {
        frame::write(&mut self.write, message).await.unwrap();
    }

    async fn hear(&mut self) -> SessionToHost {
        timeout(SOON, self.frames.read()).await.unwrap().unwrap()
    }

    /// What comes until the output holds the text.
    async fn until(&mut self, text: &str) -> String {
        let mut all = String::new();
        while !all.contains(text) {
            if let SessionToHost::Output { bytes, .. } = self.hear().await {
                all.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        all
    }

    /// Both outputs and the end.
    async fn rest(&mut self) -> (Vec<u8>, Vec<u8>, Ended) {
        let (mut out, mut err) = (vec![], vec![]);
        loop {
            match self.hear().await {
                SessionToHost::Output { stream: Stream::Out, bytes } => out.extend(bytes),
                SessionToHost::Output { stream: Stream::Err, bytes } => err.extend(bytes),
                SessionToHost::Ended(ended) => return (out, err, ended),
                SessionToHost::Started | SessionToHost::InputTaken { .. } => {}
            }
        }
    }

    async fn served(self) -> Result<(), FrameError> {
        drop((self.frames, self.write));
        timeout(SOON, self.served).await.unwrap().unwrap()
    }
}

fn shell(script: &str) -> Exec {
    Exec {
        place: Place::Job { secrets: false },
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec![],
        directory: None,
        user: None,
        terminal: None,
    }
}

fn is_over(leader: i32) -> bool {
    processes::of_session(Pid::from_raw(leader)).is_empty()
}

/// Whether they are over, or soon: who was killed has still to die, which takes its turn on a busy machine.
fn ends(leader: i32) -> bool {
    let patience = Timespec { tv_sec: SOON.as_secs().try_into().unwrap(), tv_nsec: 0 };
    loop {
        let left = processes::of_session(Pid::from_raw(leader));
        let Some(one) = left.first() else { return true };
        let pid = rustix::process::Pid::from_raw(one.as_raw()).unwrap();
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience)).unwrap() == 0 {
            return false;
        }
    }
}

#[tokio::test]
async fn a_command_has_the_steps_environment_and_its_code_comes_back() {
    let exec = Exec {
        directory: Some("/tmp".into()),
        env: vec![("MINE".into(), "8".into())],
        ..shell("pwd; echo $STEP$MINE; echo bad >&2; exit 42")
    };
    let mut host = Host::open(exec).await;
    let (out, err, ended) = host.rest().await;
    assert_eq!((out.as_slice(), err.as_slice()), (b"/tmp\n78\n".as_slice(), b"bad\n".as_slice()));
    assert_eq!(ended, Ended::Exited { code: 42 });
    host.served().await.unwrap();
}

#[tokio::test]
async fn a_program_that_is_missing_is_told_from_one_that_fails() {
    let exec = Exec { command: vec!["missing".into()], ..shell("") };
    let (_, _, ended) = Host::open(exec).await.rest().await;
    let Ended::Failed { cause: Cause::NotFound, why } = ended else { panic!("{ended:?}") };
    assert!(why.contains("`missing` not found"), "{why}");
}

#[tokio::test]
async fn any_bytes_go_through_both_ways_within_the_window() {
    let mut host = Host::open(shell("cat")).await;
    let data: Vec<u8> = (0..6_000_000u32)
        .flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 7).to_le_bytes())
        .collect();
    let (mut sent, mut taken, mut back) = (0usize, 0u64, Vec::new());
    let mut ended = false;
    while back.len() < data.len() {
        if sent == data.len() && !ended {
            ended = true;
            host.say(&HostToSession::InputEnd).await;
        }
        let next = (sent + 60_000).min(data.len());
        if next > sent && (next as u64) <= taken + INPUT_WINDOW {
            host.say(&HostToSession::Input(data[sent..next].to_vec())).await;
            sent = next;
            continue;
        }
        match host.hear().await {
            SessionToHost::InputTaken { total } => taken = total,
            SessionToHost::Output { bytes, .. } => back.extend(bytes),
            SessionToHost::Started => {}
            other @ SessionToHost::Ended(_) => panic!("{other:?}"),
        }
    }
    assert!(back == data, "the bytes differ");
    assert_eq!(host.rest().await.2, Ended::Exited { code: 0 });
}

#[tokio::test]
async fn a_signal_passes_a_command_that_does_not_read() {
    let mut host = Host::open(shell("echo ready; exec sleep 1000")).await;
    host.until("ready").await;
    for _ in 0..INPUT_WINDOW / 65_536 {
        host.say(&HostToSession::Input(vec![0; 65_536])).await;
    }
    host.say(&HostToSession::Signal(15)).await;
    assert_eq!(host.rest().await.2, Ended::Exited { code: 143 });
}

#[tokio::test]
async fn a_lost_host_ends_the_command_and_its_children() {
    let mut host = Host::open(shell("sleep 1000 & echo pid $$ .; cat")).await;
    let text = host.until(" .").await;
    let leader: i32 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    // Input that nobody takes does not keep the end from being seen.
    assert!(!is_over(leader));
    assert!(host.served().await.is_err());
    assert!(ends(leader));
}

#[tokio::test]
async fn what_a_command_leaves_behind_ends_with_it() {
    let mut host = Host::open(shell("sleep 1000 & echo pid $$ .")).await;
    let (out, _, ended) = host.rest().await;
    assert_eq!(ended, Ended::Exited { code: 0 });
    let text = String::from_utf8(out).unwrap();
    assert!(ends(text.split_whitespace().nth(1).unwrap().parse().unwrap()));
}

#[tokio::test]
async fn much_output_arrives_whole() {
    let mut host = Host::open(shell("yes | head -c 30000000")).await;
    let (out, _, ended) = host.rest().await;
    assert_eq!(out.len(), 30_000_000);
    assert_eq!(ended, Ended::Exited { code: 0 });
}

#[tokio::test]
async fn a_host_that_breaks_the_rules_is_cut_off() {
    let chunk = HostToSession::Input(vec![0; 60_000]);
    // More than the window and a pipe.
    let over: Vec<_> = vec![chunk; 40];
    let end = vec![HostToSession::InputEnd, HostToSession::Input(vec![1])];
    let again = vec![HostToSession::Open(Box::new(Open::Exec(shell("true"))))];
    for messages in [over, end, again, vec![HostToSession::Signal(200)]] {
        let mut host = Host::open(shell("echo pid $$ .; exec sleep 1000")).await;
        let text = host.until(" .").await;
        let leader: i32 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        for message in &messages {
            // It may be cut off before the last.
            let _ = frame::write(&mut host.write, message).await;
        }
        assert!(timeout(SOON, &mut host.served).await.unwrap().unwrap().is_err());
        assert!(ends(leader));
    }
}

#[tokio::test]
async fn a_terminal_has_a_size_and_takes_keys() {
    let size = Terminal { rows: 11, cols: 22 };
    let script = "stty size; read line; stty size; echo got $line; read other";
    let mut host = Host::open(Exec { terminal: Some(size), ..shell(script) }).await;
    host.until("11 22").await;
    host.say(&HostToSession::Resize(Terminal { rows: 33, cols: 44 })).await;
    host.say(&HostToSession::Input(b"hello\n".to_vec())).await;
    let text = host.until("got hello").await;
    assert!(text.contains("33 44"), "{text}");
    // Ctrl-C.
    host.say(&HostToSession::Input(vec![3])).await;
    assert_eq!(host.rest().await.2, Ended::Exited { code: 130 });
}

#[tokio::test]
async fn without_a_step_there_is_nothing_to_enter() {
    let (here, there) = UnixStream::pair().unwrap();
    let places = Places::default();
    let enterable = Enterable::default();
    let (mut read, mut write) = here.into_split();
    let open = HostToSession::Open(Box::new(Open::Exec(shell("true"))));
    frame::write(&mut write, &open).await.unwrap();
    session::serve(there, &places, &enterable).await.unwrap();
    let ended: SessionToHost = frame::read(&mut read).await.unwrap();
    assert!(matches!(ended, SessionToHost::Ended(Ended::Failed { cause: Cause::NoStep, .. })));
}

fn copy(place: Place, path: &std::path::Path) -> Copy {
    Copy { place, path: path.to_str().unwrap().into() }
}

const JOB: Place = Place::Job { secrets: false };

/// Sends an archive within the window.
async fn send(host: &mut Host, archive: &[u8]) -> Ended {
    let (mut sent, mut taken) = (0usize, 0u64);
    while sent < archive.len() {
        let next = (sent + 60_000).min(archive.len());
        if (next as u64) <= taken + INPUT_WINDOW {
            host.say(&HostToSession::Input(archive[sent..next].to_vec())).await;
            sent = next;
            continue;
        }
        match host.hear().await {
            SessionToHost::InputTaken { total } => taken = total,
            SessionToHost::Started => {}
            other => panic!("{other:?}"),
        }
    }
    host.say(&HostToSession::InputEnd).await;
    host.rest().await.2
}

#[tokio::test]
async fn files_are_copied_out_and_in_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("from/sub")).unwrap();
    let content: Vec<u8> = (0..=255).cycle().take(5_000_000).collect();
    fs::write(at("from/sub/file"), &content).unwrap();
    for (place, name) in [(JOB, "one"), (Place::Vm, "two")] {
        let mut host = Host::begin(Open::CopyOut(copy(place, &at("from")))).await;
        let (archive, _, ended) = host.rest().await;
        assert_eq!(ended, Ended::Exited { code: 0 });
        host.served().await.unwrap();
        let mut host = Host::begin(Open::CopyIn(copy(place, &at(name)))).await;
        assert_eq!(send(&mut host, &archive).await, Ended::Exited { code: 0 });
        assert!(fs::read(at(name).join("sub/file")).unwrap() == content);
    }
}

#[tokio::test]
async fn what_cannot_be_copied_is_named_beside_the_archive() {
    let dir = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut host = Host::begin(Open::CopyOut(copy(JOB, &dir.path().join(".")))).await;
    let (_, left_out, ended) = host.rest().await;
    assert_eq!(String::from_utf8(left_out).unwrap(), "1 device, socket or FIFO: fifo");
    assert_eq!(ended, Ended::Exited { code: 0 });
}

#[tokio::test]
async fn a_copy_that_cannot_be_is_refused_before_it_starts() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let missing = dir.path().join("missing/x");
    let file = dir.path().join("file/");
    for (open, cause) in [
        (Open::CopyOut(copy(JOB, &missing)), Cause::NotFound),
        (Open::CopyOut(copy(JOB, "/dev/null".as_ref())), Cause::Invalid),
        (Open::CopyOut(copy(JOB, "".as_ref())), Cause::Invalid),
        (Open::CopyOut(copy(JOB, "a\0".as_ref())), Cause::Invalid),
        (Open::CopyIn(copy(JOB, &missing)), Cause::NotFound),
        (Open::CopyIn(copy(JOB, &file)), Cause::NotFound),
    ] {
        let mut host = Host::begin(open.clone()).await;
        match host.hear().await {
            SessionToHost::Ended(Ended::Failed { cause: got, .. }) => assert_eq!(got, cause),
            other => panic!("{other:?} of {open:?}"),
        }
    }
}

#[tokio::test]
async fn a_copy_ends_with_its_host_and_with_one_that_breaks_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("large");
    fs::write(&from, vec![1; 10_000_000]).unwrap();
    let into = dir.path().join("into");
    let chunk = || HostToSession::Input(vec![0; 60_000]);
    for (open, messages) in [
        // The host goes.
        (Open::CopyOut(copy(JOB, &from)), vec![]),
        (Open::CopyIn(copy(JOB, &into)), vec![HostToSession::Input(vec![0; 10])]),
        // Rules.
        (Open::CopyOut(copy(JOB, &from)), vec![chunk()]),
        (Open::CopyIn(copy(JOB, &into)), vec![HostToSession::InputEnd, chunk()]),
    ] {
        let mut host = Host::begin(open).await;
        assert_eq!(host.hear().await, SessionToHost::Started);
        for message in &messages {
            // It may be cut off before the last.
            let _ = frame::write(&mut host.write, message).await;
        }
        // An archive that is no archive is an end of its own.
        if messages.len() < 2 || !matches!(messages[0], HostToSession::InputEnd) {
            assert!(host.served().await.is_err());
        }
    }
    assert!(!into.exists());
}
