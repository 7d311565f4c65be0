//! Sessions in real VMs, as a user sees them: `kiln exec` into a running build and a running image.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::{BASE, Server, text};

/// A step that waits to be told to end, and says when it waits. The words are not in its own line, which the log has
/// before it runs.
const STEP: &str = "
ENV FROM_IMAGE=yes
WORKDIR /srv/work
RUN mkfifo /tmp/go && echo wait''ing && cat /tmp/go && echo to''ld
";

/// A build whose step waits for somebody to write to `/tmp/go`.
fn waiting(server: &Server) -> (String, support::Follow) {
    let dockerfile = format!("FROM {BASE}\n{STEP}");
    // Longer than a thousand sessions take on a busy host.
    let flags = ["--timeout", "3600"];
    let id = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &flags);
    let mut follow = server.follow(&id);
    assert!(follow.until("waiting"), "{}", server.log());
    (id, follow)
}

/// Ends the step. It may be over, and this session with it, before the session's own command is.
fn tell(server: &Server, id: &str) {
    let out = output(exec(server, id, &[], &["sh", "-c", "echo go > /tmp/go"]));
    assert!(matches!(out.status.code(), Some(0 | 125 | 137)), "{}", text(out.stderr));
}

fn exec(server: &Server, id: &str, flags: &[&str], command: &[&str]) -> Command {
    server.kiln(&[&["exec"], flags, &[id, "--"], command].concat())
}

fn output(mut command: Command) -> Output {
    command.output().unwrap()
}

#[track_caller]
fn ended(server: &Server, out: &Output, code: i32, stdout: &str) {
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{stderr}\n{}", server.log());
    assert_eq!(String::from_utf8_lossy(&out.stdout), stdout, "{stderr}");
}

/// Gives bytes to a command's standard input, and takes its output.
fn through(mut command: Command, bytes: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes).unwrap());
        child.wait_with_output().unwrap()
    })
}

/// Starts a command that says when it runs.
fn begun(mut command: Command) -> Child {
    begun_with_input(&mut command)
}

fn begun_with_input(command: &mut Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    child
}

