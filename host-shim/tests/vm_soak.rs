//! Many builds in a row, a third of them cancelled or killed at random moments: every one ends as it
//! should, and nothing is left of any.
//!
//! `KILN_TEST_BUILDS=200` says how many; the seed is printed, and `KILN_TEST_SEED` takes it again.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::Server;

/// How many builds are submitted and not yet over, at one time.
const AHEAD: usize = 6;

/// What is to become of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Works,
    Fails,
    IsCancelled,
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

    let mut waiting = Vec::new();
    let (mut kills, mut lost) = (0, 0);
    for index in 0..count {
        let fate = match random.below(6) {
            0 => Fate::IsCancelled,
            1 => Fate::Fails,
            _ => Fate::Works,
        };
        let id = submit(fate);
        let mut cancelled = false;
        if fate == Fate::IsCancelled {
            // A random moment of its life is what this is about.
            std::thread::sleep(Duration::from_millis(random.below(6000)));
            cancelled = server.run(&["cancel", &id]).status.success();
        } else if random.below(5) == 0 {
            std::thread::sleep(Duration::from_millis(random.below(6000)));
            kills += usize::from(kill_one(&server, &mut random));
        }
        waiting.push((index, id, fate, cancelled));
        if waiting.len() >= AHEAD || index + 1 == count {
            let rest = if index + 1 == count { 0 } else { AHEAD / 2 };
            while waiting.len() > rest {
                let (index, id, fate, cancelled) = waiting.remove(0);
                lost += usize::from(check(&server, index, &id, fate, cancelled));
            }
        }
    }
    assert!(lost <= kills, "{lost} builds lost their VM, but {kills} were killed");
    println!("{count} builds, {kills} VMs killed, {lost} of them before their end");
    let after = Survey::of(&server);
    assert_eq!(before, after);
    server.stop();
}

/// Waits for a build's end and looks at it. Tells whether its VM was lost.
fn check(server: &Server, index: u64, id: &str, fate: Fate, cancelled: bool) -> bool {
    let build = server.wait(id);
    let (status, kind) = (&build["status"], &build["failure"]["kind"]);
    if cancelled {
        assert_eq!(status, "cancelled", "build {index}: {build}");
        return false;
    }
    if kind == "vm_lost" {
        return true;
    }
    match fate {
        Fate::Fails => assert_eq!(kind, "step_failed", "build {index}: {build}"),
        // A cancel that was refused came after the end.
        Fate::Works | Fate::IsCancelled => assert_eq!(status, "ready", "build {index}: {build}"),
    }
    false
}

/// Kills a process of some VM, if there is one.
fn kill_one(server: &Server, random: &mut Random) -> bool {
    let program = ["qemu-system-x86_64", "vhost-device-vsock"][usize::from(random.below(2) == 0)];
    let pids = server.processes(program);
    let Some(pid) = pids.get(usize::try_from(random.below(pids.len().max(1) as u64)).unwrap())
    else {
        return false;
    };
    kill(Pid::from_raw(*pid), Signal::SIGKILL).is_ok()
}

/// All that a VM could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Survey {
    processes: usize,
    descriptors: usize,
    sockets: BTreeSet<String>,
    mounts: Vec<String>,
    cgroups: BTreeSet<String>,
    /// Path and bytes of every file but the database, the log and the registry's images.
    files: BTreeSet<(String, u64)>,
}

impl Survey {
    fn of(server: &Server) -> Self {
        let dir = server.data().parent().unwrap().to_owned();
        let lines = |file: &str| std::fs::read_to_string(file).unwrap();
        let mine = |line: &&str| line.contains(dir.to_str().unwrap());
        let mut files = BTreeSet::new();
        list(&dir, &mut files);
        let kept = |(path, _): &(String, u64)| {
            !path.contains("/registry/")
                && !path.contains("kiln.db")
                && !path.ends_with("serve.log")
        };
        files.retain(kept);
        Self {
            processes: support::children_of(server.pid()).len(),
            descriptors: std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count(),
            sockets: lines("/proc/net/unix").lines().filter(mine).map(path_of).collect(),
            mounts: lines("/proc/self/mounts").lines().map(str::to_owned).collect(),
            cgroups: cgroups(),
            files,
        }
    }
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
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
