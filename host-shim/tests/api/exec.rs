//! Sessions over real WebSockets, with agents that are real peers.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use kiln::build::BuildId;
use kiln::exec::Opened;
use kiln::instances::{Change, InstanceId};
use kiln::store::sqlite::SqliteStore;
use kiln::store::{Role, SessionFilter, Store};
use kiln_protocol::exec::{Cause, HostToSession, Place, Stream, Terminal};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{self, Message, client::IntoClientRequest};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use tokio_util::sync::CancellationToken;

use crate::agent::Vm;
use crate::support::{Client, Pull, Server, form, id_of, refusal, server};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// A build that runs, and can be entered.
struct Running {
    vm: Vm,
    id: BuildId,
    opened: Opened,
}

async fn running(server: &Server, client: &Client<'_>) -> Running {
    let build = client.submit(form()).await;
    server.scheduler.claim().await;
    let (vm, id) = (Vm::new(), id_of(&build));
    let opened = server.scheduler.door(&id).open(vm.entrance());
    Running { vm, id, opened }
}

async fn connect(client: &Client<'_>, path: &str) -> Result<Socket, tungstenite::Error> {
    let url = client.url(path).replace("http://", "ws://");
    let mut request = url.into_client_request().unwrap();
    if let Some(value) = client.authorization() {
        request.headers_mut().insert("authorization", value.parse().unwrap());
    }
    tokio_tungstenite::connect_async(request).await.map(|(socket, _)| socket)
}

/// Opens a session and says what it is.
async fn enter(client: &Client<'_>, path: &str, first: Value) -> Socket {
    let mut socket = connect(client, path).await.unwrap();
    socket.send(Message::text(first.to_string())).await.unwrap();
    socket
}

/// The next that is not a sign of life.
async fn next(socket: &mut Socket) -> Option<Message> {
    loop {
        match socket.next().await?.unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return Some(message),
        }
    }
}

/// All output, and the last text. The connection has to be closed in good order.
async fn to_the_end(socket: &mut Socket) -> (Vec<u8>, Value) {
    let mut output = vec![];
    loop {
        match next(socket).await.unwrap() {
            Message::Binary(bytes) => output.extend_from_slice(&bytes),
            Message::Text(text) => {
                assert!(matches!(next(socket).await, Some(Message::Close(Some(_)))));
                assert!(next(socket).await.is_none());
                return (output, serde_json::from_str(&text).unwrap());
            }
            other => panic!("{other:?}"),
        }
    }
}

fn exec(id: impl std::fmt::Display) -> String {
    format!("/builds/{id}/exec")
}

#[tokio::test]
async fn a_command_runs_in_a_running_build_and_is_in_the_audit_log() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    assert_eq!(client.json(&format!("/builds/{id}")).await["entered"], false);
    let first = json!({
        "command": ["sh", "-c", "x"], "env": { "TOKEN": "hunter2" }, "cwd": "/srv", "user": "app",
        "with_secrets": true,
    });
    let mut socket = enter(&client, &exec(&id), first).await;
    let (mut agent, asked) = vm.session().await;
    // Before the command is started it is in the log, and the build is marked.
    let listed = client.json(&format!("/sessions?build={id}")).await;
    assert_eq!(listed[0]["command"], json!(["sh", "-c", "x"]));
    assert!(listed[0].get("ended_at").is_none(), "{listed}");
    assert_eq!(client.json(&format!("/builds/{id}")).await["entered"], true);

    assert_eq!(asked.command, ["sh", "-c", "x"]);
    assert_eq!(asked.env, [("TOKEN".to_owned(), "hunter2".to_owned())]);
    assert_eq!((asked.directory.as_deref(), asked.user.as_deref()), (Some("/srv"), Some("app")));
    assert_eq!((asked.place, asked.terminal), (Place::Job { secrets: true }, None));
    agent.say(kiln_protocol::exec::SessionToHost::Started).await;
    agent.print(Stream::Out, b"out\xff").await;
    agent.print(Stream::Err, b"err\0").await;
    agent.exit(42).await;
    let (output, last) = to_the_end(&mut socket).await;
    assert_eq!(output, b"out\xfferr\0");
    assert_eq!(last, json!({ "exitCode": 42 }));
    agent.hung_up().await;

    let listed = client.json("/sessions").await;
    let session = &listed[0];
    assert_eq!((&session["how"], &session["exit_code"]), (&json!("exited"), &json!(42)));
    assert_eq!((&session["build"], &session["tenant"]), (&json!(id.as_str()), &json!("a")));
    assert_eq!((&session["by"]["role"], &session["by"]["tenant"]), (&json!("tenant"), &json!("a")));
    assert_eq!((&session["env"], &session["with_secrets"]), (&json!(["TOKEN"]), &json!(true)));
    assert!(session["ended_at"].is_string() && session.get("error").is_none());
    let stored = format!("{:?}", server.store.sessions(&all()).await.unwrap());
    assert!(!stored.contains("hunter2"), "{stored}");
}

