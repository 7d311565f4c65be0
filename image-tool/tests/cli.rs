//! The program as a user meets it: exit codes, and what goes to which stream.
#![allow(clippy::unwrap_used, clippy::pedantic, missing_docs)]

use std::fs;
use std::process::Output;

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
