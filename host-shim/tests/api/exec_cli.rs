//! `kiln exec` and `kiln sessions` against the real API, with agents that are real peers.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Output, Stdio};
use std::time::Duration;

use kiln::build::BuildId;
use kiln::exec::Opened;
use kiln::store::Role;
use kiln_protocol::exec::{Cause, HostToSession, Place, SessionToHost, Stream, Terminal};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::agent::{Agent, Vm};
use crate::support::{Client, Server, form, id_of, server};

struct Host {
    vm: Vm,
    id: BuildId,
    url: String,
    authorization: String,
    _opened: Opened,
}

impl Host {
    async fn new(server: &Server, client: &Client<'_>) -> Self {
        let build = client.submit(form()).await;
        server.scheduler.claim().await;
        let (vm, id) = (Vm::new(), id_of(&build));
        let opened = server.scheduler.door(&id).open(vm.entrance());
        let authorization = client.authorization().unwrap();
        Self { vm, id, url: client.url(""), authorization, _opened: opened }
    }

    fn kiln(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command
            .args(args)
            .env("KILN_URL", &self.url)
            .env("KILN_TOKEN", self.authorization.strip_prefix("Bearer ").unwrap())
            .env("TERM", "xterm-kiln")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// `kiln exec FLAGS… ID -- x`.
    fn exec(&self, flags: &[&str]) -> Command {
        self.kiln(&[&["exec"], flags, &[self.id.as_str(), "--", "x", "-y"]].concat())
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn ended(output: &Output, code: i32, stdout: &[u8], stderr: &str) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(output.stdout, stdout, "{said}");
    assert!(said.contains(stderr), "{said}");
    assert!(!stderr.is_empty() || said.is_empty(), "{said}");
}

fn interrupt(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), signal).unwrap();
}

/// As somebody does who wants to get away, however slow the machine is.
async fn interrupt_until_left(child: &Child, agent: &mut Agent) {
    let mut again = tokio::time::interval(Duration::from_millis(100));
    let hung_up = agent.hung_up();
    tokio::pin!(hung_up);
    loop {
        tokio::select! {
            biased;
            () = &mut hung_up => return,
            _ = again.tick() => interrupt(child, Signal::SIGINT),
        }
    }
}

#[tokio::test]
async fn a_command_s_output_and_code_are_its_own() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let flags = ["-e", "A=b=c", "-w", "/srv", "-u", "app", "--with-secrets"];
    let child = host.exec(&flags).spawn().unwrap();
    let (mut agent, exec) = host.vm.started().await;
    assert_eq!(exec.command, ["x", "-y"]);
    assert_eq!(exec.env, [("A".to_owned(), "b=c".to_owned())]);
    assert_eq!((exec.directory.as_deref(), exec.user.as_deref()), (Some("/srv"), Some("app")));
    assert_eq!((exec.place, exec.terminal), (Place::Job { secrets: true }, None));
    // Without -i there is no input.
    assert_eq!(agent.input().await, None);
    let all: Vec<u8> = (0..=255).collect();
    agent.print(Stream::Out, &all).await;
    agent.print(Stream::Err, b"to stderr\n").await;
    agent.exit(42).await;
    let output = child.wait_with_output().await.unwrap();
    ended(&output, 42, &all, "to stderr\n");

    for (cause, code) in [(Cause::NotFound, 127), (Cause::NotExecutable, 126), (Cause::NoStep, 125)]
    {
        let child = host.exec(&[]).spawn().unwrap();
        host.vm.session().await.0.fail(cause, "why\x1b[2J").await;
        let output = child.wait_with_output().await.unwrap();
        ended(&output, code, b"", "kiln: why\\x1b[2J\n");
    }
}

/// The container runtime writes its complaint to the command's standard error, and the agent repeats it.
#[tokio::test]
async fn a_command_that_is_not_found_is_said_once() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let child = host.exec(&[]).spawn().unwrap();
    let (mut agent, _) = host.vm.started().await;
    let words = "executable file `x` not found in $PATH: No such file or directory";
    agent.print(Stream::Err, format!("{words}\n").as_bytes()).await;
    agent.fail(Cause::NotFound, words).await;
    let output = child.wait_with_output().await.unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(127), format!("{words}\n")));
}

