//! What people write in Dockerfiles, built in real VMs: `tests/corpus/NAME/`, one build each.
//!
//! - `Dockerfile` and whatever else is the source.
//! - `case.toml`, where a case needs more: `args` of `kiln build`; `raw`; `links`.
//! - `expect.txt`: the image's configuration and files, or the failure. Written by
//!   `KILN_WRITE_GOLDEN=1`, and read by a person before it is committed.
//!
//! A case `hog-…` takes all that it gets of something. Others are built beside it, and become what they always do.
//!
//! `KILN_CORPUS=NAME,…` builds only these, `KILN_CORPUS=all` all. Without it those that become an image are built by halves, one a day:
//! all of them are a third of the time that all tests take.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeMap;
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
    /// The whole directory is sent as an archive, as clients do that know nothing of `.dockerignore`.
    #[serde(default)]
    raw: bool,
    /// Symbolic links of the source that lead out of it, and where. In the repository, cargo would follow them.
    #[serde(default)]
    links: BTreeMap<String, String>,
}

#[test]
fn vm_corpus_of_dockerfiles() {
    let server = Server::start_with(&["--log-limit-mb", "8"]);
    let base = build_base(&server);
    for (name, instruction) in [
        ("busybox-onbuild", "COPY --exclude=*.md . /copied"),
        ("busybox-onbuild-parents", "COPY --parents d/f /copied/"),
        ("busybox-onbuild-link", "COPY --link a /copied"),
    ] {
        base.publish_with(&server, name, "OnBuild", serde_json::json!([instruction]));
    }
    let shell = serde_json::json!(["/bin/sh", "-eu", "-c"]);
    base.publish_with(&server, "busybox-shell", "Shell", shell);
    let cases = submit_all(&server);
    assert!(!cases.is_empty());
    let mut wrong = Vec::new();
    let mut builds = Vec::new();
    for (id, dir) in &cases {
        let build = server.wait(id);
        let found = describe(&server, &build, &base, dir);
        if let Some(difference) = compare(&dir.join("expect.txt"), &found) {
            wrong.push(format!("=== {}\n{difference}", dir.display()));
        }
        builds.push((dir, build));
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    assert_hogs_had_company(&builds);
    server.stop();
}

/// Submits every case, so that each hog has beside it only builds that are to become ready: the next hog is submitted
/// when it is gone, and what fails comes last. Of two VMs one is then the hog's and the other theirs.
fn submit_all(server: &Server) -> Vec<(String, PathBuf)> {
    let (hogs, others): (Vec<_>, Vec<_>) = cases().into_iter().partition(|dir| is_hog(dir));
    let (failing, ready): (Vec<_>, Vec<_>) =
        others.into_iter().partition(|dir| expected(dir).starts_with("fails "));
    let mut ready = ready.into_iter();
    let share = ready.len() / hogs.len().max(1);
    let mut submitted = Vec::new();
    for hog in hogs {
        let id = submit(server, &hog);
        submitted.push((id.clone(), hog));
        submitted.extend(ready.by_ref().take(share).map(|dir| (submit(server, &dir), dir)));
        server.wait(&id);
    }
    submitted.extend(ready.chain(failing).map(|dir| (submit(server, &dir), dir)));
    submitted
}

/// Each hog ran at the same time as a build that became ready. (With `KILN_CORPUS` there may be none.)
fn assert_hogs_had_company(builds: &[(&PathBuf, Value)]) {
    // The API's times sort as texts.
    let time = |build: &Value, name: &str| build[name].as_str().unwrap().to_owned();
    let ran = |build: &Value| (time(build, "started_at"), time(build, "completed_at"));
    let ready: Vec<_> = builds
        .iter()
        .filter(|(_, build)| build["status"] == "ready")
        .map(|(_, build)| ran(build))
        .collect();
    assert!(!ready.is_empty() || std::env::var_os("KILN_CORPUS").is_some(), "nothing is ready");
    for (dir, hog) in builds.iter().filter(|(dir, _)| is_hog(dir)) {
        let (begun, ended) = ran(hog);
        let company =
            ready.iter().filter(|(started, done)| *started < ended && begun < *done).count();
        assert!(company > 0 || ready.is_empty(), "{} ran alone: {hog:#}", dir.display());
    }
}

fn is_hog(dir: &Path) -> bool {
    dir.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"hog-"))
}

/// What a case is to become; empty where nobody has written it yet.
fn expected(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("expect.txt")).unwrap_or_default()
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
    for (name, target) in &case.links {
        std::os::unix::fs::symlink(target, source.path().join(name)).unwrap();
    }
    let args: Vec<_> = case.args.iter().map(String::as_str).collect();
    let archive = tempfile::NamedTempFile::new().unwrap();
    if case.raw {
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(archive.path()).arg("-C").arg(source.path()).arg(".");
        assert!(tar.status().unwrap().success());
    }
    let from = if case.raw { "-" } else { "." };
    let out = server
        .kiln(&[&["build", from, "--detach", "--cpus", CPUS], &args[..]].concat())
        .current_dir(source.path())
        .stdin(std::fs::File::open(archive.path()).unwrap())
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
    let chosen = std::env::var("KILN_CORPUS").ok();
    let only = chosen.clone().filter(|only| only != "all");
    let wanted = |dir: &PathBuf| {
        let name = dir.file_name().unwrap().to_str().unwrap();
        name != "base" && only.as_ref().is_none_or(|only| only.split(',').any(|one| one == name))
    };
    // What the agent refuses by line needs no VM: its own tests go through all of these. One shows here
    // that the refusal arrives.
    let by_line = |dir: &PathBuf| {
        let starts = expected(dir).starts_with("fails as dockerfile_invalid\nDockerfile line ");
        starts && chosen.is_none() && !dir.ends_with("copy-exclude")
    };
    let since_1970 = std::time::UNIX_EPOCH.elapsed().unwrap();
    let today = since_1970.as_secs() / (24 * 60 * 60);
    let another_day = |dir: &PathBuf| {
        let name = dir.file_name().unwrap().as_encoded_bytes();
        let number: u64 = name.iter().map(|byte| u64::from(*byte)).sum();
        let by_halves = chosen.is_none() && !is_hog(dir) && !expected(dir).starts_with("fails ");
        by_halves && (number + today) % 2 == 1
    };
    let entries = std::fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<_> =
        entries.filter(wanted).filter(|dir| !by_line(dir) && !another_day(dir)).collect();
    cases.sort();
    cases
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}