fn all() -> SessionFilter {
    SessionFilter { limit: 200, ..SessionFilter::default() }
}

#[tokio::test]
async fn input_sizes_and_signals_arrive_and_streams_can_be_told_apart() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let first =
        json!({ "command": ["sh"], "tty": true, "rows": 50, "cols": 120, "multiplex": true });
    let mut socket = enter(&client, &exec(&id), first).await;
    let (mut agent, asked) = vm.started().await;
    assert_eq!(asked.terminal, Some(Terminal { rows: 50, cols: 120 }));
    let large = vec![7; 200_000];
    socket.send(Message::binary(&b""[..])).await.unwrap();
    socket.send(Message::binary(large.clone())).await.unwrap();
    let mut got = vec![];
    while got.len() < large.len() {
        got.extend(agent.input().await.unwrap());
    }
    assert_eq!(got, large);
    for (text, expected) in [
        (
            json!({ "resize": { "rows": 1, "cols": 2 } }),
            HostToSession::Resize(Terminal { rows: 1, cols: 2 }),
        ),
        (json!({ "signal": "SIGINT" }), HostToSession::Signal(2)),
        (json!({ "signal": 15 }), HostToSession::Signal(15)),
        (json!({ "stdin_closed": true }), HostToSession::InputEnd),
    ] {
        socket.send(Message::text(text.to_string())).await.unwrap();
        assert_eq!(agent.hear().await.unwrap(), expected);
    }
    agent.print(Stream::Out, b"o").await;
    agent.print(Stream::Err, b"e").await;
    agent.exit(0).await;
    assert_eq!(next(&mut socket).await, Some(Message::binary(&b"\x01o"[..])));
    assert_eq!(next(&mut socket).await, Some(Message::binary(&b"\x02e"[..])));
    assert_eq!(to_the_end(&mut socket).await.1, json!({ "exitCode": 0 }));
}

#[tokio::test]
async fn a_failure_of_kilns_has_a_code_and_words() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    for (cause, code) in [
        (Cause::NotFound, 127),
        (Cause::NotExecutable, 126),
        (Cause::NoStep, 125),
        (Cause::Invalid, 125),
        (Cause::Internal, 125),
    ] {
        let mut socket = enter(&client, &exec(&id), json!({ "command": ["x"] })).await;
        let (mut agent, _) = vm.session().await;
        agent.fail(cause, "why").await;
        let last = to_the_end(&mut socket).await.1;
        assert_eq!(last, json!({ "exitCode": code, "error": "why" }));
        let session = &client.json("/sessions?limit=1").await[0];
        assert_eq!((&session["how"], &session["error"]), (&json!("refused"), &json!("why")));
    }
    for first in ["", "{}", r#"{"command":[]}"#, r#"{"command":["a"],"shell":1}"#] {
        let mut socket = connect(&client, &exec(&id)).await.unwrap();
        socket.send(Message::text(first)).await.unwrap();
        let last = to_the_end(&mut socket).await.1;
        assert_eq!(last["exitCode"], 125, "{last}");
        assert!(!last["error"].as_str().unwrap().is_empty());
    }
    let mut socket = connect(&client, &exec(&id)).await.unwrap();
    socket.send(Message::binary(&b"ls"[..])).await.unwrap();
    assert_eq!(to_the_end(&mut socket).await.1["exitCode"], 125);
    assert_eq!(client.json("/sessions").await.as_array().unwrap().len(), 5);
}

