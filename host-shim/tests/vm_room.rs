//! A host's disk that is full while a VM writes to its own.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use support::{BASE, Server, text};

/// VMs start where there is a GiB free.
const SIZE: &str = "size=1600m,mode=700";
/// What is left to a VM that wants to write more.
const LEFT: u64 = 16 << 20;

/// The data directory of a server that is to be, on a file system of its own.
struct Small(PathBuf);

impl Small {
    fn mount(dir: &tempfile::TempDir) -> Self {
        let at = dir.path().join("data");
        std::fs::create_dir(&at).unwrap();
        mount(Some("none"), &at, Some("tmpfs"), MsFlags::empty(), Some(SIZE)).unwrap();
        Self(at)
    }

    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let free = nix::sys::statvfs::statvfs(&self.0).unwrap();
        let free = free.blocks_available() * free.fragment_size();
        let file = File::create(&path).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free - LEFT).unwrap();
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn vm_a_guest_waits_for_room_on_the_hosts_disk() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::mount(&dir);
    let server = Server::start_on(dir);
    // What it writes is not in the image, which would need room as well. Of all, since its own file system is volatile.
    let writes =
        "dd if=/dev/urandom of=/big bs=1M count=64 2>/dev/null && sync && rm /big && echo wro''te";
    let dockerfile =
        format!("FROM {BASE}\nRUN mkfifo /tmp/go && echo wait''ing && cat /tmp/go && {writes}\n");
    let id = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &[]);
    let mut follow = server.follow(&id);
    assert!(follow.until("waiting"), "{}\n{}", follow.seen, server.log());
    let filler = small.fill();
    let out = server.run(&["exec", &id, "--", "sh", "-c", "echo go > /tmp/go"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(out.stderr));
    let begun = Instant::now();
    while !server.log().contains("a VM waits until there is room") {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", server.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(server.show(&id)["status"], "building");
    std::fs::remove_file(filler).unwrap();
    let build = server.wait(&id);
    assert_eq!(build["status"], "ready", "{build}\n{}", server.log());
    server.stop();
}
