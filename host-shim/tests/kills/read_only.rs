//! A data directory that cannot be written: at the start, and from one moment on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use super::full::{Small, place, submit};
use super::server::Home;
use super::{Client, PATIENCE, boot};

#[test]
fn a_server_says_that_its_directory_cannot_be_written() {
    let home = Home::new();
    let small = Small::mount(&home.data());
    home.serve(None).stop();
    let flags = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
    nix::mount::mount(None::<&str>, &small.0, None::<&str>, flags, None::<&str>).unwrap();
    let server = home.serve(None);
    assert_eq!(server.address, None);
    // Once it has said why.
    server.kill_within(PATIENCE);
    let log = home.log();
    let why = log.lines().last().unwrap_or_default();
    assert!(why.contains(small.0.to_str().unwrap()) && why.contains("Read-only"), "{why}");
}

/// An ext4 file system in a file, mounted somewhere while this lives.
pub struct Image {
    file: PathBuf,
    at: PathBuf,
}

impl Image {
    /// Of this size. It is all holes.
    pub fn make(dir: &Path, at: PathBuf, gib: u64) -> Self {
        let file = dir.join("ext4");
        std::fs::File::create(&file).unwrap().set_len(gib << 30).unwrap();
        let lazy = "lazy_itable_init=1,lazy_journal_init=1";
        run(Command::new("mkfs.ext4").args(["-q", "-T", "largefile", "-E", lazy]).arg(&file));
        std::fs::create_dir(&at).unwrap();
        let image = Self { file, at };
        image.mount();
        image
    }

    fn mount(&self) {
        run(Command::new("mount")
            .args(["-o", "loop,errors=remount-ro"])
            .args([&self.file, &self.at]));
    }

    /// What ext4 does when its disk fails it: nothing is written any more, whoever has files open.
    fn abort(&self) {
        run(Command::new("mount").args(["-o", "remount,abort"]).arg(&self.at));
    }

    /// Ends what still has files of it open, and unmounts it.
    fn unmount(&self) {
        for pid in self.holders() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let begun = std::time::Instant::now();
        // The kernel closes the files of a process that was killed a moment later.
        while let Err(error) = nix::mount::umount(&self.at) {
            assert!(error == nix::Error::EBUSY && begun.elapsed() < PATIENCE, "{error}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn holders(&self) -> Vec<Pid> {
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let processes = all.filter_map(|one| {
            let pid = one.file_name().to_str()?.parse().ok()?;
            let files = std::fs::read_dir(one.path().join("fd")).ok()?.flatten();
            let mut files = files.filter_map(|file| std::fs::read_link(file.path()).ok());
            files.any(|file| file.starts_with(&self.at)).then(|| Pid::from_raw(pid))
        });
        processes.filter(|pid| *pid != Pid::this()).collect()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.at, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn a_disk_that_becomes_read_only_refuses_and_what_was_acknowledged_is_built_once_it_is_repaired() {
    let home = Arc::new(Home::new());
    let image = Image::make(home.dir.path(), home.data(), 2);
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let server = home.serve(None);
    let (told, address) = watch::channel(server.address.clone().expect("it starts"));
    let client = Client { http: reqwest::Client::new(), address, token: home.token() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (id, agent, print) = runtime.block_on(async {
        let id = client.submit("before").await;
        let (place, name) = place(&home).await;
        let (print, may_print) = oneshot::channel();
        let agent = tokio::spawn(Agent::new(place, name).printing(1024, 1024, may_print).run());
        image.abort();
        for _ in 0..2 {
            let (status, refused) = submit(&client).await;
            assert_eq!((status, &refused["code"]), (503, &"read_only".into()), "{refused}");
            assert!(refused["detail"].as_str().unwrap().contains("cannot be written"), "{refused}");
        }
        // What has no source, and is in the database alone.
        let url = format!("http://{}/secrets/s", *client.address.borrow());
        let put = client.http.put(url).bearer_auth(&client.token).body("value of a secret");
        let answer = put.send().await.unwrap();
        assert_eq!(answer.status(), 503);
        assert_eq!(answer.json::<serde_json::Value>().await.unwrap()["code"], "read_only");
        assert_eq!(client.build(&id).await["status"], "building", "it can be read");
        (id, agent, print)
    });
    // Its operator stops it, checks the disk and starts it again.
    server.kill_within(Duration::ZERO);
    runtime.block_on(async {
        agent.abort();
        let _ = agent.await;
    });
    drop(print);
    for (pid, _) in home.running() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    image.unmount();
    // It says whether it had something to mend.
    let checked = Command::new("e2fsck").args(["-f", "-p"]).arg(&image.file).status().unwrap();
    assert!(matches!(checked.code(), Some(0 | 1)), "{checked}");
    image.mount();
    let server = home.serve(None);
    told.send(server.address.clone().expect("it starts again")).unwrap();
    runtime.block_on(async {
        let down = CancellationToken::new();
        let agents = tokio::spawn(boot(Arc::clone(&home), down.clone()));
        let after = client.submit("after").await;
        for id in [id, after] {
            let build = client.end(&id).await;
            assert_eq!(build["status"], "ready", "{build}");
        }
        down.cancel();
        agents.await.unwrap();
    });
    server.stop();
    assert_eq!(home.processes(), Vec::<PathBuf>::new());
}