#[tokio::test]
async fn who_may_not_is_refused_before_the_upgrade() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let path = exec(&id);
    let upgrade = |client: &Client<'_>, path: &str| {
        client
            .request(Method::GET, path)
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
    };
    let send = async |client: &Client<'_>, path: &str| upgrade(client, path).send().await.unwrap();
    refusal(send(&server.anonymous(), &path).await, 401, "unauthorized").await;
    let reader = server.client("a", Role::Reader).await;
    refusal(send(&reader, &path).await, 403, "forbidden").await;
    refusal(reader.get("/sessions").await, 403, "forbidden").await;
    let other = server.client("b", Role::Tenant).await;
    refusal(send(&other, &path).await, 404, "not_found").await;
    for unknown in [exec("nobody"), exec("A"), "/instances/nobody/exec".into()] {
        refusal(send(&client, &unknown).await, 404, "not_found").await;
    }
    let plain = client.get(&path).await;
    assert_eq!(plain.headers()["upgrade"], "websocket");
    refusal(plain, 426, "upgrade_required").await;
    let admin = server.client("ops", Role::Admin).await;
    let mut socket = enter(&admin, &path, json!({ "command": ["id"], "vm": true })).await;
    let (mut agent, asked) = vm.started().await;
    assert_eq!(asked.place, Place::Vm);
    agent.exit(0).await;
    to_the_end(&mut socket).await;
    // An administrator's session is in the tenant's log, and not in another's.
    let session = &client.json("/sessions").await[0];
    assert_eq!((&session["by"]["tenant"], &session["vm"]), (&json!("ops"), &json!(true)));
    assert_eq!(other.json("/sessions").await, json!([]));
    assert_eq!(other.json(&format!("/sessions?build={id}")).await, json!([]));

    // A tenant may not enter the VM itself; that is in the log, too.
    let mut socket = enter(&client, &path, json!({ "command": ["id"], "vm": true })).await;
    let last = to_the_end(&mut socket).await.1;
    assert_eq!(last["exitCode"], 125);
    assert!(last["error"].as_str().unwrap().contains("needs the role admin"), "{last}");
    let session = &client.json("/sessions").await[0];
    assert_eq!((&session["how"], &session["by"]["tenant"]), (&json!("refused"), &json!("a")));
}

#[tokio::test]
async fn what_does_not_run_cannot_be_entered_and_says_why() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let queued = client.submit(form()).await;
    let path = exec(queued["id"].as_str().unwrap());
    refusal(client.get(&path).await, 409, "not_started").await;
    let claimed = server.scheduler.claim().await;
    refusal(client.get(&path).await, 409, "not_open").await;
    let vm = Vm::new();
    let opened = server.scheduler.door(&claimed.build.id).open(vm.entrance());
    refusal(client.get(&path).await, 426, "upgrade_required").await;
    drop(opened);
    refusal(client.get(&path).await, 409, "not_open").await;
    server.scheduler.fail(&claimed).await;
    let problem = refusal(client.get(&path).await, 409, "finished").await;
    assert!(problem["message"].as_str().unwrap().contains("failed"), "{problem}");
    assert_eq!(client.json("/sessions").await, json!([]));
}

#[tokio::test]
async fn a_vm_that_was_not_reached_was_not_entered() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    drop(vm);
    let mut socket = enter(&client, &exec(&id), json!({ "command": ["id"] })).await;
    let last = to_the_end(&mut socket).await.1;
    assert_eq!(last["exitCode"], 125, "{last}");
    assert!(last["error"].as_str().unwrap().contains("cannot be entered"), "{last}");
    assert_eq!(client.json("/sessions").await[0]["how"], "refused");
    assert_eq!(client.json(&format!("/builds/{id}")).await["entered"], false);
}

