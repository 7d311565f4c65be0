//! Many builds in a row, a third of them cancelled or killed at random moments: every one ends as it
//! should, and nothing is left of any.
//!
//! `KILN_TEST_BUILDS=200` says how many; the seed is printed, and `KILN_TEST_SEED` takes it again.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::Server;

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

/// For how long a client of the registry keeps a connection that it does not need: reqwest's default, and a reserve.
const CONNECTION_KEPT: Duration = Duration::from_secs(120);

/// All that a VM could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Survey {
    processes: usize,
    /// How many of each.
    descriptors: BTreeMap<String, usize>,
    sockets: BTreeSet<String>,
    mounts: Vec<String>,
    cgroups: BTreeSet<String>,
    /// Path and bytes of every file but the database, the log and the registry's images. The server's
    /// temporary files would be among them.
    files: BTreeSet<(String, u64)>,
    /// What the registry did not take as an image's part in the end.
    uploads: BTreeSet<(String, u64)>,
}

impl Survey {
    /// The next one that has no more open than an earlier one had. Fewer is no leftover.
    fn at_rest(server: &Server, before: &Self) -> Self {
        let begun = Instant::now();
        loop {
            let mut after = Self::of(server);
            if after
                .descriptors
                .iter()
                .all(|(what, count)| before.descriptors.get(what) >= Some(count))
            {
                after.descriptors.clone_from(&before.descriptors);
                return after;
            }
            if begun.elapsed() > CONNECTION_KEPT {
                return after;
            }
            // A connection that is closed for want of use tells nobody outside.
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn of(server: &Server) -> Self {
        let dir = server.data().parent().unwrap().to_owned();
        let lines = |file: &str| std::fs::read_to_string(file).unwrap();
        let mine = |line: &&str| line.contains(dir.to_str().unwrap());
        let mut files = BTreeSet::new();
        list(&dir, &mut files);
        let is_upload = |path: &str| path.contains("/registry/") && path.contains("/_uploads/");
        let uploads = files.iter().filter(|(path, _)| is_upload(path)).cloned().collect();
        let kept = |(path, _): &(String, u64)| {
            !path.contains("/registry/")
                && !path.contains("kiln.db")
                && !path.ends_with("serve.log")
        };
        files.retain(kept);
        Self {
            processes: support::children_of(server.pid()).len(),
            descriptors: descriptors(server.pid()),
            sockets: lines("/proc/net/unix").lines().filter(mine).map(path_of).collect(),
            mounts: lines("/proc/self/mounts").lines().map(str::to_owned).collect(),
            cgroups: cgroups(),
            files,
            uploads,
        }
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

/// What a process has open, all sockets being one thing. The database is not among it: it has a writer and one or two
/// readers, as many as were ever needed at one time.
fn descriptors(pid: u32) -> BTreeMap<String, usize> {
    let mut open = BTreeMap::new();
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(Result::unwrap) {
        // One may be closed meanwhile.
        let Ok(target) = std::fs::read_link(fd.path()) else { continue };
        let target = target.display().to_string();
        let what = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
        if !what.contains("kiln.db") {
            *open.entry(what.to_owned()).or_default() += 1;
        }
    }
    open
}

fn path_of(line: &str) -> String {
    line.split_whitespace().last().unwrap().to_owned()
}

fn list(dir: &Path, into: &mut BTreeSet<(String, u64)>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        into.insert((
            entry.path().display().to_string(),
            if meta.is_dir() { 0 } else { meta.blocks() },
        ));
        if meta.is_dir() {
            list(&entry.path(), into);
        }
    }
}

/// Every cgroup that has Kiln's name.
fn cgroups() -> BTreeSet<String> {
    walkdir(Path::new("/sys/fs/cgroup"), 4)
        .into_iter()
        .filter(|path| path.contains("kiln"))
        .collect()
}

fn walkdir(dir: &Path, depth: u32) -> Vec<String> {
    let mut found = vec![dir.display().to_string()];
    if depth > 0 {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.extend(walkdir(&entry.path(), depth - 1));
            }
        }
    }
    found
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
