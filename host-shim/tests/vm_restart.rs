//! What becomes of builds in real VMs when their server is killed: they go on with the next one, or are built again.
//! `KILN_TEST_VM_KILLS` says how often one that goes on is killed (2).

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{BASE, Server, text};

/// A step that waits until somebody writes to `/tmp/go`. What it says is not in its own line.
const STEP: &str = "RUN mkfifo /tmp/go && echo wait''ing && cat /tmp/go && echo to''ld";

fn waiting(server: &Server) -> String {
    let dockerfile =
        format!("FROM {BASE}\nENV A=1\n{STEP}\nRUN echo to the e''nd >/end && cat /end\n");
    let id = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &[]);
    let mut follow = server.follow(&id);
    assert!(follow.until("waiting"), "{}\n{}", follow.seen, server.log());
    id
}

fn tell(server: &Server, id: &str) {
    let go = ["exec", id, "--", "sh", "-c", "echo go > /tmp/go"];
    let out = server.kiln(&go).stdin(Stdio::null()).output().unwrap();
    assert!(matches!(out.status.code(), Some(0 | 125 | 137)), "{}", text(out.stderr));
}

/// The whole log, and the numbers of all events.
fn told(server: &Server, id: &str) -> (String, Vec<u64>) {
    let out = server.run(&["logs", id]);
    assert!(out.status.success());
    let events = std::process::Command::new("curl")
        .args(["--silent", "--fail", &format!("http://{}/builds/{id}/events", server.address)])
        .args(["--header", &format!("Authorization: Bearer {}", server.token)])
        .output()
        .unwrap();
    let events = text(events.stdout);
    let ids = events.lines().filter_map(|line| line.strip_prefix("id:")?.trim().parse().ok());
    (text(out.stdout), ids.collect())
}

#[test]
fn vm_a_build_goes_on_when_its_server_is_killed() {
    let kills = std::env::var("KILN_TEST_VM_KILLS").map_or(2, |n| n.parse::<u32>().unwrap());
    let mut server = Server::start();
    let undisturbed = waiting(&server);
    tell(&server, &undisturbed);
    let expected = server.wait(&undisturbed);
    assert_eq!(expected["status"], "ready", "{expected}\n{}", server.log());

    let id = waiting(&server);
    let vm = server.processes("qemu-system-x86_64");
    assert_eq!(vm.len(), 1);
    for _ in 0..kills {
        server = server.kill_and_restart();
        // No child of this server's.
        assert!(runs(vm[0]), "{}", server.log());
        let build = server.show(&id);
        assert_eq!((&build["status"], &build["attempt"]), (&"building".into(), &1.into()));
    }
    tell(&server, &id);
    let build = server.wait(&id);
    assert_eq!(build["status"], "ready", "{build}\n{}", server.log());
    assert_eq!(build["attempt"], 1);
    assert_eq!(build["pulled"], expected["pulled"]);
    let provenance = |build: &serde_json::Value| build["provenance"]["builder_digest"].clone();
    assert!(provenance(&build).is_string());
    assert_eq!(provenance(&build), provenance(&expected));
    let ((log, ids), (of_other, _)) = (told(&server, &id), told(&server, &undisturbed));
    assert_eq!(without_ids(&log), without_ids(&of_other));
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>());
    assert!(!runs(vm[0]), "{}", server.log());
    server.stop();
}

/// Each image has the time in it, and so an id and digests of its own.
fn without_ids(log: &str) -> String {
    let words = log.split_inclusive(|c: char| !c.is_ascii_hexdigit());
    words.map(|word| if word.len() > 12 { "ID\n" } else { word }).collect()
}

fn runs(pid: i32) -> bool {
    support::name_of(pid).is_some_and(|name| name.starts_with("qemu"))
}

#[test]
fn vm_a_build_whose_vm_goes_with_its_server_is_built_again_and_once_only() {
    let mut server = Server::start_with(&["--max-vms", "1"]);
    let id = waiting(&server);
    let queued = server.submit(&[("Dockerfile", b"FROM scratch\nCOPY Dockerfile /\n")], &[]);
    for attempt in 1..=2 {
        let mut follow = server.follow(&id);
        for _ in 0..attempt {
            assert!(follow.until("waiting"), "{}\n{}", follow.seen, server.log());
        }
        assert_eq!(follow.seen.contains("is built again"), attempt == 2, "{}", follow.seen);
        assert_eq!(server.show(&id)["attempt"], attempt);
        let vm = server.processes("qemu-system-x86_64");
        assert_eq!(vm.len(), 1);
        // The server first: it is not to see the other end.
        kill(Pid::from_raw(i32::try_from(server.pid()).unwrap()), Signal::SIGKILL).unwrap();
        kill(Pid::from_raw(vm[0]), Signal::SIGKILL).unwrap();
        server = server.kill_and_restart();
    }
    let build = server.wait(&id);
    assert_eq!(build["failure"]["kind"], "host_restarted", "{build}");
    // What was only queued is built, as if nothing had happened.
    let build = server.wait(&queued);
    assert_eq!(build["status"], "ready", "{build}");
    let (_, ids) = told(&server, &id);
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>());
    server.stop();
}
