//! Many builds in a row, a third of them cancelled or killed at random moments: every one ends as it
//! should, and nothing is left of any. Nor of instances, whenever they are deleted.
//!
//! `KILN_TEST_BUILDS=200` says how many; the seed is printed, and `KILN_TEST_SEED` takes it again.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;
#[path = "support/survey.rs"]
mod survey;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::Server;
use survey::{Survey, cgroups};

/// How many builds are submitted and not yet over, at one time.
const AHEAD: usize = 6;

/// A build's life under emulation, from its VM's start, or from being submitted where it need not wait long.
const LIFE_MS: u64 = 6000;

/// What is to become of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Works,
    Fails,
    IsCancelled,
    IsKilled,
}

/// Of six in a row, in any order.
const FATES: [Fate; 6] =
    [Fate::IsCancelled, Fate::IsKilled, Fate::Fails, Fate::Works, Fate::Works, Fate::Works];

/// A build that is not looked at yet.
struct Waiting<'s> {
    index: u64,
    id: String,
    fate: Fate,
    /// Cancels or kills it, and tells whether that was done before its end.
    doom: Option<ScopedJoinHandle<'s, bool>>,
}

#[test]
fn vm_soak_leaves_nothing_behind() {
    let count = number("KILN_TEST_BUILDS", 15);
    let mut random = Random(number("KILN_TEST_SEED", u64::from(std::process::id())));
    println!("seed {}", random.0);
    let server = Server::start();
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let submit = |fate| {
        let code = if fate == Fate::Fails { 3 } else { 0 };
        let dockerfile = format!(
            "FROM scratch\nCOPY --chmod=755 busybox /bin/busybox\nSHELL [\"/bin/busybox\", \"sh\", \"-c\"]\n\
             RUN echo step; exit {code}\nRUN echo end\n"
        );
        server.submit(&[("Dockerfile", dockerfile.as_bytes()), ("busybox", &busybox)], &[])
    };
    // Whatever is made once is there before the survey.
    assert_eq!(server.wait(&submit(Fate::Works))["status"], "ready");
    let before = Survey::of(&server);
    assert!(before.uploads.is_empty(), "{:?}", before.uploads);
    let database = database_bytes(&server);

    let (mut doomed, mut lost) = (0, 0);
    std::thread::scope(|scope| {
        let mut waiting = VecDeque::new();
        let mut fates = vec![];
        for index in 0..count {
            if fates.is_empty() {
                fates = random.shuffled(FATES);
            }
            let fate = fates.pop().unwrap();
            let id = submit(fate);
            let doom = doom(scope, &server, &id, fate, &mut random);
            waiting.push_back(Waiting { index, id, fate, doom });
            if waiting.len() >= AHEAD {
                for build in waiting.drain(..AHEAD / 2) {
                    doomed += usize::from(build.doom.is_some());
                    lost += usize::from(check(&server, build));
                }
            }
        }
        for build in waiting {
            doomed += usize::from(build.doom.is_some());
            lost += usize::from(check(&server, build));
        }
    });
    println!("{count} builds, {doomed} of them doomed, {lost} lost their VM");
    assert_eq!(before, Survey::at_rest(&server, &before));
    let grown = database_bytes(&server).saturating_sub(database);
    println!("the database has grown by {grown} bytes");
    assert!(
        grown <= DATABASE_ROOM + count * BYTES_A_BUILD,
        "the database has grown by {grown} bytes"
    );
    server.stop();
}

/// An instance's life under emulation, from its creation: its disk is made, it boots, it runs.
const INSTANCE_LIFE_MS: u64 = 8000;

#[test]
fn vm_soak_of_instances_leaves_nothing_behind() {
    let mut random = Random(number("KILN_TEST_SEED", u64::from(std::process::id())));
    println!("seed {}", random.0);
    let server = Server::start();
    let run = |code: &str| {
        let command = ["run", "--rm", "base/debian:trixie", "--", "sh", "-c", code];
        server.run(&command).status.code()
    };
    // Whatever is made once is there before the survey.
    assert_eq!(run("exit 0"), Some(0));
    let before = Survey::of(&server);
    assert_eq!(run("echo 1 > /file; exit 3"), Some(3));
    // Deleted at once, and at any moment of its life.
    for life in [0, random.below(INSTANCE_LIFE_MS), random.below(INSTANCE_LIFE_MS)] {
        let body =
            r#"{"name":"soak","image":"base/debian:trixie","cmd":["sleep","1000"],"size":"512MB"}"#;
        let created = curl(&server, "/instances", &["--json", body]);
        let id = serde_json::from_slice::<Value>(&created).unwrap()["id"].clone();
        std::thread::sleep(Duration::from_millis(life));
        let path = format!("/instances/{}", id.as_str().unwrap());
        curl(&server, &path, &["--request", "DELETE"]);
    }
    assert_eq!(before, Survey::at_rest(&server, &before));
    server.stop();
}

