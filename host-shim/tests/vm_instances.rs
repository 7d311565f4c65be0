//! Images that run in real VMs, as a user sees them: `kiln run`, `/instances`, QEMU, a registry.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{BASE, Server, text};

/// A user of its own, with a further group, and a directory that does not exist. A file of the base is gone, and a
/// directory of it is another one.
const DOCKERFILE: &str = "
RUN useradd --create-home --uid 1234 app && groupadd --gid 777 extra && usermod --append --groups extra app
RUN test -f /etc/skel/.bashrc && rm /etc/issue && rm -r /etc/skel && mkdir /etc/skel && touch /etc/skel/own
ENV A=1 B=two
USER app
ENTRYPOINT [\"/bin/sh\", \"-c\"]
CMD [\"id; echo $A $B $HOME; pwd; echo to stderr >&2; printf 'no newline'; exit 7\"]
";

fn build(server: &Server, name: &str, dockerfile: &str) -> String {
    let dockerfile = format!("FROM {BASE}\n{dockerfile}");
    let out = server.build(&[("Dockerfile", dockerfile.as_bytes())], &["-t", name]);
    assert!(out.status.success(), "{}\n{}", text(out.stderr), server.log());
    text(out.stdout).trim().to_owned()
}

fn run(server: &Server, image: &str, cmd: &[&str]) -> Output {
    let args = [&["run", "--rm", image, "--"], cmd].concat();
    server.run(&args)
}

/// `/instances` as the API's clients use it.
fn api(server: &Server, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--request", method, "--write-out", "\n%{http_code}"])
        .arg(format!("http://{}{path}", server.address))
        .args(["--header", &format!("Authorization: Bearer {}", server.token)]);
    if let Some(body) = body {
        curl.args(["--json", &body.to_string()]);
    }
    let out = text(curl.output().unwrap().stdout);
    let (body, status) = out.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), serde_json::from_str(body).unwrap_or_default())
}

fn instances(server: &Server) -> Vec<Value> {
    api(server, "GET", "/instances", None).1.as_array().unwrap().clone()
}

/// Follows an instance's log until a line that is `until`. Callers wait for what is given.
#[allow(clippy::zombie_processes)]
fn follow(server: &Server, id: &str, until: &str) -> Child {
    let mut child = Command::new("curl")
        .args(["--silent", "--no-buffer"])
        .arg(format!("http://{}/instances/{id}/logs?follow=true", server.address))
        .args(["--header", &format!("Authorization: Bearer {}", server.token)])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap());
    let mut seen = String::new();
    loop {
        let mut line = String::new();
        let read = lines.read_line(&mut line).unwrap();
        assert!(read > 0, "no {until:?} in {seen}\n{}", server.log());
        seen.push_str(&line);
        if line.trim() == format!("data: {}", json!(until)) {
            return child;
        }
    }
}

