//! Failed builds that stay, in real VMs: the failed step is entered as it was left.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs;
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{BASE, Server, text};

/// Ends with 42 after half of its work.
const STEP: &str = "
ENV COLOR=green
WORKDIR /srv/work
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

#[test]
fn vm_a_failed_step_is_entered_while_another_build_has_its_place() {
    let server = Server::start_with(&["--max-vms", "1"]);
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
    // The failed command, again: it fails as it did, and works once its cause is gone.
    let again = "echo half > half.txt && test -e whole.txt || exit 42";
    said(&server, &exec(&server, &id, &[], again), 42, "");
    said(&server, &exec(&server, &id, &[], "touch whole.txt"), 0, "");
    said(&server, &exec(&server, &id, &[], again), 0, "");
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
