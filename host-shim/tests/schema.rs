//! schemathesis against a real `kiln serve`, by the document that it serves: every check. `tests/schemathesis/` says what
//! is sent, and what is no failure, each with its reason.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/bundle.rs"]
mod bundle;
mod support;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::{Server, text};

/// Cases of one operation in one phase where `KILN_SCHEMA_EXAMPLES` does not say; 200 make more than 5,000 cases.
const EXAMPLES: &str = "40";
/// Always the same requests. `KILN_SCHEMA_SEED` makes others.
const SEED: &str = "1";
/// All that is to be asked at the least: a run that tests nothing is no success.
const LEAST_CASES: u64 = 1000;

#[test]
fn the_api_is_what_its_document_says() {
    let builder = tempfile::tempdir().unwrap();
    bundle::whole(builder.path());
    // As much as the document's sizes say, whatever this host has.
    let memory = ["--max-vm-memory-mb", "65536"];
    let server = Server::start_without_vms_with(builder.path(), &memory);
    server.new_token("dev", "reader");
    let authorization = format!("Authorization: Bearer {}", server.token);
    let list = Command::new("curl")
        .args(["-sS", "--fail", "-H", &authorization])
        .arg(format!("http://{}/tokens", server.address))
        .output()
        .unwrap();
    let tokens: Value = serde_json::from_slice(&list.stdout).unwrap();
    let id = |n: usize| tokens[n]["id"].as_str().unwrap().to_owned();

    let setting = |name, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schemathesis");
    let program = support::tools().join("schemathesis/bin/schemathesis");
    assert!(program.exists(), "{} is missing: run scripts/test", program.display());
    // What it writes beside itself goes with the directory.
    let place = tempfile::tempdir().unwrap();
    let output = Command::new(program)
        .current_dir(place.path())
        .arg("--config-file")
        .arg(files.join("schemathesis.toml"))
        .args(["run", &format!("http://{}/openapi.json", server.address), "--checks", "all"])
        .args(["--seed", &setting("KILN_SCHEMA_SEED", SEED)])
        .args(["--max-examples", &setting("KILN_SCHEMA_EXAMPLES", EXAMPLES), "--no-color"])
        .env("SCHEMATHESIS_HOOKS", files.join("hooks.py"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("KILN_TOKEN", &server.token)
        .env("KILN_TOKEN_ID", id(0))
        .env("KILN_OTHER_TOKEN_ID", id(1))
        .output()
        .unwrap();
    let said = text(output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{}", text(output.stderr));
    let cases = said.lines().find_map(|line| line.trim().split_once(" generated, "));
    let cases: u64 = cases.unwrap().0.parse().unwrap();
    assert!(cases >= LEAST_CASES, "only {cases} cases");
}