/// Asks again and again until nothing of that name runs where the session is.
fn gone(server: &Server, id: &str, name: &str) {
    let begun = Instant::now();
    let script = format!("grep -lsx {name} /proc/[0-9]*/comm || true");
    loop {
        let out = output(exec(server, id, &[], &["sh", "-c", &script]));
        assert!(out.status.success(), "{}", text(out.stderr));
        if out.stdout.is_empty() {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", text(out.stdout));
    }
}

fn every_byte() -> Vec<u8> {
    (0..=255).cycle().take(1 << 20).collect()
}

#[test]
fn vm_a_running_build_is_entered() {
    let server = Server::start();
    let (id, mut follow) = waiting(&server);
    assert_eq!(server.show(&id)["entered"], false);
    let print = ["sh", "-c", "echo $FROM_IMAGE $MINE; pwd; echo to stderr >&2"];
    let out = output(exec(&server, &id, &["-e", "MINE=also"], &print));
    ended(&server, &out, 0, "yes also\n/srv/work\n");
    assert_eq!(text(out.stderr), "to stderr\n");
    ended(&server, &output(exec(&server, &id, &["-w", "/tmp"], &["pwd"])), 0, "/tmp\n");
    ended(&server, &output(exec(&server, &id, &["-u", "nobody"], &["id", "-un"])), 0, "nobody\n");
    for (command, code) in
        [(&["sh", "-c", "exit 42"][..], 42), (&["nonesuch"], 127), (&["/etc/passwd"], 126)]
    {
        let out = output(exec(&server, &id, &[], command));
        assert_eq!(out.status.code(), Some(code), "{command:?}: {}", text(out.stderr));
    }
    assert_eq!(output(exec(&server, &id, &["-u", "nonesuch"], &["id"])).status.code(), Some(125));
    let bytes = every_byte();
    let out = through(exec(&server, &id, &["-i"], &["cat"]), &bytes);
    assert!(out.status.success() && out.stdout == bytes, "{}", text(out.stderr));
    let out = output(exec(&server, &id, &["-t"], &["tty"]));
    assert!(out.status.success() && text(out.stdout).starts_with("/dev/pts/"));
    let out = output(exec(&server, &id, &["--timeout", "1"], &["sleep", "1000"]));
    assert_eq!(out.status.code(), Some(124), "{}", text(out.stderr));
    // A signal is the command's, which ends as it likes.
    let waits = "trap 'exit 9' TERM; echo begun; while :; do sleep 1 & wait; done";
    let mut child = begun(exec(&server, &id, &[], &["sh", "-c", waits]));
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9), "{}", server.log());
    // The VM itself has another root than the step.
    let out = output(exec(&server, &id, &["--vm"], &["cat", "/proc/1/comm"]));
    assert!(out.status.success(), "{}", text(out.stderr));

    // What is done in a step's files is there for the step.
    tell(&server, &id);
    follow.drain();
    assert!(follow.seen.contains("told"), "{}", follow.seen);
    let build = server.show(&id);
    assert_eq!((&build["status"], &build["entered"]), (&json!("ready"), &json!(true)));
    let out = output(exec(&server, &id, &[], &["id"]));
    assert_eq!(out.status.code(), Some(125));
    assert!(text(out.stderr).contains("is ready"));
    let listed = server.run(&["sessions", &id, "--format", "json"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert!(
        listed.as_array().unwrap().iter().all(|session| session["how"].is_string()),
        "{listed}"
    );
    server.stop();
}

#[test]
fn vm_a_lost_client_ends_what_it_ran() {
    let server = Server::start();
    let (id, mut follow) = waiting(&server);
    // One of them in a session, and with that in a process group, of its own.
    let script = ["sh", "-c", "sleep 1001 & setsid sleep 1003 & echo begun; exec sleep 1002"];
    let mut child = begun(exec(&server, &id, &[], &script));
    child.kill().unwrap();
    child.wait().unwrap();
    gone(&server, &id, "sleep");
    // Its output is not taken; another session goes on beside it.
    let mut slow =
        exec(&server, &id, &[], &["cat", "/dev/zero"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut some = [1; 4096];
    slow.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    assert_eq!(some, [0; 4096]);
    ended(&server, &output(exec(&server, &id, &[], &["echo", "beside"])), 0, "beside\n");
    slow.kill().unwrap();
    slow.wait().unwrap();
    tell(&server, &id);
    follow.drain();
    assert_eq!(server.show(&id)["status"], "ready");
}

/// What there is because of sessions: in the VM, and in the server.
#[derive(Debug)]
struct Survey {
    in_vm: String,
    descriptors: usize,
    threads: usize,
    open_rows: usize,
}

impl Survey {
    /// Names of what runs, kernel threads aside, which come and go; control groups; files of Kiln's.
    const SCRIPT: &str = "for dir in /proc/[0-9]*; do \
        read -r line < $dir/stat && case ${line##*) } in Z*) echo zombie ;; *) readlink $dir/exe ;; esac; \
        done 2>/dev/null | sort; find /sys/fs/cgroup -type d | sort; find /run/kiln | sort";

    fn take(server: &Server, id: &str) -> Self {
        let out = output(exec(server, id, &["--vm"], &["sh", "-c", Self::SCRIPT]));
        assert!(out.status.success(), "{}", text(out.stderr));
        let entries =
            |of: &str| std::fs::read_dir(format!("/proc/{}/{of}", server.pid())).unwrap().count();
        let listed = server.run(&["sessions", id, "--limit", "100000", "--format", "json"]);
        let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
        let open_rows = listed.as_array().unwrap().iter().filter(|row| !row["how"].is_string());
        Self {
            in_vm: text(out.stdout).replace(char::is_numeric, ""),
            descriptors: entries("fd"),
            threads: entries("task"),
            open_rows: open_rows.count(),
        }
    }

    /// Takes surveys until one fits: a session's end is told before all of it is put away, and threads that have nothing to
    /// do stay for some seconds.
    #[track_caller]
    fn until(server: &Server, id: &str, fits: impl Fn(&Self) -> bool) -> Self {
        let begun = Instant::now();
        loop {
            let now = Self::take(server, id);
            if fits(&now) {
                return now;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{now:?}");
        }
    }

    fn is_within(&self, before: &Self) -> bool {
        self.in_vm == before.in_vm
            && self.open_rows == before.open_rows
            && self.descriptors <= before.descriptors
            && self.threads <= before.threads
    }
}

/// One after another, `KILN_TEST_SESSIONS` of them, and as many at one time as a VM is to have.
#[test]
fn vm_many_sessions_leave_nothing_behind() {
    const AT_ONCE: usize = 50;
    let sessions = std::env::var("KILN_TEST_SESSIONS").map_or(15, |n| n.parse().unwrap());
    let server = Server::start();
    let (id, mut follow) = waiting(&server);
    let at_once = || {
        let command = ["sh", "-c", "echo begun; read line; echo $line; sleep 1000 & exit 3"];
        let mut children: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                let mut command = exec(&server, &id, &["-i"], &command);
                begun_with_input(command.stdin(Stdio::piped()))
            })
            .collect();
        // All of them are in.
        for (number, child) in children.iter_mut().enumerate() {
            writeln!(child.stdin.take().unwrap(), "{number}").unwrap();
        }
        for (number, child) in children.into_iter().enumerate() {
            let out = child.wait_with_output().unwrap();
            assert_eq!(out.status.code(), Some(3), "{}", server.log());
            assert_eq!(text(out.stdout), format!("{number}\n"));
        }
    };
    // What a server makes once and keeps, the database's connections among it, is not left behind.
    // Nor is the directory of the first session in a step.
    ended(&server, &output(exec(&server, &id, &[], &["echo", "first"])), 0, "first\n");
    let first = Survey::take(&server, &id);
    at_once();
    let before = Survey::until(&server, &id, |now| {
        now.threads <= first.threads && now.in_vm == first.in_vm && now.open_rows == first.open_rows
    });
    assert!(before.in_vm.contains("kiln") && before.in_vm.contains("cgroup"), "{before:#?}");
    let begun = Instant::now();
    for number in 0..sessions {
        let out = output(exec(
            &server,
            &id,
            &[],
            &["sh", "-c", "sleep 1000 & echo $0", &number.to_string()],
        ));
        ended(&server, &out, 0, &format!("{number}\n"));
    }
    println!("{sessions} sessions took {:?}", begun.elapsed());
    at_once();
    let after = Survey::until(&server, &id, |now| now.is_within(&before));
    println!("before: {before:?}\nafter: {after:?}");
    tell(&server, &id);
    follow.drain();
    assert_eq!(server.show(&id)["status"], "ready");
    server.stop();
}

#[test]
fn vm_the_end_of_a_build_ends_its_sessions() {
    let server = Server::start();
    let (id, _follow) = waiting(&server);
    let child = begun(exec(&server, &id, &[], &["sh", "-c", "echo begun; sleep 1000"]));
    assert!(server.run(&["cancel", &id]).status.success());
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(125), "{}", server.log());
    server.stop();
}

#[test]
fn vm_a_running_image_is_entered() {
    let server = Server::start();
    let body = json!({
        "name": "web", "image": "base/debian:trixie", "env": { "A": "1" },
        "cmd": ["sh", "-c", "echo up; exec sleep 1000"],
    });
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail-with-body", "--json", &body.to_string()])
        .arg(format!("http://{}/instances", server.address))
        .args(["--header", &format!("Authorization: Bearer {}", server.token)]);
    let made: Value = serde_json::from_slice(&curl.output().unwrap().stdout).unwrap();
    let id = made["id"].as_str().unwrap().to_owned();
    let mut log = Command::new("curl")
        .args(["--silent", "--no-buffer"])
        .arg(format!("http://{}/instances/{id}/logs?follow=true", server.address))
        .args(["--header", &format!("Authorization: Bearer {}", server.token)])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(log.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "data: \"up\""), "{}", server.log());
    log.kill().unwrap();
    log.wait().unwrap();

    let out =
        output(exec(&server, &id, &["-e", "B=2"], &["sh", "-c", "echo $A $B; hostname; exit 42"]));
    ended(&server, &out, 42, "1 2\nweb\n");
    assert_eq!(output(exec(&server, &id, &[], &["nonesuch"])).status.code(), Some(127));
    let bytes = every_byte();
    let out = through(exec(&server, &id, &["-i"], &["cat"]), &bytes);
    assert!(out.status.success() && out.stdout == bytes, "{}", text(out.stderr));
    let mut child =
        begun(exec(&server, &id, &[], &["sh", "-c", "echo begun; exec tail -f /dev/null"]));
    child.kill().unwrap();
    child.wait().unwrap();
    gone(&server, &id, "tail");
    // The program itself goes on.
    let out = output(exec(&server, &id, &[], &["sh", "-c", "kill -0 1"]));
    assert!(out.status.success(), "{}", text(out.stderr));
    server.stop();
}