#[tokio::test]
async fn an_instance_is_entered_likewise() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let body = json!({ "name": "web", "image": "app" });
    let created = client.request(Method::POST, "/instances").json(&body).send().await.unwrap();
    assert_eq!(created.status(), StatusCode::CREATED);
    let new: Value = created.json().await.unwrap();
    let id = InstanceId::parse(new["id"].as_str().unwrap()).unwrap();
    let path = format!("/instances/{id}/exec");
    refusal(client.get(&path).await, 409, "not_started").await;
    server.runner.pull("web", Pull::Change(Change::Initialize)).await;
    let vm = Vm::new();
    let (told, opened) = tokio::sync::oneshot::channel();
    server.runner.pull("web", Pull::Open(vm.entrance(), told)).await;
    opened.await.unwrap();
    let mut socket = enter(&client, &path, json!({ "command": ["cat"] })).await;
    let (mut agent, _) = vm.started().await;
    socket.send(Message::binary(&b"\0\xff"[..])).await.unwrap();
    socket.send(Message::text(r#"{"stdin_closed":true}"#)).await.unwrap();
    agent.cat().await;
    assert_eq!(to_the_end(&mut socket).await, (b"\0\xff".to_vec(), json!({ "exitCode": 0 })));
    let session = &client.json(&format!("/sessions?instance={id}")).await[0];
    assert_eq!((&session["instance"], &session["how"]), (&json!(id.as_str()), &json!("exited")));

    // Its end ends who is inside.
    let mut socket = enter(&client, &path, json!({ "command": ["sleep"] })).await;
    let (mut agent, _) = vm.started().await;
    let deleted = client.delete(&format!("/instances/{id}")).await;
    assert_eq!(deleted.status(), StatusCode::NO_CONTENT);
    let last = to_the_end(&mut socket).await.1;
    assert_eq!(last["exitCode"], 125, "{last}");
    agent.hung_up().await;
    // The log outlives it.
    let session = &client.json(&format!("/sessions?instance={id}")).await[0];
    assert_eq!(session["how"], "vm_ended");
}

#[tokio::test]
async fn a_lost_client_ends_the_session() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    for closes in [true, false] {
        let mut socket = enter(&client, &exec(&id), json!({ "command": ["sleep"] })).await;
        let (mut agent, _) = vm.started().await;
        if closes {
            socket.close(None).await.unwrap();
        } else {
            drop(socket);
        }
        agent.hung_up().await;
        how(&client, "client_lost").await;
    }
}

/// The command reads nothing and prints nothing, so that nothing is read of the client's connection either.
#[tokio::test]
async fn a_client_that_is_lost_behind_its_own_input_is_noticed() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let mut socket = enter(&client, &exec(&id), json!({ "command": ["sleep"] })).await;
    let (agent, _) = vm.started().await;
    let piece = Message::binary(vec![0; 64 * 1024]);
    let stuck = async {
        loop {
            socket.feed(piece.clone()).await.unwrap();
            socket.flush().await.unwrap();
        }
    };
    // Until all that lies between is full.
    assert!(tokio::time::timeout(Duration::from_secs(1), stuck).await.is_err());
    drop(socket);
    how(&client, "client_lost").await;
    let mut agent = agent;
    agent.hung_up().await;
}

/// Waits until the newest session has ended as it should.
async fn how(client: &Client<'_>, expected: &str) {
    loop {
        let session = &client.json("/sessions?limit=1").await[0];
        if let Some(how) = session["how"].as_str() {
            assert_eq!(how, expected, "{session}");
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn time_that_is_over_and_vms_that_end_are_told() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened } = running(&server, &client).await;
    let mut socket =
        enter(&client, &exec(&id), json!({ "command": ["sleep"], "timeout": 1 })).await;
    let (mut agent, _) = vm.started().await;
    agent.print(Stream::Out, b"so far").await;
    let (output, last) = to_the_end(&mut socket).await;
    assert_eq!((output, &last["exitCode"]), (b"so far".to_vec(), &json!(124)));
    agent.hung_up().await;
    how(&client, "timed_out").await;

    let mut socket = enter(&client, &exec(&id), json!({ "command": ["sleep"] })).await;
    let (mut agent, _) = vm.started().await;
    drop(opened);
    agent.print(Stream::Out, b"last words").await;
    drop(agent);
    let (output, last) = to_the_end(&mut socket).await;
    assert_eq!((output, &last["exitCode"]), (b"last words".to_vec(), &json!(125)));
    how(&client, "vm_ended").await;
}

#[tokio::test]
async fn a_server_that_stops_ends_its_sessions_and_takes_no_more() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let mut socket = enter(&client, &exec(&id), json!({ "command": ["sleep"] })).await;
    let (mut agent, _) = vm.started().await;
    let stop = CancellationToken::new();
    stop.cancel();
    let stopping = tokio::spawn(server.sessions.clone().run(stop));
    let last = to_the_end(&mut socket).await.1;
    assert!(last["error"].as_str().unwrap().contains("stopped"), "{last}");
    agent.hung_up().await;
    stopping.await.unwrap();
    how(&client, "server_stopped").await;
    refusal(client.get(&exec(&id)).await, 503, "stopping").await;
}

