//! The program as a user meets it: exit codes, and what goes to which stream.
#![allow(clippy::unwrap_used, clippy::pedantic, missing_docs)]

#[path = "support/bundle.rs"]
mod bundle;

use std::fs;
use std::io::Read as _;
use std::process::{Command, Output, Stdio};

use kiln_protocol::version::SUPPORTED;

fn kiln_image(args: &[&str]) -> Output {
    let mut command = assert_cmd::Command::cargo_bin("kiln-image").unwrap();
    command.args(args).env_remove("KILN_IMAGE_CREDS").output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn wrong_usage_is_2() {
    for args in [
        &[][..],
        &["bake"],
        &["build", "x"],
        &["publish", "x"],
        &["disk", "a", "b"],
        &["publish", "x", "no-host"],
        &["inspect", "no-host/x"],
        &["verify", "localhost/x", "--creds", "nocolon"],
    ] {
        let output = kiln_image(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn failures_are_1_and_say_what_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    for (args, said) in [
        (vec!["verify", path], "is not an OCI image layout"),
        (vec!["inspect", "./nowhere"], "is not an OCI image layout"),
        (vec!["build", path, "-o", "x"], "is not a recipe directory"),
        (vec!["publish", path, "localhost:1/x", "--plain-http"], "cannot publish"),
    ] {
        let output = kiln_image(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(stderr(&output).contains(said), "{args:?}: {}", stderr(&output));
    }
    fs::write(dir.path().join("recipe.toml"), "kind = 'base'\nname = 'x'\ntaste = 1\n").unwrap();
    let output = kiln_image(&["build", path, "-o", "x"]);
    assert!(stderr(&output).contains("unknown field `taste`"), "{}", stderr(&output));
}

#[test]
fn a_dynamic_agent_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../images/builder");
    let out = dir.path().join("out");
    let output = kiln_image(&["build", recipe, "-o", out.to_str().unwrap(), "--agent", "/bin/ls"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("dynamically linked"), "{}", stderr(&output));
    let output = kiln_image(&["build", recipe, "-o", out.to_str().unwrap(), "--agent", "/nowhere"]);
    assert!(stderr(&output).contains("no agent at /nowhere"), "{}", stderr(&output));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

fn full() -> Stdio {
    fs::File::options().write(true).open("/dev/full").unwrap().into()
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln-image"));
    command.args(args).env_remove("KILN_IMAGE_CREDS").env_remove("RUST_LOG");
    command
}

#[test]
fn a_full_standard_output_is_a_failure_that_is_told() {
    let dir = tempfile::tempdir().unwrap();
    bundle::sample(dir.path(), SUPPORTED);
    for verb in ["verify", "inspect"] {
        let output =
            command(&[verb, dir.path().to_str().unwrap()]).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(said.starts_with("kiln-image: cannot write to standard output: "), "{said}");
    }
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    bundle::sample(dir.path(), SUPPORTED);
    for verb in ["verify", "inspect"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output =
            command(&[verb, dir.path().to_str().unwrap()]).stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    }
}

#[test]
fn a_full_standard_error_changes_no_exit_code() {
    let mut failing = command(&["verify", "./nowhere"]);
    failing.env("RUST_LOG", "trace").stderr(full());
    assert_eq!(failing.output().unwrap().status.code(), Some(1));
}

#[test]
fn a_log_that_goes_to_no_terminal_has_no_colours() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut inspect = command(&["inspect", dir.path().to_str().unwrap()]);
    let mut child = inspect.env("RUST_LOG", "debug").stderr(writer).spawn().unwrap();
    // It has an end of the pipe too.
    drop(inspect);
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    child.wait().unwrap();
    assert!(log.contains("DEBUG") && !log.contains('\u{1b}'), "{log:?}");
}