#[tokio::test]
async fn standard_input_goes_in_with_i_and_its_end_too() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let mut child = host.exec(&["-i"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let large: Vec<u8> = (0..=255).cycle().take(3_000_000).collect();
    let sent = large.clone();
    let sending = tokio::spawn(async move { stdin.write_all(&sent).await.unwrap() });
    let (mut agent, _) = host.vm.started().await;
    agent.cat().await;
    sending.await.unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(output.stdout == large);
}

/// The command ends without having read what is still being sent: its code is not lost behind that.
#[tokio::test]
async fn input_that_is_not_wanted_does_not_hide_the_end() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    for _ in 0..5 {
        let zeros = File::open("/dev/zero").unwrap();
        let child = host.exec(&["-i"]).stdin(zeros).spawn().unwrap();
        let (mut agent, _) = host.vm.started().await;
        agent.input().await;
        agent.print(Stream::Out, b"enough").await;
        agent.exit(9).await;
        let output = child.wait_with_output().await.unwrap();
        ended(&output, 9, b"enough", "");
    }
}

#[tokio::test]
async fn signals_are_passed_on_and_a_second_interrupt_leaves() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let child = host.exec(&["-i"]).stdin(Stdio::piped()).spawn().unwrap();
    let (mut agent, _) = host.vm.started().await;
    for (signal, number) in [(Signal::SIGTERM, 15), (Signal::SIGINT, 2)] {
        interrupt(&child, signal);
        assert_eq!(agent.hear().await.unwrap(), HostToSession::Signal(number));
    }
    agent.exit(130).await;
    ended(&child.wait_with_output().await.unwrap(), 130, b"", "");

    let child = host.exec(&["-i"]).stdin(Stdio::piped()).spawn().unwrap();
    let (mut agent, _) = host.vm.started().await;
    interrupt(&child, Signal::SIGINT);
    assert_eq!(agent.hear().await.unwrap(), HostToSession::Signal(2));
    interrupt_until_left(&child, &mut agent).await;
    ended(&child.wait_with_output().await.unwrap(), 130, b"", "left the session");
}

#[tokio::test]
async fn a_client_that_is_killed_or_whose_reader_goes_ends_its_session() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let mut child = host.exec(&[]).spawn().unwrap();
    let (mut agent, _) = host.vm.started().await;
    child.kill().await.unwrap();
    agent.hung_up().await;

    let mut child = host.exec(&[]).spawn().unwrap();
    let (mut agent, _) = host.vm.started().await;
    drop(child.stdout.take());
    agent.print(Stream::Out, b"to nobody").await;
    agent.hung_up().await;
    ended(&child.wait_with_output().await.unwrap(), 141, b"", "");
}

#[tokio::test]
async fn what_cannot_be_entered_is_kilns_own_failure() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let output = host.kiln(&["exec", "nobody", "--", "x"]).output().await.unwrap();
    ended(&output, 125, b"", "there is no build or instance nobody");
    let output = host.kiln(&["exec", "nobody"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    let output = host.exec(&[]).env("KILN_URL", "http://127.0.0.1:1").output().await.unwrap();
    ended(&output, 125, b"", "cannot reach http://127.0.0.1:1");
    let output = host.exec(&[]).env("KILN_TOKEN", "kiln_x").output().await.unwrap();
    ended(&output, 125, b"", "not valid");
    let output = host.exec(&["--vm"]).output().await.unwrap();
    ended(&output, 125, b"", "needs the role admin");
    let queued = client.submit(form()).await;
    let id = queued["id"].as_str().unwrap();
    let output = host.kiln(&["exec", id, "--", "x"]).output().await.unwrap();
    ended(&output, 125, b"", "is queued");
    // The server that is lost, and the VM.
    let child = host.exec(&["--timeout", "1"]).spawn().unwrap();
    let (_agent, _) = host.vm.started().await;
    ended(&child.wait_with_output().await.unwrap(), 124, b"", "timeout of 1 s");
    let child = host.exec(&[]).spawn().unwrap();
    drop(host.vm.started().await);
    ended(&child.wait_with_output().await.unwrap(), 125, b"", "broke");
}

/// A terminal of 30 lines and 90 characters a line: its two ends.
fn terminal() -> (File, File) {
    let size = Winsize { ws_row: 30, ws_col: 90, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    (pty.master.into(), pty.slave.into())
}

fn is_raw(terminal: &File) -> bool {
    let modes = tcgetattr(terminal).unwrap().local_flags;
    !modes.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
}

/// A session on a terminal, which is raw by then.
async fn on_a_terminal(host: &Host) -> (Child, File, File, Agent) {
    let (master, slave) = terminal();
    let mut command = host.exec(&["-it"]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap());
    let child = command.spawn().unwrap();
    let (agent, exec) = host.vm.session().await;
    assert_eq!(exec.terminal, Some(Terminal { rows: 30, cols: 90 }));
    assert_eq!(exec.env, [("TERM".to_owned(), "xterm-kiln".to_owned())]);
    assert!(is_raw(&slave));
    (child, master, slave, agent)
}

#[tokio::test]
async fn a_terminal_is_raw_for_the_session_and_whole_after_it() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let (child, mut master, slave, mut agent) = on_a_terminal(&host).await;
    agent.say(SessionToHost::Started).await;
    // Keys are not signals here, and nothing is echoed.
    master.write_all(b"\x03\x1a\x04q\r").unwrap();
    let mut keys = vec![];
    while keys.len() < 5 {
        keys.extend(agent.input().await.unwrap());
    }
    assert_eq!(keys, b"\x03\x1a\x04q\r");
    rustix::termios::tcsetwinsize(
        &master,
        rustix::termios::Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 },
    )
    .unwrap();
    // It is nobody's controlling terminal, so the kernel tells nobody.
    interrupt(&child, Signal::SIGWINCH);
    let resized = HostToSession::Resize(Terminal { rows: 40, cols: 100 });
    assert_eq!(agent.hear().await.unwrap(), resized);
    agent.print(Stream::Out, b"\x1b[2Jhi\r\n").await;
    let mut shown = [0; 8];
    let read = tokio::task::spawn_blocking(move || {
        master.read_exact(&mut shown).unwrap();
        (shown, master)
    });
    let (shown, _master) = read.await.unwrap();
    assert_eq!(&shown, b"\x1b[2Jhi\r\n");
    agent.exit(5).await;
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(!is_raw(&slave));
}

