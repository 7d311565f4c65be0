//! The memory of a guest, while it pulls, builds and pushes: no credential of the host or of a registry is in it.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::File;
use std::process::Stdio;

use nix::unistd::{Whence, lseek};
use serde_json::{Value, json};
use support::holders::lines;
use support::registry::{LOGIN, Registry};
use support::{Server, text};

/// In the build's job, which is in its memory from then on.
const KNOWN: &str = "a-text-that-the-guest-has";

/// What there is of the memory of the build's VM: QEMU has it in a file without a name. `None` once the VM has gone.
fn memory(server: &Server, id: &str) -> Option<File> {
    let log = server.log();
    let line = log.lines().find(|line| line.contains("started a VM") && line.contains(id))?;
    let pid = line.split_once("pid=")?.1.split(' ').next()?;
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut paths = files.flatten().map(|file| file.path());
    let is_memory = |path: &std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("memory-backend"))
    };
    File::open(paths.find(is_memory)?).ok()
}

/// Which of these texts are in it now, and how many bytes were looked at: what the guest has never touched is left out.
fn search(memory: File, texts: &[&str]) -> (Vec<String>, u64) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let size = i64::try_from(memory.metadata().unwrap().len()).unwrap();
    let copied = std::thread::spawn(move || {
        use std::io::{Read as _, Seek as _, SeekFrom};
        let (mut at, mut copied) = (0, 0);
        while at < size {
            // There is nothing behind the last piece.
            let Ok(begin) = lseek(&memory, at, Whence::SeekData) else { break };
            at = lseek(&memory, begin, Whence::SeekHole).unwrap();
            (&memory).seek(SeekFrom::Start(u64::try_from(begin).unwrap())).unwrap();
            let piece = u64::try_from(at - begin).unwrap();
            copied += std::io::copy(&mut (&memory).take(piece), &mut writer).unwrap();
        }
        copied
    });
    let found = lines(texts, Stdio::from(reader));
    (found, copied.join().unwrap())
}

fn status(server: &Server, id: &str) -> String {
    let build: Value =
        serde_json::from_slice(&server.run(&["show", id, "--format", "json"]).stdout).unwrap();
    build["status"].as_str().unwrap().to_owned()
}

#[test]
fn vm_a_guests_memory_holds_no_credential() {
    let upstream = Registry::with_login();
    upstream.push("some/name:1");
    let backing = Registry::with_login();
    let logins = tempfile::NamedTempFile::new().unwrap();
    let basic = {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(LOGIN)
    };
    let auths = json!({"auths": {
        &upstream.address: {"auth": basic}, &backing.address: {"auth": basic},
    }});
    std::fs::write(logins.path(), auths.to_string()).unwrap();
    let server = Server::start_with(&[
        "--upstream",
        &format!("docker.io=http://{}", upstream.address),
        "--registry",
        &format!("http://{}", backing.address),
        "--registry-config",
        logins.path().to_str().unwrap(),
    ]);
    // Long enough to be looked at on the way: a layer that does not compress.
    let dockerfile = format!(
        "FROM some/name:1\nRUN echo {KNOWN}; sleep 5; head -c 60000000 /dev/urandom >/large\n"
    );
    let id = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &["--memory", "512"]);
    let (_, password) = LOGIN.split_once(':').unwrap();
    let token = server.token.clone();
    let texts = [KNOWN, password, &*basic, &*token];
    let mut looks = std::collections::BTreeMap::<String, u32>::new();
    loop {
        let before = status(&server, &id);
        if matches!(&*before, "ready" | "failed" | "cancelled") {
            break;
        }
        let Some(memory) = memory(&server, &id) else { continue };
        let (found, bytes) = search(memory, &texts);
        for text in &found {
            assert_eq!(text, KNOWN, "it is in the guest's memory while the build is {before}");
        }
        // That there is something to be found, and it is.
        if !found.is_empty() && before == status(&server, &id) {
            assert!(bytes > 50_000_000, "{bytes}");
            *looks.entry(before).or_default() += 1;
        }
    }
    let build = server.wait(&id);
    let logs = || text(server.run(&["logs", &id]).stdout);
    assert_eq!(build["status"], "ready", "{build}\n{}\n{}", logs(), server.log());
    assert_eq!(build["pulled"][0]["reference"], "docker.io/some/name:1");
    println!("looks by status: {looks:?}");
    for during in ["building", "pushing"] {
        assert!(looks.contains_key(during), "not looked at while it was {during}: {looks:?}");
    }
    server.stop();
}
