//! `instances ls`, `instances logs`, `instances rm`, and what `run` says at its end.

use axum::http::StatusCode;
use serde_json::json;
use tokio::io::AsyncReadExt;

use super::server::{Delete, Ending, Script, Server, problem, sse};
use super::*;

fn line(stream: &str, content: &str) -> Value {
    json!({"type": "log", "stream": stream, "content": content})
}

fn state(state: &str, exit_code: Option<u8>, message: Option<&str>) -> Value {
    json!({"type": "status", "status": state, "exit_code": exit_code, "exit_message": message})
}

async fn server(events: &[Value]) -> Server {
    let streams = [(sse(1, events), None)].into();
    Server::start(Script { streams, ..Script::default() }).await
}

#[tokio::test]
async fn instances_are_listed_as_a_table_or_as_the_api_has_them() {
    let server = server(&[]).await;
    let table = output(kiln(&server, &["instances", "ls"])).await;
    let expected = "ID  NAME  STATE    CREATED  EXIT  IMAGE\n\
                    i2  web   Running                 app\\x1b[2J\n\
                    i1  db    Stopped           3     db\n";
    ended(&table, 0, expected, &[]);
    let args = ["instances", "ls", "--state", "Stopped", "--format", "json"];
    let json = output(kiln(&server, &args)).await;
    let found: Value = serde_json::from_slice(&json.stdout).unwrap();
    let only = json!({"id": "i1", "name": "db", "state": "Stopped", "exit_code": 3, "image": "db"});
    assert_eq!((json.status.code(), found), (Some(0), json!([only])));
}

#[tokio::test]
async fn a_log_is_what_there_is_and_each_stream_goes_to_its_own() {
    let exact =
        json!({"type": "log", "stream": "stdout", "content": "\u{fffd}", "content_b64": "/w=="});
    let events = [exact, line("stderr", "e"), line("stdout", "o"), state("Running", None, None)];
    let server = server(&events).await;
    let output = output(kiln(&server, &["instances", "logs", "i1"])).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!((output.stdout.as_slice(), stderr(&output).as_str()), (&b"\xff\no\n"[..], "e\n"));
    assert_eq!(server.script().connections, [(None, "false".to_owned())]);
}

#[tokio::test]
async fn a_log_that_is_cut_short_is_not_taken_for_all_of_it() {
    let streams = [(sse(1, &[line("stdout", "one")]), Some(Ending::Close))].into();
    let server = Server::start(Script { streams, ..Script::default() }).await;
    let output = output(kiln(&server, &["instances", "logs", "i1"])).await;
    ended(&output, 3, "one\n", &["kiln: the log of instance i1 came in part"]);
}

#[tokio::test]
async fn a_log_that_is_followed_goes_on_after_a_break_and_ends_with_the_instance() {
    let first = (sse(1, &[line("stdout", "one")]), Some(Ending::Abort));
    let rest = [line("stdout", "two"), state("Stopped", Some(7), None)];
    let last = (sse(2, &rest), Some(Ending::Hang));
    let server = Server::start(Script { streams: [first, last].into(), ..Script::default() }).await;
    // However the instance ended.
    ended(&output(kiln(&server, &["instances", "logs", "-f", "i1"])).await, 0, "one\ntwo\n", &[]);
    let asked = [(None, "true".to_owned()), (Some("1".to_owned()), "true".to_owned())];
    assert_eq!(server.script().connections, asked);
    assert!(server.script().deleted.is_empty());
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_a_log_and_nothing_else() {
    let lines: Vec<_> = (0..20_000).map(|n| line("stdout", &format!("line {n}"))).collect();
    let streams = [(sse(1, &lines), Some(Ending::Hang))].into();
    let server = Server::start(Script { streams, ..Script::default() }).await;
    let mut child = kiln(&server, &["instances", "logs", "-f", "i1"]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 6]).await.unwrap();
    drop(stdout);
    let output = child.wait_with_output().await.unwrap();
    ended(&output, 0, "", &[]);
    assert!(stderr(&output).is_empty() && server.script().deleted.is_empty());
}

#[tokio::test]
async fn an_instance_is_deleted_and_what_hinders_it_is_told() {
    let server = server(&[]).await;
    ended(&output(kiln(&server, &["instances", "rm", "i1"])).await, 0, "", &[]);
    assert_eq!(server.script().deleted, ["i1"]);
    for verb in ["rm", "logs"] {
        // Its log would be asked for with a script that has none.
        server.script().streams.clear();
        let unknown = output(kiln(&server, &["instances", verb, "i9"])).await;
        ended(&unknown, 1, "", &["kiln: there is no such thing"]);
    }
    let refusal = problem(StatusCode::SERVICE_UNAVAILABLE, "i1 is being stopped");
    server.script().refuse_delete = Delete::Refuse(refusal);
    let output = output(kiln(&server, &["instances", "rm", "i1"])).await;
    ended(&output, 3, "", &["kiln: i1 is being stopped", "kiln instances rm i1"]);
}

#[tokio::test]
async fn what_is_not_asked_for_rightly_is_usage() {
    for args in [
        &["instances"][..],
        &["instances", "logs"],
        &["instances", "rm"],
        &["instances", "rm", ""],
        &["instances", "ls", "--state", "running"],
        &["instances", "ls", "--format", "yaml"],
    ] {
        let output = output(kiln_at("http://127.0.0.1:1", args)).await;
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
    }
    for args in [&["instances", "ls"][..], &["instances", "rm", "i1"], &["instances", "logs", "i1"]]
    {
        let nobody = output(kiln_at("http://127.0.0.1:1", args)).await;
        ended(&nobody, 3, "", &["is `kiln serve` running"]);
    }
}

#[tokio::test]
async fn run_says_why_an_instance_ended_though_it_cannot_be_deleted() {
    let server = server(&[state("Stopped", Some(143), Some("the server stopped"))]).await;
    let refusal = problem(StatusCode::SERVICE_UNAVAILABLE, "the server is being stopped");
    server.script().refuse_delete = Delete::Refuse(refusal);
    let removed = output(kiln(&server, &["run", "--rm", "app"])).await;
    ended(&removed, 125, "", &["kiln: the server stopped\n", "is not deleted"]);
    let kept = output(kiln(&server, &["run", "app"])).await;
    ended(&kept, 143, "", &["kiln: the server stopped\n", "kiln instances rm i1"]);
}

#[tokio::test]
async fn help_says_that_standard_input_is_not_forwarded() {
    let help = output(kiln_at("http://127.0.0.1:1", &["run", "--help"])).await;
    assert!(stdout(&help).contains("Standard input is not forwarded"), "{}", stdout(&help));
    let help = output(kiln_at("http://127.0.0.1:1", &["instances", "--help"])).await;
    for verb in ["ls", "logs", "rm"] {
        assert!(stdout(&help).contains(&format!("  {verb} ")), "{}", stdout(&help));
    }
}