#[tokio::test]
async fn a_terminal_is_given_back_on_every_way_out() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        let (mut child, _master, slave, mut agent) = on_a_terminal(&host).await;
        interrupt(&child, signal);
        let code = child.wait().await.unwrap().code();
        assert_eq!(code, Some(128 + signal as i32));
        assert!(!is_raw(&slave));
        agent.hung_up().await;
    }
    // The connection breaks.
    let (mut child, _master, slave, agent) = on_a_terminal(&host).await;
    drop(agent);
    assert_eq!(child.wait().await.unwrap().code(), Some(125));
    assert!(!is_raw(&slave));
}

/// What is not read stays where it is, and the client can be left all the same.
#[tokio::test]
async fn a_reader_that_stops_holds_the_command_back() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let mut child = host.exec(&["-i"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut agent, _) = host.vm.started().await;
    let piece = vec![b'y'; 64 * 1024];
    let mut sent = 0_usize;
    let flood = async {
        loop {
            agent.print(Stream::Out, &piece).await;
            sent += piece.len();
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(1), flood).await.is_err());
    assert!(sent < 32 << 20, "{sent}");
    let mut some = [0; 4];
    stdout.read_exact(&mut some).await.unwrap();
    interrupt(&child, Signal::SIGINT);
    assert_eq!(agent.hear().await.unwrap(), HostToSession::Signal(2));
    interrupt_until_left(&child, &mut agent).await;
    assert_eq!(child.wait().await.unwrap().code(), Some(130));
}

#[tokio::test]
async fn sessions_are_listed_for_people_and_programs() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let child = host.exec(&["-e", "TOKEN=hunter2"]).spawn().unwrap();
    let (mut agent, _) = host.vm.started().await;
    agent.exit(3).await;
    ended(&child.wait_with_output().await.unwrap(), 3, b"", "");
    let table = host.kiln(&["sessions"]).output().await.unwrap();
    let table = text(&table.stdout);
    assert!(table.starts_with("STARTED"), "{table}");
    for shown in [host.id.as_str(), "exited 3", "x -y", "(tenant)"] {
        assert!(table.contains(shown), "{shown} in {table}");
    }
    assert!(!table.contains("hunter2"));
    let id = host.id.as_str();
    let listed = host.kiln(&["sessions", id, "--format", "json"]).output().await.unwrap();
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!((&listed[0]["build"], &listed[0]["env"]), (&json!(id), &json!(["TOKEN"])));
    let none = host.kiln(&["sessions", "nobody", "--format", "json"]).output().await.unwrap();
    assert_eq!(text(&none.stdout), "[]\n");
    let shown = host.kiln(&["show", id]).output().await.unwrap();
    let expected = format!("entered   yes, while it ran: kiln sessions {id}\n");
    assert!(text(&shown.stdout).contains(&expected), "{}", text(&shown.stdout));
}
