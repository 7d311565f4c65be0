//! `kiln build`: results, exit codes, connections that break.

use axum::http::StatusCode;
use serde_json::json;

use super::server::{Ending, Script, Server, problem, sse};
use super::*;

#[tokio::test]
async fn a_build_prints_its_reference_and_nothing_else_to_stdout() {
    let step = |state: &str, code: Option<i32>| json!({"type": "step", "index": 1, "name": "make", "state": state, "exit_code": code, "duration_ms": 1200});
    let events = [
        status("building"),
        step("started", None),
        json!({"type": "log", "content": "hel", "stream": "stdout", "step": 1, "partial": true}),
        log("lo"),
        step("done", Some(0)),
        json!({"type": "heartbeat"}),
    ];
    let server = Server::start(script(&events, ready())).await;
    let dir = source();
    let iid = dir.path().join("iid");
    let mut command = kiln(&server, &["build", text(dir.path()), "--iidfile", text(&iid)]);
    command.env("FROM_ENV", "yes");
    command.args(["--target", "t", "--build-arg", "A=1=2", "--build-arg", "FROM_ENV"]);
    command.args(["--build-arg", "NOT_IN_THE_ENVIRONMENT", "-t", "team/app:v1", "--tag", "k=v"]);
    command.args(["--network", "allowlist", "--allow", "*.example.com", "--allow", "h:8080"]);
    command.args(["--timeout", "60", "--memory", "512", "--cpus", "1", "--disk", "5"]);
    let output = output(command).await;
    let lines =
        ["kiln | building\n", "#1 make\n", "#1 | hello\n", "#1 done in 1.2s\n", "build b1\n"];
    ended(&output, 0, &format!("{REFERENCE}\n"), &lines);
    assert_eq!(std::fs::read_to_string(iid).unwrap(), "sha256:0011");

    let script = server.script();
    assert_eq!(script.authorization.as_deref(), Some("Bearer kiln_test"));
    let parts: Vec<_> = script
        .parts
        .iter()
        .filter(|(name, _)| *name != "source")
        .map(|(name, value)| (name.as_str(), std::str::from_utf8(value).unwrap()))
        .collect();
    let expected = [
        ("allowed_domains", r#"["*.example.com","h:8080"]"#),
        ("build_args", r#"{"A":"1=2","FROM_ENV":"yes"}"#),
        ("cpus", "1"),
        ("disk_gb", "5"),
        ("image_name", "team/app:v1"),
        ("memory_mb", "512"),
        ("network_mode", "allowlist"),
        ("tags", r#"{"k":"v"}"#),
        ("target", "t"),
        ("timeout_seconds", "60"),
    ];
    assert_eq!(parts, expected);
}

#[tokio::test]
async fn an_iidfile_that_cannot_be_opened_ends_it_before_anything_is_sent() {
    let server = Server::start(script(&[], ready())).await;
    let dir = source();
    let iid = dir.path().join("none/iid");
    let output = output(kiln(&server, &["build", text(dir.path()), "--iidfile", text(&iid)])).await;
    ended(&output, 2, "", &["--iidfile ", "none/iid cannot be written: "]);
    assert!(server.script().parts.is_empty());
}

#[tokio::test]
async fn an_iidfile_that_cannot_be_written_does_not_hide_the_reference() {
    let server = Server::start(script(&[], ready())).await;
    let dir = source();
    let args = ["build", text(dir.path()), "--iidfile", "/dev/full"];
    let said = ["the image is there, but --iidfile /dev/full cannot be written: "];
    ended(&output(kiln(&server, &args)).await, 1, &format!("{REFERENCE}\n"), &said);
}

#[tokio::test]
async fn a_failed_build_leaves_no_digest_of_an_earlier_one() {
    let server = Server::start(script(&[], failed("step_failed", "no"))).await;
    let dir = source();
    let iid = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(iid.path(), "sha256:old").unwrap();
    let args = ["build", text(dir.path()), "--iidfile", text(iid.path())];
    ended(&output(kiln(&server, &args)).await, 1, "", &[]);
    assert!(!iid.path().exists());
}

#[tokio::test]
async fn only_what_was_given_is_sent() {
    let server = Server::start(script(&[], ready())).await;
    let dir = source();
    let output = output(kiln(&server, &["build", text(dir.path()), "--detach"])).await;
    ended(&output, 0, "b1\n", &[]);
    assert_eq!(server.script().parts.keys().collect::<Vec<_>>(), ["source"]);
    assert!(server.script().connections.is_empty(), "it does not wait");
}

#[tokio::test]
async fn a_failed_build_names_step_code_and_the_way_on() {
    let mut build = failed("step_failed", "step 3 (make test) exited with code 7");
    build["failure"]["step"] = json!(3);
    build["failure"]["exit_code"] = json!(7);
    build["failure"]["detail"] = json!("last\nwords\u{1b}[2J");
    let server = Server::start(script(&[], build)).await;
    let dir = source();
    let output = output(kiln(&server, &["build", text(dir.path())])).await;
    let said = [
        "kiln: build b1 failed: step 3 (make test) exited with code 7\n",
        "    last\n    words\\x1b[2J\n",
        "kiln logs b1\n",
    ];
    ended(&output, 1, "", &said);
}

#[tokio::test]
async fn the_exit_code_tells_how_a_build_ended() {
    let cancelled = json!({"id": "b1", "status": "cancelled"});
    let cases = [
        (failed("pull_failed", "no such image"), 1, "no such image"),
        (failed("timed_out", "the time is over"), 4, "the time is over"),
        (cancelled, 4, "was cancelled"),
    ];
    let dir = source();
    for (build, code, said) in cases {
        let server = Server::start(script(&[], build)).await;
        let output = output(kiln(&server, &["build", text(dir.path())])).await;
        ended(&output, code, "", &[said]);
    }
}

#[tokio::test]
async fn a_refused_build_says_why_in_one_line() {
    let cases = [
        (StatusCode::UNAUTHORIZED, 3),
        (StatusCode::FORBIDDEN, 3),
        (StatusCode::UNPROCESSABLE_ENTITY, 2),
        (StatusCode::BAD_REQUEST, 2),
        (StatusCode::CONFLICT, 1),
        (StatusCode::PAYLOAD_TOO_LARGE, 1),
        (StatusCode::SERVICE_UNAVAILABLE, 3),
    ];
    let dir = source();
    for (status, code) in cases {
        let refuse_post = Some(problem(status, "because\nof \u{1b}this"));
        let server = Server::start(Script { refuse_post, ..Script::default() }).await;
        let output = output(kiln(&server, &["build", text(dir.path())])).await;
        ended(&output, code, "", &["kiln: because\\nof \\x1bthis\n"]);
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_from_a_failure() {
    // A port that was free a moment ago, held but not listened on.
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", held.local_addr().unwrap());
    drop(held);
    let dir = source();
    let commands = [
        &["build", text(dir.path())][..],
        &["ls"],
        &["show", "b1"],
        &["logs", "b1"],
        &["logs", "-f", "b1"],
        &["cancel", "b1"],
    ];
    for args in commands {
        let output = output(kiln_at(&url, args)).await;
        ended(&output, 3, "", &["kiln: cannot reach http://127.0.0.1:", "kiln serve"]);
    }
}

#[tokio::test]
async fn a_broken_connection_is_made_again_after_the_last_event() {
    let first = sse(1, &[status("building"), log("one")]) + "id: 3\ndata: {\"type\":\"lo";
    let streams = [
        (first, Some(Ending::Abort)),
        (sse(3, &[log("two")]), Some(Ending::Close)),
        (sse(3, &[log("two")]), Some(Ending::Abort)),
        (sse(4, &[log("three"), status("ready")]), Some(Ending::Hang)),
    ];
    let server =
        Server::start(Script { streams: streams.into(), build: ready(), ..Script::default() })
            .await;
    let dir = source();
    let output = output(kiln(&server, &["build", text(dir.path())])).await;
    ended(&output, 0, &format!("{REFERENCE}\n"), &["connecting again"]);
    let said = stderr(&output);
    let logs: Vec<_> = said.lines().filter(|line| line.starts_with("#1 | ")).collect();
    assert_eq!(logs, ["#1 | one", "#1 | two", "#1 | three"], "none twice, none missing");
    let follow = || "true".to_owned();
    let last = |id: &str| (Some(id.to_owned()), follow());
    let expected = [(None, follow()), last("2"), last("3"), last("3")];
    assert_eq!(server.script().connections, expected);
}

#[tokio::test]
async fn patience_with_a_lost_server_ends_and_says_how_to_go_on() {
    let streams = [(sse(1, &[status("building")]), Some(Ending::Abort))].into();
    let server = Server::start(Script { streams, build: ready(), ..Script::default() }).await;
    let dir = source();
    let mut command = kiln(&server, &["build", text(dir.path())]);
    command.env("KILN_PATIENCE", "1");
    let output = output(command).await;
    ended(&output, 3, "", &["lost the server while following build b1", "kiln logs -f b1"]);
    assert!(server.script().connections.len() > 1);
}

#[tokio::test]
async fn a_build_that_wants_more_names_the_flag() {
    let message = "step 1 ran out of memory: RUN make: ask for more with memory_mb";
    let failure = json!({"type": "failure", "kind": "out_of_memory", "message": message});
    let server = Server::start(script(&[failure], failed("out_of_memory", message))).await;
    let dir = source();
    let output = output(kiln(&server, &["build", text(dir.path())])).await;
    let said = [
        "kiln | failed (out_of_memory): step 1 ran out of memory: RUN make: ask for more with --memory\n",
        "kiln: build b1 failed: step 1 ran out of memory: RUN make: ask for more with --memory\n",
    ];
    ended(&output, 1, "", &said);
}

#[tokio::test]
async fn json_progress_is_one_object_a_line() {
    let events = [status("building"), log("a\u{1b}[2J\u{9b}\u{202e}")];
    let server = Server::start(script(&events, ready())).await;
    let dir = source();
    let output = output(kiln(&server, &["build", text(dir.path()), "--progress", "json"])).await;
    ended(&output, 0, &format!("{REFERENCE}\n"), &[]);
    let said = stderr(&output);
    assert!(!said.contains(['\u{1b}', '\u{9b}', '\u{202e}']), "{said}");
    let lines: Vec<serde_json::Value> =
        said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (notes, of_the_server): (Vec<_>, Vec<_>) =
        lines.into_iter().partition(|line| line["type"] == "note");
    assert_eq!(of_the_server, [events[0].clone(), events[1].clone(), status("ready")]);
    let notes: Vec<_> = notes.iter().map(|note| note["message"].as_str().unwrap()).collect();
    assert!(
        matches!(notes[..], [sent, "build b1"] if sent.starts_with("source sent: ")),
        "{notes:?}"
    );
}

#[tokio::test]
async fn json_progress_ends_with_an_error_as_json_whatever_is_wrong() {
    let dir = source();
    let refuse_post = Some(problem(StatusCode::UNPROCESSABLE_ENTITY, "cpus is \"99\"\n\u{1b}"));
    let refusing = Server::start(Script { refuse_post, ..Script::default() }).await;
    let mut build = failed("step_failed", "the command failed");
    build["failure"]["detail"] = json!("one\ntwo");
    let failing = Server::start(script(&[status("building")], build)).await;
    let cases: [(&Server, &[&str], i32, &str); 5] = [
        (&refusing, &[], 2, "--cpus is \"99\"\n\u{1b}"),
        (&failing, &[], 1, "build b1 failed: the command failed"),
        (&failing, &["--iidfile", "/none/such"], 2, "--iidfile /none/such cannot be written"),
        (&failing, &["--nothing"], 2, "unexpected argument '--nothing' found"),
        (&failing, &["--url", "ftp://x"], 2, "ftp://x"),
    ];
    for (server, args, code, said) in cases {
        let args = [&["build", text(dir.path()), "--progress", "json"], args].concat();
        let output = output(kiln(server, &args)).await;
        ended(&output, code, "", &[]);
        let lines: Vec<serde_json::Value> = stderr(&output)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{args:?}: {line}")))
            .collect();
        let last = lines.last().unwrap();
        assert_eq!((&last["type"], &last["exit_code"]), (&json!("error"), &json!(code)), "{last}");
        assert!(last["message"].as_str().unwrap().contains(said), "{last}");
        let errors = lines.iter().filter(|line| line["type"] == "error").count();
        assert_eq!(errors, 1, "{lines:?}");
    }
}

#[tokio::test]
async fn a_command_line_that_makes_no_sense_is_usage() {
    let server = Server::start(Script::default()).await;
    let cases: [&[&str]; 16] = [
        &[],
        &["nothing"],
        &["build", "--nothing"],
        &["build", "-t", "localhost:5000/app"],
        &["build", "-t", "App"],
        &["build", "--build-arg", "=x"],
        &["build", "--tag", "novalue"],
        &["build", "--network", "wide"],
        &["build", "--timeout", "0"],
        &["build", "--detach", "--iidfile", "x"],
        &["ls", "--status", "odd"],
        &["ls", "--limit", "0"],
        &["show"],
        &["show", ""],
        &["token", "create", "--tenant", "builds", "--role", "admin"],
        &["ls", "--url", "ftp://x"],
    ];
    for args in cases {
        let output = output(kiln(&server, args)).await;
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}
