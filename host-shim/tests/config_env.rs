//! Variables, which only a process of its own can have without disturbing other tests.

#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;

use clap::Parser;

#[derive(Parser)]
struct Serve {
    #[command(flatten)]
    args: kiln::config::ServeArgs,
}

/// Prints what it resolves to when it is called by the test below, and passes otherwise.
#[test]
fn print_what_is_resolved() {
    if std::env::var_os("KILN_TEST_PRINT").is_none() {
        return;
    }
    let args: Vec<String> =
        serde_json::from_str(&std::env::var("KILN_TEST_ARGS").unwrap()).unwrap();
    let config = Serve::try_parse_from(args).unwrap().args.resolve().unwrap();
    println!("resolved {} {} {}", config.listen, config.max_vms, config.require_isolation);
}

fn resolved(variables: &[(&str, &str)], args: &[&str]) -> String {
    let all: Vec<_> = std::iter::once("kiln").chain(args.iter().copied()).collect();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "print_what_is_resolved", "--nocapture"])
        .env("KILN_TEST_PRINT", "1")
        .env("KILN_TEST_ARGS", serde_json::to_string(&all).unwrap())
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let at = text.find("resolved ").unwrap();
    text[at..].lines().next().unwrap().to_owned()
}

#[test]
fn a_flag_wins_over_a_variable_and_a_variable_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kiln.toml");
    std::fs::write(&file, "listen = \"127.0.0.1:1\"\nmax_vms = 1\nrequire_isolation = true\n")
        .unwrap();
    let dirs =
        [("KILN_DATA_DIR", "/d"), ("KILN_RUN_DIR", "/r"), ("KILN_CONFIG", file.to_str().unwrap())];
    assert_eq!(resolved(&dirs, &[]), "resolved 127.0.0.1:1 1 true");
    let mut variables = dirs.to_vec();
    variables.extend([
        ("KILN_LISTEN", "127.0.0.1:2"),
        ("KILN_MAX_VMS", "2"),
        ("KILN_REQUIRE_ISOLATION", "false"),
    ]);
    assert_eq!(resolved(&variables, &[]), "resolved 127.0.0.1:2 2 false");
    assert_eq!(resolved(&variables, &["--listen", "127.0.0.1:3"]), "resolved 127.0.0.1:3 2 false");
}