/// Names, modes and times. No umask gives these modes; of the set-user-id bit nothing arrives. A directory is behind what is in it.
const ENTRIES: [(&str, u32, u64); 5] = [
    ("run", 0o750, 1_000_000_000),
    ("odd", 0o604, 981_173_106),
    ("sub/own", 0o4755, 1),
    ("sub/same", 0o4755, 1),
    ("sub", 0o1777, 1_234_567_890),
];

#[test]
fn vm_files_are_copied_both_ways() {
    let server = Server::start();
    let (id, mut follow) = waiting(&server);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let here = |name: &str| at(name).to_str().unwrap().to_owned();
    let cp = |args: &[&str]| output(server.kiln(&[&["cp"], args].concat()));
    let there = |path: &str| format!("{id}:{path}");
    std::fs::create_dir_all(at("in/sub")).unwrap();
    let bytes = every_byte();
    std::fs::write(at("in/sub/file"), &bytes).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", at("in/link")).unwrap();
    for name in ["run", "odd", "sub/own"] {
        std::fs::write(at("in").join(name), name).unwrap();
    }
    std::fs::hard_link(at("in/sub/own"), at("in/sub/same")).unwrap();
    for (name, mode, seconds) in ENTRIES {
        let file = std::fs::File::open(at("in").join(name)).unwrap();
        file.set_permissions(Permissions::from_mode(mode)).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    }
    // Relative to the step's directory, then absolute, through a link of the container's.
    ended(&server, &cp(&[&here("in"), &there("new")]), 0, "");
    let look = ["sh", "-c", "readlink new/link; stat -c '%u %s' new/sub/file; ln -s /srv /tmp/l"];
    ended(&server, &output(exec(&server, &id, &[], &look)), 0, "/etc/passwd\n0 1048576\n");
    let look = "cd new; stat -c '%n %a %Y' run odd sub/own sub/same sub; [ sub/own -ef sub/same ] && \
        chmod 4755 sub/own && cat run odd sub/same";
    let modes: String = ENTRIES
        .map(|(name, mode, seconds)| format!("{name} {:o} {seconds}\n", mode & 0o1777))
        .concat();
    let out = output(exec(&server, &id, &[], &["sh", "-c", look]));
    ended(&server, &out, 0, &(modes + "runoddsub/own"));
    ended(&server, &cp(&[&there("/tmp/l/work/new/."), &here("out")]), 0, "");
    let arrived = |name: &str| std::fs::metadata(at("out").join(name)).unwrap();
    for (name, mode, seconds) in ENTRIES {
        let is = (arrived(name).mode() & 0o7777, arrived(name).mtime());
        assert_eq!(is, (mode & 0o1777, i64::try_from(seconds).unwrap()), "{name}");
    }
    assert_eq!(arrived("sub/own").ino(), arrived("sub/same").ino());
    assert_eq!(std::fs::read(at("out/sub/same")).unwrap(), b"sub/own");
    assert!(std::fs::read(at("out/sub/file")).unwrap() == bytes);
    assert_eq!(std::fs::read_link(at("out/link")).unwrap().to_str(), Some("/etc/passwd"));
    let out = cp(&[&there("/etc/passwd"), "-"]);
    assert!(out.status.success() && out.stdout.len() % 512 == 0, "{}", text(out.stderr));
    assert_eq!(cp(&[&there("/nonesuch"), &here("x")]).status.code(), Some(1));
    let vm = cp(&["--vm", &there("/proc/1/comm"), &here("comm")]);
    ended(&server, &vm, 0, "");
    let listed = server.run(&["sessions", &id, "--format", "json"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed[0]["command"], json!(["cp", "out", "/proc/1/comm"]));
    tell(&server, &id);
    follow.drain();
    server.stop();
}