/// What a request that works is answered with.
fn curl(server: &Server, path: &str, options: &[&str]) -> Vec<u8> {
    let out = Command::new("curl")
        .args(["--silent", "--fail-with-body"])
        .args(["--header", &format!("Authorization: Bearer {}", server.token)])
        .args(options)
        .arg(format!("http://{}{path}", server.address))
        .output()
        .unwrap();
    assert!(out.status.success(), "{path}: {}", support::text(out.stdout));
    out.stdout
}

/// Cancels a build at a random moment, half of them before its VM starts; or kills a process of its VM.
fn doom<'s>(
    scope: &'s Scope<'s, '_>,
    server: &'s Server,
    id: &str,
    fate: Fate,
    random: &mut Random,
) -> Option<ScopedJoinHandle<'s, bool>> {
    let (id, moment) = (id.to_owned(), Duration::from_millis(random.below(LIFE_MS)));
    let (waits, which) = (random.below(2) == 0, random.below(2));
    match fate {
        Fate::Works | Fate::Fails => None,
        Fate::IsCancelled => Some(scope.spawn(move || {
            if waits {
                wait_until_built(server, &id);
            }
            // A random moment of its life is what this is about.
            std::thread::sleep(moment);
            server.run(&["cancel", &id]).status.success()
        })),
        Fate::IsKilled => Some(scope.spawn(move || {
            wait_until_built(server, &id);
            std::thread::sleep(moment);
            kill_one_of(&id, which)
        })),
    }
}

/// Waits until the build is no longer queued.
fn wait_until_built(server: &Server, id: &str) {
    let mut events = Command::new("curl")
        .args(["--silent", "--no-buffer"])
        .args(["--header", &format!("Authorization: Bearer {}", server.token)])
        .arg(format!("http://{}/builds/{id}/events?follow=true", server.address))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let begun = lines.map_while(Result::ok).find(|line| line.contains(r#""status":"building""#));
    let _ = events.kill();
    events.wait().unwrap();
    assert!(begun.is_some(), "the build {id} has never been built\n{}", server.log());
}

/// Kills a process of the build's own VM, QEMU or the vsock device, if it has one still.
fn kill_one_of(id: &str, which: u64) -> bool {
    let own = |path: &String| Path::new(path).file_name().is_some_and(|name| name == id);
    let mut pids = vec![];
    for cgroup in cgroups().iter().filter(|path| own(path)) {
        let list = std::fs::read_to_string(Path::new(cgroup).join("cgroup.procs"));
        pids.extend(list.unwrap_or_default().lines().map(|pid| pid.parse::<i32>().unwrap()));
    }
    // The VM may end in just this moment.
    let pid = pids.get(usize::try_from(which).unwrap()).or(pids.first());
    pid.is_some_and(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).is_ok())
}

/// Waits for a build's end and looks at it. Tells whether its VM was lost.
fn check(server: &Server, build: Waiting<'_>) -> bool {
    let Waiting { index, id, fate, doom } = build;
    let done = doom.is_some_and(|doom| doom.join().unwrap());
    let build = server.wait(&id);
    let (status, kind) = (&build["status"], &build["failure"]["kind"]);
    match fate {
        Fate::Fails => assert_eq!(kind, "step_failed", "build {index}: {build}"),
        Fate::IsCancelled if done => assert_eq!(status, "cancelled", "build {index}: {build}"),
        // Its image was there already.
        Fate::IsKilled if status == "ready" => {}
        Fate::IsKilled if done => assert!(was_killed(&build), "build {index}: {build}"),
        // What was to become of it came after its end.
        _ => assert_eq!(status, "ready", "build {index}: {build}"),
    }
    kind == "vm_lost"
}

/// The VM was lost, or was not even all there.
fn was_killed(build: &Value) -> bool {
    let Value::String(message) = &build["failure"]["message"] else { return false };
    match build["failure"]["kind"].as_str() {
        Some("vm_lost") => true,
        Some("internal") => message.starts_with("the host could not start a VM: "),
        _ => false,
    }
}

/// What the database's log grows to before it is written back (SQLite's default of 1,000 pages), twice.
const DATABASE_ROOM: u64 = 8 << 20;

/// A build's record and its events in the database, and a reserve.
const BYTES_A_BUILD: u64 = 64 << 10;

/// Of the database and its log, on the disk.
fn database_bytes(server: &Server) -> u64 {
    let files = std::fs::read_dir(server.data()).unwrap().map(Result::unwrap);
    let of_database = files.filter(|f| f.file_name().to_string_lossy().starts_with("kiln.db"));
    of_database.map(|file| file.metadata().unwrap().len()).sum()
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().unwrap())
}

/// SplitMix64 (Steele, Lea, Flood 2014): a seed gives the same sequence.
struct Random(u64);

impl Random {
    /// By Fisher and Yates.
    fn shuffled<T: Copy, const N: usize>(&mut self, items: [T; N]) -> Vec<T> {
        let mut items = items.to_vec();
        for last in (1..N).rev() {
            items.swap(last, usize::try_from(self.below(last as u64 + 1)).unwrap());
        }
        items
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
