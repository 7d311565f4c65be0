//! The supervised docker-registry.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use http::Method;
use kiln::gateway::path::Route;
use kiln::gateway::{Managed, ManagedError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Only a test that fails waits so long.
const PATIENCE: Duration = Duration::from_secs(30);

fn pid(dir: &Path) -> i32 {
    let text = std::fs::read_to_string(dir.join("pid")).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

async fn answers(registry: &Managed) -> bool {
    let answer = registry.backing().request(Method::GET, Route::Base).send().await;
    answer.is_ok_and(|answer| answer.status().is_success())
}

/// A connection that ends when the registry does.
fn connection(dir: &Path) -> UnixStream {
    let stream = UnixStream::connect(dir.join("run/registry.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

async fn ended(mut stream: UnixStream) {
    let end = tokio::task::spawn_blocking(move || stream.read(&mut [0])).await.unwrap();
    let timed_out = |e: &std::io::Error| e.kind() == std::io::ErrorKind::WouldBlock;
    assert!(!end.is_err_and(|e| timed_out(&e)), "the registry still runs");
}

#[tokio::test]
async fn it_runs_without_rights_and_ends_with_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    // Deeper than a Unix socket's address may be.
    let dir = dir.path().join("d".repeat(100)).join("registry");
    let registry = Managed::start(&dir).await.unwrap();
    assert!(answers(&registry).await);
    assert!(matches!(Managed::start(&dir).await, Err(ManagedError::InUse(_))));
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid(&dir))).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("CapEff:"), "0000000000000000");
    if nix::unistd::geteuid().is_root() {
        assert_eq!(field("CapBnd:"), "0000000000000000");
        assert_ne!(field("Uid:"), "0");
        let storage = std::fs::metadata(dir.join("storage")).unwrap();
        assert_eq!(storage.uid().to_string(), field("Uid:"));
    }
    assert_eq!(std::fs::metadata(dir.join("run")).unwrap().mode() & 0o777, 0o700);
    let raw = pid(&dir);
    registry.stop().await;
    assert!(!Path::new(&format!("/proc/{raw}")).exists());
    assert!(!dir.join("pid").exists());
    let again = Managed::start(&dir).await.unwrap();
    assert!(answers(&again).await);
}

#[tokio::test]
async fn one_that_is_killed_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Managed::start(dir.path()).await.unwrap();
    let first = pid(dir.path());
    // What it had made and not written when it was killed makes it fail at all that it links to.
    let tag = dir
        .path()
        .join("storage/docker/registry/v2/repositories/dev/app/_manifests/tags/v1/current/link");
    std::fs::create_dir_all(tag.parent().unwrap()).unwrap();
    std::fs::write(&tag, "").unwrap();
    let owner = std::fs::metadata(dir.path().join("storage")).unwrap();
    let made = tag.ancestors().take_while(|path| !path.ends_with("storage"));
    made.for_each(|path| {
        std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid())).unwrap();
    });
    let status = async || {
        let route = Route::parse("/v2/dev/app/manifests/v1").unwrap();
        registry.backing().request(Method::GET, route).send().await.unwrap().status().as_u16()
    };
    assert_eq!(status().await, 500);
    let open = connection(dir.path());
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    ended(open).await;
    // The next request that goes through is the event.
    let back = async {
        while !answers(&registry).await {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, back).await.unwrap();
    assert_ne!(pid(dir.path()), first);
    assert_eq!(status().await, 404);
}

#[tokio::test]
async fn a_dropped_one_ends_too() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Managed::start(dir.path()).await.unwrap();
    let open = connection(dir.path());
    drop(registry);
    ended(open).await;
}

/// Not a test by itself: the process that the next test kills.
#[tokio::test]
async fn helper_that_serves_until_it_is_killed() {
    let Some(dir) = std::env::var_os("KILN_TEST_REGISTRY_DIR") else { return };
    let _registry = Managed::start(Path::new(&dir)).await.unwrap();
    println!("\nserving");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn it_does_not_outlive_a_killed_server() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "managed::helper_that_serves_until_it_is_killed", "--nocapture"])
        .env("KILN_TEST_REGISTRY_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(server.stdout.take().unwrap());
    assert!(output.lines().map_while(Result::ok).any(|line| line == "serving"));
    let open = connection(dir.path());
    server.kill().unwrap();
    server.wait().unwrap();
    ended(open).await;
    let next = Managed::start(dir.path()).await.unwrap();
    assert!(answers(&next).await);
}
