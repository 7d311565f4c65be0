//! What needs no server: `kiln token` on a data directory, and settings of `kiln serve` that cannot be.

use super::*;

const NOWHERE: &str = "http://127.0.0.1:1";

async fn run(args: &[&str]) -> Output {
    output(kiln_at(NOWHERE, args)).await
}

#[tokio::test]
async fn tokens_are_made_listed_and_revoked_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let on = |args: &[&'static str]| [&["token"], args, &["--data-dir", text(dir.path())]].concat();
    let create = on(&["create", "--tenant", "dev", "--role", "admin"]);
    let made = run(&create).await;
    ended(&made, 0, &stdout(&made), &[]);
    assert!(stdout(&made).starts_with("kiln_"));
    let listed = stdout(&run(&on(&["list"])).await);
    let id = listed.lines().nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    assert!(listed.contains(&format!("{id}  valid  dev ")), "{listed}");
    assert!(listed.contains("LAST USED") && listed.contains("  never"), "{listed}");

    let json = stdout(&run(&on(&["list", "--format", "json"])).await);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json[0]["id"], &json[0]["expired"]), (&id.clone().into(), &false.into()));

    let mut revoke = on(&["revoke"]);
    revoke.push(&id);
    ended(&run(&revoke).await, 0, "", &[]);
    assert!(stdout(&run(&on(&["list"])).await).contains("  revoked  dev "));
    let unknown = run(&on(&["revoke", "nobody"])).await;
    ended(&unknown, 1, "", &["there is no such token"]);
}

#[tokio::test]
async fn a_data_directory_that_was_mistyped_is_told_and_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let typo = dir.path().join("dta/kiln");
    let create = ["create", "--tenant", "dev", "--role", "admin"];
    for command in [&["list"][..], &["revoke", "t1"], &create] {
        let args = [&["token", "--data-dir", text(&typo)], command].concat();
        let at = dir.path().join("dta");
        ended(&run(&args).await, 1, "", &["kiln: there is no ", text(&at), "--data-dir"]);
        assert!(!at.exists());
    }
    // A directory without a database is not one of a server either, unless a token is made there.
    for command in [&["list"][..], &["revoke", "t1"]] {
        let args = [&["token", "--data-dir", text(dir.path())], command].concat();
        ended(&run(&args).await, 1, "", &["there is no Kiln database ", "kiln.db"]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
    // A token may come before the first `kiln serve`, which makes its directory too.
    let new = dir.path().join("new");
    let made = run(&[&["token", "--data-dir", text(&new)], &create[..]].concat()).await;
    assert!(stdout(&made).starts_with("kiln_"), "{}", stderr(&made));
    assert!(new.join("kiln.db").exists());
}

#[tokio::test]
async fn bad_input_is_usage_without_a_server_too() {
    let dir = tempfile::tempdir().unwrap();
    let data = ["token", "--data-dir", text(dir.path()), "create", "--tenant", "dev"];
    for bad in [
        &["--role", "root"][..],
        &["--role", "admin", "--ttl", "20000d"],
        &["--role", "admin", "--name", ""],
        &["--role", "admin", "--name", "a\nb"],
    ] {
        let output = run(&[&data[..], bad].concat()).await;
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[tokio::test]
async fn settings_that_cannot_be_are_usage() {
    let dir = tempfile::tempdir().unwrap();
    let data = text(dir.path());
    let wrong = dir.path().join("wrong.toml");
    std::fs::write(&wrong, "listne = 1\n").unwrap();
    let cases: [(&[&str], &str); 9] = [
        (&["--max-vms", "0"], "--max-vms is 0; it must be a number from 1 to 1024"),
        (&["--max-vms", "x"], "--max-vms"),
        (&["--accel", "tcg", "--require-isolation"], "--require-isolation"),
        (&["--config", "/none/such"], "--config /none/such"),
        (&["--config", text(&wrong)], "listne"),
        (&["--registry", "http://h/Path"], "--registry"),
        (&["--qemu", "/none/such"], "--qemu"),
        (&["--builder", "/none/such"], "--builder"),
        (&["--notify-fd", "1"], "--notify-fd is 1"),
    ];
    for (args, said) in cases {
        let output = run(&[&["serve", "--data-dir", data, "--run-dir", data], args].concat()).await;
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(said), "{args:?}: {}", stderr(&output));
    }
    let mut by_variable = kiln_at(NOWHERE, &["serve", "--data-dir", data, "--run-dir", data]);
    by_variable.env("KILN_MAX_CPUS", "256");
    ended(&output(by_variable).await, 2, "", &["--max-cpus is 256"]);
}

#[tokio::test]
async fn a_server_that_cannot_start_for_another_reason_is_no_usage() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let args = ["serve", "--data-dir", text(&file), "--run-dir", text(dir.path())];
    ended(&run(&args).await, 1, "", &["cannot make the data directory"]);
}

#[tokio::test]
async fn help_shows_what_a_command_takes_and_no_more() {
    let help = async |args: &[&str]| {
        let output = run(args).await;
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        stdout(&output)
    };
    let serve = help(&["serve", "--help"]).await;
    assert!(serve.contains("--listen") && serve.contains("--help"), "{serve}");
    assert!(!serve.contains("--url") && !serve.contains("--token"), "{serve}");
    let ls = help(&["ls", "--help"]).await;
    assert!(ls.contains("--url") && ls.contains("--token"), "{ls}");
    assert!(!help(&["--help"]).await.contains("sweep"));
    let bare = run(&[]).await;
    ended(&bare, 2, "", &["Usage: kiln", "serve"]);
    assert!(!stderr(&bare).contains("sweep"), "{}", stderr(&bare));
    let mut bare = kiln_at(NOWHERE, &[]);
    bare.env_remove("KILN_URL");
    let bare = output(bare).await;
    ended(&bare, 2, "", &["Usage: kiln", "serve"]);
    assert!(!stderr(&bare).contains("sweep"), "{}", stderr(&bare));
    let create = help(&["token", "create", "--help"]).await;
    assert!(create.contains("--ttl <TIME>") && create.contains("minutes (m)"), "{create}");
}

#[tokio::test]
async fn a_full_stderr_is_no_panic() {
    let mut command = kiln_at(NOWHERE, &["serve", "--max-vms", "0"]);
    command.stderr(std::fs::File::options().write(true).open("/dev/full").unwrap());
    assert_eq!(output(command).await.status.code(), Some(2));
}