fn assert_nothing_runs(server: &Server) {
    for program in ["qemu-system-x86_64", "vhost-device-vsock"] {
        assert!(server.processes(program).is_empty(), "{program} is left");
    }
    let dir = server.data().join("instances");
    let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Cgroups and directories that have the id in their name.
fn places_of(server: &Server, id: &str) -> String {
    let data = server.data();
    let found = Command::new("find")
        .args([Path::new("/sys/fs/cgroup"), data.parent().unwrap()])
        .args(["-name", &format!("*{id}*")])
        .output()
        .unwrap();
    text(found.stdout)
}

#[test]
fn vm_an_image_runs_as_it_was_built_to() {
    let server = Server::start();
    let image = build(&server, "app", &format!("WORKDIR /srv/made\n{DOCKERFILE}"));
    let out = server.run(&["run", &image]);
    let stderr = text(out.stderr);
    assert_eq!(out.status.code(), Some(7), "{stderr}\n{}", server.log());
    let expected = "uid=1234(app) gid=1234(app) groups=1234(app),777(extra)\n1 two /home/app\n\
                    /srv/made\nno newline";
    assert_eq!(text(out.stdout), expected);
    assert!(stderr.starts_with("to stderr\n"), "{stderr}");
    // Without --rm it is kept, with its end and its log.
    let kept = instances(&server).remove(0);
    let id = kept["id"].as_str().unwrap();
    assert!(stderr.contains(id), "{stderr}");
    assert_eq!((&kept["state"], &kept["exit_code"]), (&json!("Stopped"), &json!(7)));
    let listed = text(server.run(&["instances", "ls"]).stdout);
    let row = listed.lines().nth(1).unwrap();
    assert!(row.starts_with(id) && row.contains("Stopped") && row.contains("  7  "), "{listed}");
    let log = server.run(&["instances", "logs", id]);
    assert_eq!((text(log.stdout), text(log.stderr)), (expected.to_owned(), "to stderr\n".into()));
    let removed = server.run(&["instances", "rm", id]);
    assert!(removed.status.success(), "{}", text(removed.stderr));

    // What the user wants instead; every byte of a program; an orphan.
    let script = "echo $A $B $C; (sleep 1000 &); cat /proc/1/comm >&2; ls -A /etc/skel >&2; \
                  test -e /etc/issue || echo gone >&2; sha256sum < /usr/bin/perl >&2; cat /usr/bin/perl";
    let out = server.run(&["run", "--rm", "-e", "B=2", "-e", "C=3", "app", "--", script]);
    assert_eq!(out.status.code(), Some(0), "{}", text(out.stderr));
    let (head, bytes) = out.stdout.split_at(6);
    assert_eq!(head, b"1 2 3\n");
    let digest = hex::encode(Sha256::digest(bytes));
    assert_eq!(text(out.stderr), format!("kiln-init\nown\ngone\n{digest}  -\n"));

    // How it did not run.
    for (cmd, code) in [("nonesuch", 127), ("/etc/passwd", 126)] {
        let out = run(&server, "base/debian:trixie", &[cmd]);
        let stderr = text(out.stderr);
        assert_eq!(out.status.code(), Some(code), "{cmd}: {stderr}");
        assert!(out.stdout.is_empty() && stderr.starts_with("kiln: "), "{stderr}");
        assert!(stderr.contains(&format!("the program \"{cmd}\"")), "{stderr}");
    }
    let killed = run(&server, "base/debian:trixie", &["sh", "-c", "kill -KILL $$"]);
    assert_eq!(killed.status.code(), Some(137));
    for image in ["dev/nonesuch", "docker.io/library/debian"] {
        let out = run(&server, image, &[]);
        assert_eq!(out.status.code(), Some(125), "{image}: {}", text(out.stderr));
    }
    assert_eq!(instances(&server), Vec::<Value>::new());
    assert_nothing_runs(&server);
    server.stop();
}

/// As root of the container, which has the most that anybody has in there.
const PROBE: &str = r#"
use Socket;
sub try { my ($what, $got) = @_; print "$what: ", ($got ? "OPEN" : "refused"), "\n"; }
try("vsock", socket(my $v, 40, 1, 0));
try("vsock-wide", syscall(41, 0x100000028, 1, 0) >= 0);
my $params = pack("x120");
try("io_uring", syscall(425, 1, $params) >= 0);
try("mknod", system("mknod /tmp/vdb b 254 16 2>/dev/null") == 0);
my $none = "\0";
try("module", syscall(313, -1, $none, 0) >= 0 || !$!{EPERM});
try("mount", system("mount -t tmpfs none /mnt 2>/dev/null") == 0);
try("init", open(my $i, "+<", "/dev/kiln-init"));
for my $port (5000, 5001, 3128) {
  socket(my $s, PF_INET, SOCK_STREAM, 0) or die "no inet: $!";
  try("port-$port", connect($s, sockaddr_in($port, inet_aton("127.0.0.1"))));
}
socket(my $l, PF_INET, SOCK_STREAM, 0);
print "own-port: ", (bind($l, sockaddr_in(3128, inet_aton("127.0.0.1"))) ? "free" : "taken"), "\n";
print "interfaces: ", join(",", map { s/:.*//sr =~ s/\s//gr } grep { /:/ } do { open my $f, "<", "/proc/net/dev"; <$f> }), "\n";
"#;

#[test]
fn vm_an_instance_reaches_neither_vsock_nor_the_vm_nor_the_host() {
    let server = Server::start();
    let out = run(&server, "base/debian:trixie", &["perl", "-MErrno", "-e", PROBE]);
    let stdout = text(out.stdout);
    assert_eq!(out.status.code(), Some(0), "{stdout}{}", text(out.stderr));
    for refused in [
        "vsock",
        "vsock-wide",
        "io_uring",
        "mknod",
        "module",
        "mount",
        "init",
        "port-5000",
        "port-5001",
        "port-3128",
    ] {
        assert!(stdout.contains(&format!("{refused}: refused\n")), "{refused}:\n{stdout}");
    }
    assert!(stdout.contains("own-port: free\n"), "{stdout}");
    assert!(stdout.contains("interfaces: lo\n"), "{stdout}");
    server.stop();
}

#[test]
fn vm_a_running_instance_gets_its_signal_and_leaves_nothing() {
    let server = Server::start();
    let script = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done";
    let body = json!({
        "name": "web", "image": "base/debian:trixie", "cmd": ["sh", "-c", script], "size": "512MB",
    });
    let (status, new) = api(&server, "POST", "/instances", Some(&body));
    assert_eq!(status, 201, "{new}");
    let id = new["id"].as_str().unwrap();
    let mut following = follow(&server, id, "up");
    assert_eq!(api(&server, "GET", &format!("/instances/{id}"), None).1["state"], "Running");
    assert!(places_of(&server, id).lines().count() >= 3, "{}", places_of(&server, id));
    let begun = Instant::now();
    assert_eq!(api(&server, "DELETE", &format!("/instances/{id}"), None).0, 204);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(8), "the trap was waited for: {took:?}");
    let mut rest = String::new();
    following.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    following.wait().unwrap();
    assert!(rest.contains("data: \"bye\""), "{rest}");
    assert_eq!(api(&server, "GET", &format!("/instances/{id}"), None).0, 404);
    assert_nothing_runs(&server);
    assert_eq!(places_of(&server, id), "");

    // Ctrl-C of `kiln run` does the same, by the image's own signal; and its exit code is the program's.
    let image = build(&server, "signal", "STOPSIGNAL SIGUSR1\n");
    let own = script.replace("TERM", "USR1");
    let mut child = server
        .kiln(&["run", &image, "--", "sh", "-c", &own])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut seen = String::new();
    out.read_line(&mut seen).unwrap();
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    out.read_to_string(&mut seen).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!((seen.as_str(), ended.status.code()), ("up\nbye\n", Some(3)));
    assert!(text(ended.stderr).contains("Ctrl-C again"));
    assert_nothing_runs(&server);

    // A server that stops does so too, and says that it was not the program's wish.
    let mut child = server
        .kiln(&["run", "base/debian:trixie", "--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut seen = String::new();
    out.read_line(&mut seen).unwrap();
    server.stop();
    out.read_to_string(&mut seen).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!((seen.as_str(), ended.status.code()), ("up\nbye\n", Some(3)));
    let stderr = text(ended.stderr);
    assert!(stderr.contains("kiln: the server stopped\n"), "{stderr}");
}

#[test]
fn vm_builds_go_on_beside_instances_and_a_killed_server_leaves_none() {
    let server = Server::start();
    let body = |name: &str| {
        json!({
            "name": name, "image": "base/debian:trixie", "size": "512MB",
            "cmd": ["sh", "-c", "echo up; exec sleep 100000"],
        })
    };
    let (_, first) = api(&server, "POST", "/instances", Some(&body("first")));
    let mut following = follow(&server, first["id"].as_str().unwrap(), "up");
    // There is room for two VMs, of which one is left to builds.
    let (_, second) = api(&server, "POST", "/instances", Some(&body("second")));
    build(&server, "beside", "RUN true\n");
    let state = |id: &Value| {
        let path = format!("/instances/{}", id["id"].as_str().unwrap());
        api(&server, "GET", &path, None).1["state"].clone()
    };
    assert_eq!((state(&first), state(&second)), (json!("Running"), json!("Created")));
    let vm = server.processes("qemu-system-x86_64");
    assert_eq!(vm.len(), 1);

    let server = server.kill_and_restart();
    assert!(support::name_of(vm[0]).is_none(), "the VM outlived its sweep");
    following.wait().unwrap();
    let left = instances(&server);
    assert_eq!(left.len(), 2);
    for instance in left {
        assert_eq!(instance["state"], "Stopped");
        assert!(instance["exit_message"].as_str().unwrap().contains("restarted"), "{instance}");
        let path = format!("/instances/{}", instance["id"].as_str().unwrap());
        assert_eq!(api(&server, "DELETE", &path, None).0, 204);
    }
    assert_nothing_runs(&server);
    server.stop();
}
