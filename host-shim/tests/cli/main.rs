//! The real `kiln`, against a small real server.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests")]

mod server;
#[path = "../support/bundle.rs"]
mod small_bundle;

mod building;
mod bundle;
mod instances;
mod interrupting;
mod looking;
mod offline;
mod sending;
mod terminal;

use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::{Value, json};
use server::{Ending, Script, Server, sse};
use tokio::process::Command;

pub const REFERENCE: &str = "127.0.0.1:4973/dev/app@sha256:0011";

/// The command with nothing of the environment that the tests run in.
pub fn kiln(server: &Server, args: &[&str]) -> Command {
    let mut command = kiln_at(&server.url, args);
    command.env("KILN_TOKEN", "kiln_test");
    command
}

pub fn kiln_at(url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command
        .args(args)
        .env("KILN_URL", url)
        .env_remove("KILN_TOKEN")
        .env_remove("KILN_PATIENCE")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

pub async fn output(mut command: Command) -> Output {
    command.output().await.unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Asserts on a command's end, showing what it said.
#[track_caller]
pub fn ended(output: &Output, code: i32, stdout_is: &str, stderr_has: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(stdout(output), stdout_is, "{said}");
    for text in stderr_has {
        assert!(said.contains(text), "{text:?} is not in:\n{said}");
    }
}

/// A source with a Dockerfile.
pub fn source() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").unwrap();
    dir
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn log(content: &str) -> Value {
    json!({"type": "log", "content": content, "stream": "stdout", "step": 1})
}

pub fn status(status: &str) -> Value {
    json!({"type": "status", "status": status})
}

pub fn ready() -> Value {
    json!({"id": "b1", "status": "ready", "image_ref": REFERENCE, "image_digest": "sha256:0011"})
}

pub fn failed(kind: &str, message: &str) -> Value {
    json!({"id": "b1", "status": "failed", "error": message, "failure": {"kind": kind, "message": message}})
}

/// A build that ends as it says, with these events before.
pub fn script(events: &[Value], build: Value) -> Script {
    let last = status(build["status"].as_str().unwrap());
    let events: Vec<_> = events.iter().cloned().chain([last]).collect();
    let streams = [(sse(1, &events), Some(Ending::Close))].into();
    Script { streams, build, ..Script::default() }
}