#[tokio::test]
async fn a_token_that_is_revoked_ends_its_sessions_and_no_others() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let admin = server.client("ops", Role::Admin).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let mut socket = enter(&client, &exec(&id), json!({ "command": ["sleep"] })).await;
    let (mut agent, _) = vm.started().await;
    let mut other = enter(&admin, &exec(&id), json!({ "command": ["sleep"] })).await;
    let (mut of_other, _) = vm.started().await;
    let sessions = admin.json("/sessions").await;
    let session = sessions.as_array().unwrap().iter().find(|s| s["by"]["tenant"] == "a").unwrap();
    let token = session["by"]["token"].as_str().unwrap();
    let revoked = admin.delete(&format!("/tokens/{token}")).await;
    assert_eq!(revoked.status(), StatusCode::NO_CONTENT);
    let last = to_the_end(&mut socket).await.1;
    assert_eq!(last["exitCode"], 125, "{last}");
    agent.hung_up().await;
    of_other.exit(0).await;
    assert_eq!(to_the_end(&mut other).await.1, json!({ "exitCode": 0 }));
    let sessions = admin.json("/sessions").await;
    let how = |tenant: &str| {
        let of = sessions.as_array().unwrap().iter().find(|s| s["by"]["tenant"] == tenant);
        of.unwrap()["how"].clone()
    };
    assert_eq!((how("a"), how("ops")), (json!("revoked"), json!("exited")));
}

/// `kiln token revoke --data-dir` writes into the database of a server that runs, as this does.
#[tokio::test]
async fn a_token_that_another_process_revokes_ends_its_sessions() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let mut socket = enter(&client, &exec(&id), json!({ "command": ["sleep"] })).await;
    let (mut agent, _) = vm.started().await;
    let watching = tokio::spawn(server.sessions.clone().run(CancellationToken::new()));
    let elsewhere = SqliteStore::open(&server.data).await.unwrap();
    let token = &elsewhere.tokens().await.unwrap()[0].id;
    elsewhere.revoke_token(token).await.unwrap();
    let last = to_the_end(&mut socket).await.1;
    assert_eq!(last["exitCode"], 125, "{last}");
    assert!(last["error"].as_str().unwrap().contains("is revoked"), "{last}");
    agent.hung_up().await;
    let admin = server.client("ops", Role::Admin).await;
    how(&admin, "revoked").await;
    watching.abort();
}

#[tokio::test]
async fn one_session_more_than_may_be_is_refused() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let mut inside = vec![];
    for _ in 0..kiln::exec::room::PER_VM {
        let socket = enter(&client, &exec(&id), json!({ "command": ["sleep"] })).await;
        inside.push((socket, vm.started().await.0));
    }
    let problem = refusal(client.get(&exec(&id)).await, 429, "too_many_sessions").await;
    assert!(problem["message"].as_str().unwrap().contains("64 sessions"), "{problem}");
    let (mut socket, mut agent) = inside.pop().unwrap();
    agent.exit(0).await;
    to_the_end(&mut socket).await;
    refusal(client.get(&exec(&id)).await, 426, "upgrade_required").await;
    // All of them are listed, page by page.
    let page = client.get("/sessions?limit=40").await;
    let link = page.headers()["link"].to_str().unwrap().to_owned();
    let next = link.strip_prefix('<').unwrap().split_once('>').unwrap().0;
    let rest = client.json(next).await;
    assert_eq!(rest.as_array().unwrap().len(), 24);
}

/// Nothing is kept without bound: what a client does not take stays with the command, and other sessions go on.
#[tokio::test]
async fn a_client_that_does_not_read_holds_back_its_own_session_only() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let mut slow = enter(&client, &exec(&id), json!({ "command": ["yes"] })).await;
    let (mut yes, _) = vm.started().await;
    let piece = vec![b'y'; 64 * 1024];
    let mut sent = 0_usize;
    let flood = async {
        loop {
            yes.print(Stream::Out, &piece).await;
            sent += piece.len();
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(1), flood).await.is_err());
    // What sockets hold, and one piece; loopback's buffers grow to some megabytes.
    assert!(sent < 32 << 20, "{sent}");
    let mut quick = enter(&client, &exec(&id), json!({ "command": ["cat"] })).await;
    let (mut cat, _) = vm.started().await;
    quick.send(Message::binary(&b"hello"[..])).await.unwrap();
    quick.send(Message::text(r#"{"stdin_closed":true}"#)).await.unwrap();
    cat.cat().await;
    assert_eq!(to_the_end(&mut quick).await.0, b"hello");
    // The slow one loses nothing. What was cut short above is a part of a frame.
    drop(yes);
    let mut got = 0;
    loop {
        match next(&mut slow).await.unwrap() {
            Message::Binary(bytes) => got += bytes.len(),
            Message::Text(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(got >= sent, "{got} of {sent}");
}
