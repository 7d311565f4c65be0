//! `ls`, `show`, `logs`, `cancel`, `token`.

use axum::http::StatusCode;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::server::{Delete, Ending, Script, Server, problem, sse};
use super::*;

#[tokio::test]
async fn ls_turns_pages_up_to_its_limit() {
    let server = Server::start(Script::default()).await;
    for (limit, count) in [("3", 3), ("200", 200), ("201", 201), ("1000", 250)] {
        let args = ["ls", "--limit", limit, "--format", "json", "--status", "failed"];
        let output = output(kiln(&server, &args)).await;
        ended(&output, 0, &stdout(&output), &[]);
        let builds: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(builds.len(), count);
        assert_eq!(builds[count - 1], json!({"id": format!("b{}", count - 1), "status": "failed"}));
    }
    let output = output(kiln(&server, &["ls", "--limit", "1"])).await;
    ended(&output, 0, "ID  STATUS  CREATED  TOOK  IMAGE\nb0  ready\n", &[]);
}

#[tokio::test]
async fn show_gives_the_apis_build_or_a_text() {
    let server = Server::start(Script { build: ready(), ..Script::default() }).await;
    let json = output(kiln(&server, &["show", "b1", "--format", "json"])).await;
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&json.stdout).unwrap(), ready());
    let text = output(kiln(&server, &["show", "b1"])).await;
    assert!(stdout(&text).contains(&format!("image     {REFERENCE}\n")));
    for id in ["b2", "..", "../../etc"] {
        ended(
            &output(kiln(&server, &["show", id])).await,
            1,
            "",
            &["kiln: there is no build of that id"],
        );
    }
}

#[tokio::test]
async fn cancel_tells_a_conflict() {
    let server = Server::start(Script::default()).await;
    ended(&output(kiln(&server, &["cancel", "b1"])).await, 0, "", &[]);
    assert_eq!(server.script().deleted, ["b1"]);
    let refusal = problem(StatusCode::CONFLICT, "the build is already ready");
    server.script().refuse_delete = Delete::Refuse(refusal);
    ended(
        &output(kiln(&server, &["cancel", "b1"])).await,
        1,
        "",
        &["kiln: the build is already ready"],
    );
}

#[tokio::test]
async fn logs_to_a_pipe_are_the_very_bytes() {
    let events = [
        status("building"),
        json!({"type": "log", "content": "a\u{fffd}\u{1b}", "content_b64": "Yf8b", "stream": "stdout"}),
        json!({"type": "log", "content": "par", "stream": "stderr", "partial": true}),
        json!({"type": "log", "content": "t", "stream": "stderr"}),
        json!({"type": "log", "content": "open", "stream": "stderr", "partial": true}),
    ];
    let streams = [(sse(1, &events), None)].into();
    let server = Server::start(Script { streams, ..Script::default() }).await;
    let output = output(kiln(&server, &["logs", "b1"])).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(output.stdout, b"a\xff\x1b\npart\nopen\n");
    assert!(stderr(&output).contains("kiln | building"));
    assert_eq!(server.script().connections, [(None, "false".to_owned())]);
}

#[tokio::test]
async fn logs_that_follow_come_as_they_are_printed_and_end_with_the_build() {
    let first = (sse(1, &[log("one")]), Some(Ending::Abort));
    let last = (sse(2, &[log("two"), status("failed")]), Some(Ending::Hang));
    let server = Server::start(Script { streams: [first, last].into(), ..Script::default() }).await;
    let output = output(kiln(&server, &["logs", "-f", "b1"])).await;
    ended(&output, 0, "one\ntwo\n", &["connecting again"]);
}

#[tokio::test]
async fn logs_tell_what_is_not_kept_any_more() {
    let gone = |from: u64, to: u64| json!({"type": "trimmed", "from": from, "to": to});
    let streams = [
        "id: 1\nevent: log\ndata: {\"type\":\"log\",\"content\":\"half\",\"stream\":\"stdout\",\"partial\":true}\n\n"
            .to_owned(),
        format!("id: 1235\nevent: trimmed\ndata: {}\n\n", gone(2, 1235)),
        sse(1236, &[log("last"), status("failed")]),
    ];
    let streams = [(streams.concat(), None)].into();
    let server = Server::start(Script { streams, ..Script::default() }).await;
    let output = output(kiln(&server, &["logs", "b1"])).await;
    let said = ["kiln | 1,234 events were removed by the server's retention\nkiln | failed\n"];
    ended(&output, 0, "half\nlast\n", &said);
}

#[tokio::test]
async fn a_trimmed_range_is_gone_on_after() {
    let gone = json!({"type": "trimmed", "from": 1, "to": 8});
    let first = format!("retry: 100\nid: 8\nevent: trimmed\ndata: {gone}\n\n");
    let again = first.clone() + &sse(9, &[log("one"), status("ready")]);
    let streams = [(first, Some(Ending::Abort)), (again, Some(Ending::Close))].into();
    let server = Server::start(Script { streams, ..Script::default() }).await;
    let output = output(kiln(&server, &["logs", "-f", "b1"])).await;
    ended(&output, 0, "one\n", &["8 events were removed"]);
    assert_eq!(stderr(&output).matches("removed").count(), 1, "{}", stderr(&output));
    assert_eq!(server.script().connections[1].0.as_deref(), Some("8"));
}

