//! What people write in Dockerfiles, built in real VMs: `tests/corpus/NAME/`, one build each.
//!
//! - `Dockerfile` and whatever else is the source.
//! - `case.toml`, where a case needs more: `args` of `kiln build`.
//! - `expect.txt`: the image's configuration and files, or the failure. Written by
//!   `KILN_WRITE_GOLDEN=1`, and read by a person before it is committed.
//!
//! `KILN_CORPUS=NAME,…` builds only these.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::image::Image;
use support::{CPUS, Server, text};

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// More arguments of `kiln build`.
    #[serde(default)]
    args: Vec<String>,
}

#[test]
fn vm_corpus_of_dockerfiles() {
    let server = Server::start_with(&["--log-limit-mb", "8"]);
    let base = build_base(&server);
    let cases: Vec<_> = cases().into_iter().map(|dir| (submit(&server, &dir), dir)).collect();
    assert!(!cases.is_empty());
    let mut wrong = Vec::new();
    for (id, dir) in &cases {
        let found = describe(&server, &server.wait(id), &base, dir);
        if let Some(difference) = compare(&dir.join("expect.txt"), &found) {
            wrong.push(format!("=== {}\n{difference}", dir.display()));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    server.stop();
}

/// Debian's static busybox as an image, built by Kiln too.
fn build_base(server: &Server) -> Image {
    let dir = tempfile::tempdir().unwrap();
    let copied = Command::new("cp")
        .arg("-r")
        .arg(corpus().join("base/."))
        .arg("/bin/busybox")
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(copied.success(), "is busybox-static installed?");
    let path = dir.path().to_str().unwrap();
    let out = server.run(&["build", path, "--progress", "plain", "-t", "busybox"]);
    assert!(out.status.success(), "{}\n{}", text(out.stderr), server.log());
    Image::copy(server, text(out.stdout).trim())
}

fn submit(server: &Server, dir: &Path) -> String {
    let case: Case = match std::fs::read_to_string(dir.join("case.toml")) {
        Ok(text) => toml::from_str(&text).unwrap(),
        Err(_) => Case::default(),
    };
    // What the case is and what it expects are not part of its source.
    let source = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-rP").arg(dir.join(".")).arg(source.path()).status();
    assert!(copied.unwrap().success());
    for own in ["case.toml", "expect.txt"] {
        let _ = std::fs::remove_file(source.path().join(own));
    }
    let args: Vec<_> = case.args.iter().map(String::as_str).collect();
    let out = server
        .kiln(&[&["build", ".", "--detach", "--cpus", CPUS], &args[..]].concat())
        .current_dir(source.path())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}: {}", dir.display(), text(out.stderr));
    text(out.stdout).trim().to_owned()
}

fn describe(server: &Server, build: &Value, base: &Image, dir: &Path) -> String {
    if build["status"] == "ready" {
        let image = Image::copy(server, build["image_ref"].as_str().unwrap()).describe(base);
        return format!("{}{image}", notes(server, build["id"].as_str().unwrap()));
    }
    let failure = &build["failure"];
    if std::env::var_os("KILN_CORPUS").is_some() {
        eprintln!("{}: {build:#}", dir.display());
    }
    let kind = failure["kind"].as_str().unwrap_or("nothing");
    let mut found = format!("fails as {kind}\n");
    if kind == "timed_out" {
        // Where it was by then depends on the machine.
        return found;
    }
    found.push_str(failure["message"].as_str().unwrap_or_default());
    found.push('\n');
    found
}

/// What Kiln itself says in the log of a build that works.
fn notes(server: &Server, id: &str) -> String {
    let log = text(server.run(&["logs", id]).stdout);
    let notes: Vec<_> = log.lines().filter(|line| line.contains("Dockerfile line")).collect();
    notes.iter().map(|note| format!("{note}\n")).collect()
}

fn compare(golden: &Path, found: &str) -> Option<String> {
    if std::env::var_os("KILN_WRITE_GOLDEN").is_some() {
        std::fs::write(golden, found).unwrap();
        return None;
    }
    let expected = std::fs::read_to_string(golden).unwrap_or_default();
    if expected == found {
        return None;
    }
    let (expected, found): (Vec<_>, Vec<_>) = (expected.lines().collect(), found.lines().collect());
    let missing = expected.iter().filter(|line| !found.contains(line)).map(|l| format!("- {l}\n"));
    let added = found.iter().filter(|line| !expected.contains(line)).map(|l| format!("+ {l}\n"));
    Some(missing.chain(added).collect())
}

fn cases() -> Vec<PathBuf> {
    let only = std::env::var("KILN_CORPUS").ok();
    let wanted = |dir: &PathBuf| {
        let name = dir.file_name().unwrap().to_str().unwrap();
        name != "base" && only.as_ref().is_none_or(|only| only.split(',').any(|one| one == name))
    };
    // What the agent refuses by line needs no VM: its own tests go through all of these. One shows here
    // that the refusal arrives.
    let by_line = |dir: &PathBuf| {
        let expected = std::fs::read_to_string(dir.join("expect.txt")).unwrap_or_default();
        let starts = expected.starts_with("fails as dockerfile_invalid\nDockerfile line ");
        starts && only.is_none() && !dir.ends_with("copy-exclude")
    };
    let entries = std::fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<_> = entries.filter(wanted).filter(|dir| !by_line(dir)).collect();
    cases.sort();
    cases
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}
