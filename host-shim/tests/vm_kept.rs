//! Failed builds that stay, in real VMs: the failed step is entered as it was left.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::io::Write as _;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use kiln_protocol::frame::{self, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, MAGIC, RejectReason, Resume, TOKEN_LEN};
use kiln_protocol::port;
use kiln_protocol::preamble::{Channel, Preamble};
use kiln_protocol::version::{Features, SUPPORTED};
use serde_json::{Value, json};
use support::{BASE, Server, text};

/// Ends with 42 after half of its work, as a user of its own.
const STEP: &str = "
ENV COLOR=green
WORKDIR /srv/work
RUN chown www-data:www-data .
USER www-data
RUN echo half > half.txt && test -e whole.txt || exit 42
RUN echo never
";

fn dockerfile() -> String {
    format!("FROM {BASE}\n{STEP}")
}

/// A build that has failed and is kept for so many seconds.
fn failed(server: &Server, seconds: &str, flags: &[&str], dockerfile: &str) -> String {
    let files = [("Dockerfile", dockerfile.as_bytes())];
    let flags = [&["--keep-failed", seconds, "--memory", "512"], flags].concat();
    let id = server.submit(&files, &flags);
    let build = server.wait(&id);
    assert_eq!(build["status"], "failed", "{build}\n{}", server.log());
    id
}

fn exec(server: &Server, id: &str, flags: &[&str], script: &str) -> Output {
    server.run(&[&["exec"], flags, &[id, "--", "sh", "-c", script]].concat())
}

#[track_caller]
fn said(server: &Server, out: &Output, code: i32, stdout: &str) {
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{stderr}\n{}", server.log());
    assert_eq!(String::from_utf8_lossy(&out.stdout), stdout, "{stderr}");
}