#[tokio::test]
async fn gc_says_what_was_removed_or_why_nothing_was() {
    let server = Server::start(Script::default()).await;
    let text = "removed 1,234 log lines (2.0 KiB), 1 build\n";
    ended(&output(kiln(&server, &["gc"])).await, 0, text, &[]);
    let json = output(kiln(&server, &["gc", "--format", "json"])).await;
    let answer: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&answer["log_events_removed"], &answer["x"]), (&json!(1234), &json!(1)));
    server.script().refuse_post = Some(problem(StatusCode::FORBIDDEN, "only an administrator may"));
    ended(&output(kiln(&server, &["gc"])).await, 3, "", &["kiln: only an administrator may"]);
}

#[tokio::test]
async fn logs_of_nothing_are_not_found() {
    let server = Server::start(Script::default()).await;
    ended(&output(kiln(&server, &["logs", "b2"])).await, 1, "", &["kiln: "]);
}

#[tokio::test]
async fn a_reader_that_goes_away_is_no_error() {
    let lines: Vec<_> = (0..20_000).map(|n| log(&format!("line {n}"))).collect();
    let server = Server::start(script(&lines, ready())).await;
    let mut child = kiln(&server, &["logs", "-f", "b1"]).spawn().unwrap();
    let mut head = [0; 6];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut head).await.unwrap();
    drop(stdout);
    let output = child.wait_with_output().await.unwrap();
    ended(&output, 0, "", &[]);
    assert!(!stderr(&output).contains("kiln:"), "{}", stderr(&output));
}

#[tokio::test]
async fn tokens_are_made_listed_and_revoked() {
    let server = Server::start(Script::default()).await;
    let create =
        ["token", "create", "--tenant", "dev", "--role", "reader", "--ttl", "30m", "--name", "n"];
    ended(&output(kiln(&server, &create)).await, 0, "kiln_dev\n", &[]);
    let list = output(kiln(&server, &["token", "list"])).await;
    assert!(stdout(&list).contains("t1  valid  dev     admin  ci\\x1b[2J"), "{}", stdout(&list));
    let json = output(kiln(&server, &["token", "list", "--format", "json"])).await;
    let listed: Value = serde_json::from_str(&stdout(&json)).unwrap();
    assert_eq!(listed[0]["name"], "ci\u{1b}[2J");
    assert!(!stdout(&json).contains('\u{1b}'), "{}", stdout(&json));
    ended(&output(kiln(&server, &["token", "revoke", "t1"])).await, 0, "", &[]);
    ended(&output(kiln(&server, &["token", "revoke", "t9"])).await, 1, "", &["kiln: "]);
}

#[tokio::test]
async fn a_token_is_sent_nowhere_else_and_shown_never() {
    let server = Server::start(Script::default()).await;
    let mut help = kiln(&server, &["ls", "--help"]);
    help.env("KILN_TOKEN", "kiln_hidden");
    assert!(!stdout(&output(help).await).contains("kiln_hidden"));
    let elsewhere = Server::start(Script::default()).await;
    let location = axum::http::HeaderValue::from_str(&elsewhere.url).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let redirect = axum::Router::new().fallback(move || {
        std::future::ready((StatusCode::FOUND, [("location", location.clone())]))
    });
    tokio::spawn(async move { axum::serve(listener, redirect).await.unwrap() });
    ended(&output(kiln_at(&url, &["ls", "--token", "kiln_x"])).await, 3, "", &["redirects"]);
    assert_eq!(elsewhere.script().authorization, None);
}

#[tokio::test]
async fn a_web_server_that_is_not_kiln_is_not_taken_for_one() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let page = (StatusCode::NOT_FOUND, [("content-type", "text/html")], "<h1>Not found</h1>");
    let nothing = axum::Router::new().fallback(move || std::future::ready(page));
    tokio::spawn(async move { axum::serve(listener, nothing).await.unwrap() });
    for args in [
        &["ls"][..],
        &["show", "b1"],
        &["logs", "b1"],
        &["logs", "-f", "b1"],
        &["cancel", "b1"],
        &["token", "revoke", "t1"],
    ] {
        let said = ["does not answer like a Kiln server: it answers 404 Not Found", "KILN_URL"];
        ended(&output(kiln_at(&url, args)).await, 3, "", &said);
    }
}

#[tokio::test]
async fn a_page_for_every_path_is_no_log() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let pages = axum::Router::new().fallback(|| async { axum::response::Html("<h1>Hello</h1>") });
    tokio::spawn(async move { axum::serve(listener, pages).await.unwrap() });
    for args in [&["logs", "b1"][..], &["ls"], &["show", "b1"]] {
        ended(&output(kiln_at(&url, args)).await, 3, "", &["does not answer like a Kiln server"]);
    }
}
