//! What a real `kiln serve` keeps.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/bundle.rs"]
mod bundle;
mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use kiln::build::{Build, BuildId, NetworkMode, Request, Status, Tenant};
use kiln::events::payload;
use kiln::store::Store;
use kiln::store::sqlite::SqliteStore;
use support::{Server, text};

/// Of a build that printed three lines and ended so many days ago, as an earlier server left it.
async fn ended(store: &SqliteStore, name: &str, days: i64) {
    let request = Request {
        dockerfile: None,
        target: None,
        image_name: None,
        build_args: BTreeMap::new(),
        tags: BTreeMap::new(),
        base_image_digest: None,
        network: NetworkMode::None,
        allowed_domains: vec![],
        secrets: vec![],
        timeout_seconds: 1,
        memory_mb: 256,
        cpus: 1,
        disk_gb: 1,
        keep_failed_seconds: 0,
        priority: 50,
        source_digest: "sha256:00".into(),
        source_bytes: 1,
    };
    let id = BuildId::new(name).unwrap();
    let at = jiff::Timestamp::now().as_millisecond() - days * 24 * 60 * 60 * 1000;
    let event = |payload| payload::of_host(at, payload);
    let build = Build::queued(id.clone(), Tenant::new("dev").unwrap(), request, at);
    let mut events = vec![event(payload::status(Status::Queued, None))];
    events.extend(["one", "two", "three"].map(|line| event(payload::kiln_log(line))));
    store.insert_build(&build, &events, None, &[]).await.unwrap();
    let last = event(payload::status(Status::Cancelled, None));
    store.cancel_queued(&id, at, &[last]).await.unwrap();
}

fn with(dir: tempfile::TempDir, builder: &Path, flags: &[&str]) -> Server {
    Server::start_without_vms_on(dir, builder, &[], flags)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_goes_by_the_settings_and_kiln_tells_what_is_gone() {
    let (dir, builder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    bundle::whole(builder.path());
    let store = SqliteStore::open(&dir.path().join("data")).await.unwrap();
    for (name, days) in [("older", 30), ("old", 3), ("young", 1)] {
        ended(&store, name, days).await;
    }
    store.close().await;
    let server = with(dir, builder.path(), &["--keep-logs-days", "2", "--keep-builds-days", "20"]);
    // One may be under way since the start: then this waits for it.
    let gc = server.run(&["gc"]);
    assert!(gc.status.success(), "{}", text(gc.stderr));
    let logs = |id: &str| {
        let out = server.run(&["logs", id]);
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    assert_eq!(logs("older").0, Some(1));
    let gone =
        "kiln | queued\nkiln | 3 events were removed by the server's retention\nkiln | cancelled\n";
    assert_eq!(logs("old"), (Some(0), String::new(), gone.to_owned()));
    assert_eq!(server.show("old")["status"], "cancelled");
    let (code, lines, said) = logs("young");
    assert_eq!((code, lines.as_str()), (Some(0), "one\ntwo\nthree\n"));
    assert_eq!(said, "kiln | queued\nkiln | cancelled\n");
    let again = server.run(&["gc"]);
    assert_eq!(text(again.stdout), "there is nothing to remove\n");
    let reader = server.new_token("dev", "reader");
    let refused = server.kiln(&["gc"]).env("KILN_TOKEN", reader).output().unwrap();
    assert_eq!(refused.status.code(), Some(3), "{}", text(refused.stderr));
    server.stop();
}

/// A registry that is somebody else's: what it is asked, line by line.
fn external() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(vec![]));
    let lines = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            lines.lock().unwrap().push(line.trim().to_owned());
            let head = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}";
            let _ = stream.write_all(head.as_bytes());
        }
    });
    (url, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_removed_from_a_registry_that_is_not_kilns_own() {
    let (dir, builder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    bundle::whole(builder.path());
    let store = SqliteStore::open(&dir.path().join("data")).await.unwrap();
    // It has no name for its image.
    ended(&store, "older", 30).await;
    store.close().await;
    // As an earlier server left it, which had a registry of its own.
    let image =
        dir.path().join("data/registry/storage/docker/registry/v2/repositories/builds/older");
    std::fs::create_dir_all(&image).unwrap();
    let (url, asked) = external();
    let flags = ["--registry", &url, "--keep-builds-days", "20", "--keep-images-gb", "1"];
    let server = with(dir, builder.path(), &[&flags[..], &["--gc-disk-percent", "1"]].concat());
    let gc = server.run(&["gc"]);
    assert!(gc.status.success(), "{}", text(gc.stderr));
    assert_eq!(server.run(&["show", "older"]).status.code(), Some(1));
    assert_eq!(*asked.lock().unwrap(), Vec::<String>::new());
    assert!(image.exists());
    server.stop();
}