fn kept(server: &Server) -> Value {
    let out = server.run(&["kept", "ls", "--format", "json"]);
    assert!(out.status.success(), "{}", text(out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Ticks of CPU that a process has had.
fn ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn is_paused(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.starts_with('T')
}

/// Waits until nobody is in a VM and it was stopped.
#[track_caller]
fn until_paused(pid: i32) {
    let begun = Instant::now();
    while !is_paused(pid) {
        assert!(begun.elapsed() < Duration::from_secs(30), "it was not paused");
        // The kernel tells nobody but the parent.
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn runs(pid: i32) -> bool {
    support::name_of(pid).is_some_and(|name| name.starts_with("qemu"))
}

#[test]
fn vm_a_failed_step_is_entered_while_another_build_has_its_place() {
    let server = Server::start_with(&["--max-vms", "1"]);
    let dir = tempfile::tempdir().unwrap();
    let id = failed(&server, "600", &[], &dockerfile());
    let build = server.show(&id);
    assert_eq!(build["failure"]["kind"], "step_failed", "{build}");
    assert_eq!(build["failure"]["exit_code"], 42);
    assert!(build["kept_until"].is_string(), "{build}");
    assert_eq!(kept(&server)[0]["id"], json!(id));

    // Paused, it takes no CPU, while another build runs where there is room for one.
    let qemu = server.processes("qemu-system-x86_64")[0];
    let before = ticks(qemu);
    let other = server.build(&[("Dockerfile", b"FROM scratch\nCOPY Dockerfile /\n")], &[]);
    assert!(other.status.success(), "{}", text(other.stderr));
    // Of some hundred ticks that the other build takes; QEMU's own loop may wake up now and then.
    let taken = ticks(qemu) - before;
    assert!(taken <= 5, "a paused VM took {taken} ticks of CPU");

    let look = exec(&server, &id, &[], "pwd; cat half.txt; echo $COLOR; exit 7");
    said(&server, &look, 7, "/srv/work\nhalf\ngreen\n");
    // It is the step's user, and somebody else where that is said.
    let who = "id -un; id -gn; echo $HOME; stat -c %U half.txt; ls /root";
    let out = exec(&server, &id, &[], who);
    said(&server, &out, 2, "www-data\nwww-data\n/var/www\nwww-data\n");
    assert!(text(out.stderr).contains("Permission denied"));
    said(&server, &exec(&server, &id, &["-u", "root"], who), 0, "root\nroot\n/root\nwww-data\n");
    // The failed command, again: it fails as it did, and works once its cause is gone.
    let again = "echo half > half.txt && test -e whole.txt || exit 42";
    said(&server, &exec(&server, &id, &[], again), 42, "");
    said(&server, &exec(&server, &id, &[], "touch whole.txt"), 0, "");
    said(&server, &exec(&server, &id, &[], again), 0, "");
    // Each time from a pause, in each way in.
    let file = dir.path().join("copied");
    let (there, here) = (format!("{id}:half.txt"), file.to_str().unwrap());
    for round in 0..5 {
        until_paused(qemu);
        let number = format!("echo {round}; cat half.txt");
        said(&server, &exec(&server, &id, &[], &number), 0, &format!("{round}\nhalf\n"));
    }
    until_paused(qemu);
    said(
        &server,
        &exec(&server, &id, &["--vm"], "cat /proc/1/comm; test ! -e half.txt"),
        0,
        "init\n",
    );
    until_paused(qemu);
    said(&server, &server.run(&["cp", &there, here]), 0, "");
    assert_eq!(fs::read_to_string(&file).unwrap(), "half\n");
    until_paused(qemu);
    fs::write(&file, "other").unwrap();
    said(&server, &server.run(&["cp", here, &there]), 0, "");
    let copied = exec(&server, &id, &[], "cat half.txt; stat -c ' %U' half.txt");
    said(&server, &copied, 0, "other www-data\n");
    // What is entered after its end is not marked as a build that was meddled with.
    let build = server.show(&id);
    assert_eq!((&build["status"], &build["entered"]), (&json!("failed"), &json!(false)));

    let until = kept(&server)[0]["until"].clone();
    assert!(server.run(&["kept", "extend", &id, "3600"]).status.success());
    assert!(kept(&server)[0]["until"].as_str() > until.as_str());
    assert!(server.run(&["kept", "release", &id]).status.success());
    assert_eq!(kept(&server), json!([]));
    assert_eq!(server.processes("qemu-system-x86_64"), Vec::<i32>::new());
    let out = exec(&server, &id, &[], "true");
    assert_eq!(out.status.code(), Some(125));
    assert!(text(out.stderr).contains("is not there to be entered"));
    server.stop();
}

#[test]
fn vm_a_failed_step_has_its_secrets_only_for_who_says_so_and_goes_when_its_lease_ends() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("value");
    fs::write(&file, "hunter2-kept").unwrap();
    let flag = format!("id=key,src={}", file.display());
    let step = "RUN --mount=type=secret,id=key,env=KEY --mount=type=secret,id=key test -z \"$KEY\"";
    let id = failed(&server, "600", &["--secret", &flag], &format!("FROM {BASE}\n{step}\n"));
    let script = "echo \"<$KEY>\"; grep -c hunter2-kept /run/secrets/key || true";
    said(&server, &exec(&server, &id, &[], script), 0, "<>\n0\n");
    said(&server, &exec(&server, &id, &["--with-secrets"], script), 0, "<hunter2-kept>\n1\n");
    said(&server, &exec(&server, &id, &[], script), 0, "<>\n0\n");
    // The one container does not see the other's processes.
    let mut inside =
        server.kiln(&["exec", "--with-secrets", &id, "--", "sleep", "1000"]).spawn().unwrap();
    let look = "cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -c hunter2-kept || true";
    said(&server, &exec(&server, &id, &[], look), 0, "0\n");
    // Whoever is inside when the lease ends is put out.
    let begun = Instant::now();
    assert!(server.run(&["kept", "extend", &id, "3"]).status.success());
    let status = inside.wait().unwrap();
    assert_eq!(status.code(), Some(125));
    assert!(begun.elapsed() < Duration::from_secs(60));
    assert_eq!(kept(&server), json!([]));
    server.stop();
}

/// Ends when the build is ended for it.
const FLOOD: &str = "
WORKDIR /srv/work
RUN echo half > half.txt; while :; do echo and on and on and on and on; done
";

#[test]
fn vm_the_oldest_goes_for_another_and_a_killed_server_lets_all_go() {
    let server = Server::start_with(&["--max-kept", "1", "--log-limit-mb", "1"]);
    // A step that is ended from outside stays as well.
    let first = failed(&server, "600", &[], &format!("FROM {BASE}\n{FLOOD}"));
    let build = server.show(&first);
    let failure = &build["failure"];
    assert_eq!((&failure["kind"], &failure["step"]), (&json!("log_limit"), &json!(1)), "{build}");
    let look = "pwd; cat half.txt; grep -l 'an[d] on' /proc/[0-9]*/cmdline";
    said(&server, &exec(&server, &first, &[], look), 1, "/srv/work\nhalf\n");
    let of_first = server.processes("qemu-system-x86_64")[0];
    let second = failed(&server, "600", &[], &dockerfile());
    assert_eq!(kept(&server)[0]["id"], json!(second));
    assert_eq!(kept(&server).as_array().unwrap().len(), 1);
    assert!(!runs(of_first), "{}", server.log());
    let out = exec(&server, &first, &[], "true");
    assert_eq!(out.status.code(), Some(125), "{}", text(out.stderr));
    let of_second = server.processes("qemu-system-x86_64");
    assert_eq!(of_second.len(), 1, "{of_second:?}");
    until_paused(of_second[0]);
    let server = server.kill_and_restart();
    assert_eq!(kept(&server), json!([]));
    assert!(!runs(of_second[0]), "{}", server.log());
    assert_eq!(server.processes("qemu-system-x86_64"), Vec::<i32>::new());
    let build = server.show(&second);
    assert_eq!((&build["status"], &build["kept_until"]), (&json!("failed"), &Value::Null));
    let out = exec(&server, &second, &[], "true");
    assert_eq!(out.status.code(), Some(125), "{}", text(out.stderr));
    server.stop();
}

/// Dials the host from within a VM, as the agent does, says what comes in on its standard input and prints what it
/// hears within some seconds. Every Debian has Perl; `sockaddr_vm` is of linux/vm_sockets.h.
const DIALS: &str = r#"
    socket(my $host, 40, 1, 0) or die "socket: $!";
    connect($host, pack("S S L L x4", 40, 0, $ARGV[0], 2)) or die "connect: $!";
    binmode(STDIN); binmode(STDOUT); local $/; my $said = <STDIN>;
    syswrite($host, $said) == length($said) or die "write: $!";
    $SIG{ALRM} = sub { exit 0 }; alarm 3;
    while (sysread($host, my $heard, 65536)) { syswrite(STDOUT, $heard) }
"#;

/// What the host answers to a Hello of root's in a VM; `None` when it answers nothing.
fn forged(server: &Server, id: &str, resume: Option<Resume>) -> Option<HelloReply> {
    let hello = Hello {
        magic: MAGIC,
        versions: SUPPORTED,
        features: Features::RESUME,
        agent: "forged".into(),
        image: String::new(),
        resume,
    };
    let heard = dialled(server, id, port::CONTROL, &frame::encode(&hello).unwrap());
    let read = async { FrameReader::new(&heard[..]).read().await.unwrap() };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    (!heard.is_empty()).then(|| runtime.block_on(read))
}

/// What root in a VM hears that dials a port of the host's and says this.
fn dialled(server: &Server, id: &str, port: u32, said: &[u8]) -> Vec<u8> {
    let port = port.to_string();
    let mut dials = server.kiln(&["exec", "--vm", "-i", id, "--", "perl", "-e", DIALS, &port]);
    let mut child = dials.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(said).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", server.log());
    out.stdout
}

/// A request to the registry as the agent forwards it: with the nonce of the VM, which root in it can get hold of.
fn pull(server: &Server, id: &str) -> Vec<u8> {
    let notes = server.vm(id).join("session.json");
    let notes: Value = serde_json::from_slice(&fs::read(notes).unwrap()).unwrap();
    let nonce: Vec<u8> = serde_json::from_value(notes["nonce"].clone()).unwrap();
    let preamble = Preamble::new(Channel::Registry, nonce.try_into().unwrap()).encode();
    let request = "GET /v2/base/debian/tags/list HTTP/1.1\r\nHost: registry.kiln\r\n\r\n";
    [&preamble[..], request.as_bytes()].concat()
}

/// Root in a VM has all that its agent has, but the token of the connection that is open.
#[test]
fn vm_what_an_entered_vm_forges_is_refused() {
    let step = "RUN mkfifo /tmp/go && echo wait''ing && cat /tmp/go && exit 42";
    let server = Server::start();
    let dockerfile = format!("FROM {BASE}\n{step}\n");
    let flags = ["--keep-failed", "600", "--memory", "512"];
    let id = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &flags);
    let mut follow = server.follow(&id);
    assert!(follow.until("waiting"), "{}", server.log());
    let guessed = Some(Resume { token: [7; TOKEN_LEN], acknowledged: 0 });
    for (resume, why) in [(None, RejectReason::Taken), (guessed.clone(), RejectReason::Resume)] {
        let heard = forged(&server, &id, resume);
        assert!(matches!(&heard, Some(HelloReply::Reject(r)) if r.reason == why), "{heard:?}");
    }
    let pull = pull(&server, &id);
    let answer = dialled(&server, &id, port::REGISTRY, &pull);
    assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", text(answer));
    // The agent's own connection is still the build's.
    let _ = exec(&server, &id, &[], "echo go > /tmp/go");
    follow.drain();
    let build = server.show(&id);
    let failure = &build["failure"];
    assert_eq!((&failure["exit_code"], &build["entered"]), (&json!(42), &json!(true)), "{build}");

    // Kept, nobody listens any more: what is said is not even read.
    for resume in [None, guessed] {
        assert_eq!(forged(&server, &id, resume), None, "{}", server.log());
    }
    // Neither does the registry answer what it answered before.
    assert_eq!(text(dialled(&server, &id, port::REGISTRY, &pull)), "", "{}", server.log());
    said(&server, &exec(&server, &id, &[], "echo still there"), 0, "still there\n");
    assert_eq!(server.show(&id), build);
    server.stop();
}
