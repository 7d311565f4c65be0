//! The queue of a real `kiln serve`. Its VMs are programs that wait where QEMU would boot, so that builds end only as the test
//! wants.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/bundle.rs"]
mod bundle;
mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use support::{Server, text};

/// Whatever its arguments are.
const WAITS: &[u8] = b"#include <unistd.h>\nint main(void) { for (;;) pause(); }\n";

fn waiting_qemu(dir: &Path) -> PathBuf {
    let program = dir.join("qemu-system-x86_64");
    let mut cc = Command::new("cc");
    cc.args(["-x", "c", "-", "-o"]).arg(&program).stdin(Stdio::piped());
    let mut cc = cc.spawn().unwrap();
    cc.stdin.take().unwrap().write_all(WAITS).unwrap();
    assert!(cc.wait().unwrap().success());
    program
}

/// All builds, the oldest first.
fn builds(server: &Server) -> Vec<Value> {
    let out = server.run(&["ls", "--format", "json"]);
    let mut builds: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap();
    builds.reverse();
    builds
}

/// Where each is, and which is the next.
fn places(server: &Server) -> Vec<String> {
    let place = |build: Value| {
        let status = build["status"].as_str().unwrap().to_owned();
        build["queue_position"]
            .as_u64()
            .map_or(status.clone(), |position| format!("{status} {position}"))
    };
    builds(server).into_iter().map(place).collect()
}

fn until_building(server: &Server, id: &str) {
    let mut events = Command::new("curl")
        .args(["--silent", "--no-buffer", "--fail"])
        .args(["--header", &format!("Authorization: Bearer {}", server.token)])
        .arg(format!("http://{}/builds/{id}/events?follow=true", server.address))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let building = lines.map_while(Result::ok).any(|line| line.contains(r#""status":"building""#));
    // It has the pipe's other end no more, but would notice only with the next event.
    events.kill().unwrap();
    events.wait().unwrap();
    assert!(building, "{id} ended without\n{}", server.log());
}

fn cancel(server: &Server, id: &str) {
    let out = server.run(&["cancel", id]);
    assert!(out.status.success(), "{}\n{}", text(out.stderr), server.log());
}

#[test]
fn build_queue_concurrency_limit() {
    let dir = tempfile::tempdir().unwrap();
    bundle::whole(dir.path());
    let server = Server::start_with_qemu(dir.path(), &waiting_qemu(dir.path()));
    let ids: Vec<String> =
        (0..5).map(|_| server.submit(&[("Dockerfile", b"FROM scratch\n")], &[])).collect();
    for id in &ids[..2] {
        until_building(&server, id);
    }
    assert_eq!(places(&server), ["building", "building", "queued 1", "queued 2", "queued 3"]);

    // One goes, and the one that waits longest comes.
    cancel(&server, &ids[0]);
    until_building(&server, &ids[2]);
    assert_eq!(places(&server), ["cancelled", "building", "building", "queued 1", "queued 2"]);
    // One that waits makes no room.
    cancel(&server, &ids[3]);
    assert_eq!(places(&server), ["cancelled", "building", "building", "cancelled", "queued 1"]);
    cancel(&server, &ids[2]);
    until_building(&server, &ids[4]);
    for id in [&ids[1], &ids[4]] {
        cancel(&server, id);
    }

    // As their own times tell it, too: never more than two, and two at times.
    let time = |build: &Value, field: &str| {
        build[field].as_str().map(|at| at.parse::<jiff::Timestamp>().unwrap())
    };
    let ran: Vec<_> = builds(&server)
        .iter()
        .filter_map(|build| time(build, "started_at").zip(time(build, "completed_at")))
        .collect();
    assert_eq!(ran.len(), 4, "the one that waited never ran");
    let at_once = |at| ran.iter().filter(|(from, to)| *from <= at && at < *to).count();
    assert_eq!(ran.iter().map(|(from, _)| at_once(*from)).max(), Some(2));
    server.stop();
}
