//! Files out of VMs and into them, with agents that are real peers.

use kiln::build::BuildId;
use kiln::exec::Opened;
use kiln::instances::Change;
use kiln::store::Role;
use kiln_protocol::exec::{Cause, Copy, Open, Place, SessionToHost, Stream};
use reqwest::{Body, Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use crate::agent::{Agent, Vm};
use crate::support::{Client, Pull, Server, form, id_of, refusal, server};

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

fn files(id: &BuildId, query: &str) -> String {
    format!("/builds/{id}/files?{query}")
}

async fn put(client: &Client<'_>, path: &str, body: impl Into<Body>) -> Response {
    client.request(Method::PUT, path).body(body).send().await.unwrap()
}

fn copy(place: Place, path: &str) -> Copy {
    Copy { place, path: path.into() }
}

const JOB: Place = Place::Job { secrets: false };

/// The newest session, once it has ended.
async fn last_session(client: &Client<'_>) -> Value {
    loop {
        let listed = client.json("/sessions?limit=1").await;
        if listed[0]["ended_at"].is_string() {
            return listed[0].clone();
        }
        tokio::task::yield_now().await;
    }
}

async fn start(vm: &Vm) -> (Agent, Open) {
    let (mut agent, open) = vm.opened().await;
    agent.say(SessionToHost::Started).await;
    (agent, open)
}

#[tokio::test]
async fn an_archive_comes_out_and_the_session_is_in_the_audit_log() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let path = files(&id, "path=%2Fsrv%2Fa%20b&with_secrets=true");
    let large: Vec<u8> = (0..=255).cycle().take(1_000_000).collect();
    let (response, ()) = tokio::join!(client.get(&path), async {
        let (mut agent, open) = vm.opened().await;
        let secrets = Place::Job { secrets: true };
        assert_eq!(open, Open::CopyOut(copy(secrets, "/srv/a b")));
        // Before it begins it is in the log, and the build is marked.
        let listed = client.json(&format!("/sessions?build={id}")).await;
        assert_eq!(listed[0]["command"], json!(["cp", "out", "/srv/a b"]));
        assert_eq!(listed[0]["with_secrets"], true);
        assert!(listed[0].get("ended_at").is_none(), "{listed}");
        assert_eq!(client.json(&format!("/builds/{id}")).await["entered"], true);
        agent.say(SessionToHost::Started).await;
        let sending = tokio::spawn({
            let large = large.clone();
            async move {
                for piece in large.chunks(60_000) {
                    agent.print(Stream::Out, piece).await;
                }
                // Who does not ask for trailers gets none.
                agent.print(Stream::Err, b"1 device").await;
                agent.exit(0).await;
                agent.hung_up().await;
            }
        });
        drop(sending);
    });
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/x-tar");
    assert!(response.bytes().await.unwrap() == large);
    let session = last_session(&client).await;
    assert_eq!((&session["how"], &session["exit_code"]), (&json!("exited"), &json!(0)));
}

#[tokio::test]
async fn an_archive_goes_in_whole_and_is_answered_when_it_is_there() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    // Beyond every window.
    let large: Vec<u8> = (0..=255).cycle().take(5_000_000).collect();
    let path = files(&id, "path=work");
    let (response, got) = tokio::join!(put(&client, &path, large.clone()), async {
        let (mut agent, open) = start(&vm).await;
        assert_eq!(open, Open::CopyIn(copy(JOB, "work")));
        let mut got = vec![];
        while let Some(bytes) = agent.input().await {
            got.extend(bytes);
        }
        agent.exit(0).await;
        got
    });
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    assert!(got == large);
    let session = last_session(&client).await;
    assert_eq!(session["command"], json!(["cp", "in", "work"]));
    assert_eq!(session["how"], "exited");
}

#[tokio::test]
async fn what_is_refused_before_the_first_byte_is_a_problem() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let path = files(&id, "path=x");
    for (cause, status, code) in [
        (Cause::NotFound, 404, "not_found"),
        (Cause::NoStep, 409, "no_step"),
        (Cause::Invalid, 422, "not_copied"),
        (Cause::Internal, 502, "copy_failed"),
    ] {
        let refuse = async || vm.opened().await.0.fail(cause, "why").await;
        let (response, ()) = tokio::join!(client.get(&path), refuse());
        assert_eq!(refusal(response, status, code).await["detail"], "why");
        let session = last_session(&client).await;
        assert_eq!((&session["how"], &session["error"]), (&json!("refused"), &json!("why")));
        let (response, ()) = tokio::join!(put(&client, &path, "x"), refuse());
        assert_eq!(refusal(response, status, code).await["detail"], "why");
    }
    // Also while most of a large body has not been read.
    let (response, ()) = tokio::join!(put(&client, &path, vec![0; 30_000_000]), async {
        start(&vm).await.0.fail(Cause::Invalid, "bad archive").await;
    });
    refusal(response, 422, "not_copied").await;
    assert_eq!(last_session(&client).await["how"], "refused");
}

#[tokio::test]
async fn a_copy_that_breaks_off_does_not_look_whole() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened } = running(&server, &client).await;
    let path = files(&id, "path=x");
    for fail in [true, false] {
        let (response, mut agent) = tokio::join!(client.get(&path), async {
            let (mut agent, _) = start(&vm).await;
            agent.print(Stream::Out, b"half").await;
            agent
        });
        assert_eq!(response.status(), StatusCode::OK);
        if fail {
            agent.fail(Cause::Internal, "the disk is gone").await;
        }
        drop(agent);
        assert!(response.bytes().await.is_err());
        assert_eq!(last_session(&client).await["how"], "failed");
    }
    // The VM ends.
    let (response, _agent) = tokio::join!(client.get(&path), start(&vm));
    drop(opened);
    assert!(response.bytes().await.is_err());
    assert_eq!(last_session(&client).await["how"], "vm_ended");
}

#[tokio::test]
async fn a_client_that_goes_ends_the_copy() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let path = files(&id, "path=x");
    let (response, (mut agent, _)) = tokio::join!(client.get(&path), start(&vm));
    drop(response);
    agent.hung_up().await;
    assert_eq!(last_session(&client).await["how"], "client_lost");

    // An archive that the client gives up has no end.
    let (parts, body) = mpsc::channel::<std::io::Result<Vec<u8>>>(1);
    let body = Body::wrap_stream(ReceiverStream::new(body));
    let request = client.request(Method::PUT, &path).body(body).send();
    let (given_up, ()) = tokio::join!(request, async {
        let (mut agent, _) = start(&vm).await;
        parts.send(Ok(b"half".to_vec())).await.unwrap();
        assert_eq!(agent.input().await.unwrap(), b"half");
        parts.send(Err(std::io::Error::other("gone"))).await.unwrap();
        assert!(agent.hear().await.is_err(), "no end of the input");
    });
    assert!(given_up.is_err());
    assert_eq!(last_session(&client).await["how"], "client_lost");

    // It goes before the copy has begun, and after all of it was sent.
    for put in [false, true] {
        let method = if put { Method::PUT } else { Method::GET };
        let request = client.request(method, &path).body("x").send();
        let mut request = Box::pin(request);
        let (mut agent, _) = tokio::select! {
            _ = &mut request => panic!("it is answered"),
            opened = vm.opened() => opened,
        };
        drop(request);
        agent.hung_up().await;
        assert_eq!(last_session(&client).await["how"], "client_lost");
    }
}

#[tokio::test]
async fn who_may_not_is_refused() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let Running { vm, id, opened } = running(&server, &client).await;
    let path = files(&id, "path=x");
    let reader = server.client("a", Role::Reader).await;
    let other = server.client("b", Role::Tenant).await;
    refusal(server.anonymous().get(&path).await, 401, "unauthorized").await;
    refusal(reader.get(&path).await, 403, "forbidden").await;
    refusal(put(&reader, &path, "x").await, 403, "forbidden").await;
    refusal(other.get(&path).await, 404, "not_found").await;
    refusal(put(&other, &path, "x").await, 404, "not_found").await;
    refusal(client.get(&files(&id, "")).await, 400, "invalid_query").await;
    refusal(client.get("/instances/i-1/files?path=x").await, 404, "not_found").await;
    assert_eq!(client.json("/sessions").await, json!([]));

    // Who asks for the VM is in the log.
    let vm_path = files(&id, "path=%2Fetc&vm=true");
    refusal(client.get(&vm_path).await, 403, "forbidden").await;
    refusal(put(&client, &vm_path, "x").await, 403, "forbidden").await;
    let session = last_session(&client).await;
    assert_eq!((&session["how"], &session["vm"]), (&json!("refused"), &json!(true)));
    assert_eq!(session["command"], json!(["cp", "in", "/etc"]));
    let admin = server.client("root", Role::Admin).await;
    let (response, ()) = tokio::join!(admin.get(&vm_path), async {
        let (mut agent, open) = start(&vm).await;
        assert_eq!(open, Open::CopyOut(copy(Place::Vm, "/etc")));
        agent.exit(0).await;
    });
    assert_eq!(response.bytes().await.unwrap(), "");
    drop(opened);
    refusal(client.get(&path).await, 409, "not_open").await;
    let queued = id_of(&client.submit(form()).await);
    refusal(client.get(&files(&queued, "path=x")).await, 409, "not_started").await;
}

#[tokio::test]
async fn a_copy_ends_with_its_token() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let admin = server.client("root", Role::Admin).await;
    let Running { vm, id, opened: _opened } = running(&server, &client).await;
    let path = files(&id, "path=x");
    let (body, pieces) = mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
    let body_stream = Body::wrap_stream(ReceiverStream::new(pieces));
    let (response, ()) = tokio::join!(put(&client, &path, body_stream), async {
        let (mut agent, _) = start(&vm).await;
        let token = admin.json("/sessions?limit=1").await[0]["by"]["token"].clone();
        admin.delete(&format!("/tokens/{}", token.as_str().unwrap())).await;
        agent.hung_up().await;
        drop(body);
    });
    let problem = refusal(response, 401, "unauthorized").await;
    assert!(problem["message"].as_str().unwrap().contains("is revoked"), "{problem}");
    assert_eq!(last_session(&admin).await["how"], "revoked");
}

#[tokio::test]
async fn an_instance_has_files_too() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let body = json!({ "name": "web", "image": "app" });
    let made = client.request(Method::POST, "/instances").json(&body).send().await.unwrap();
    let id = made.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
    let (vm, (told, opened)) = (Vm::new(), oneshot::channel());
    server.runner.pull("web", Pull::Change(Change::Initialize)).await;
    server.runner.pull("web", Pull::Open(vm.entrance(), told)).await;
    opened.await.unwrap();
    let path = format!("/instances/{id}/files?path=a");
    let (response, ()) = tokio::join!(client.get(&path), async {
        let (mut agent, _) = start(&vm).await;
        agent.print(Stream::Out, b"tar").await;
        agent.exit(0).await;
    });
    assert_eq!(response.bytes().await.unwrap(), "tar");
    let (response, ()) = tokio::join!(put(&client, &path, "x"), async {
        start(&vm).await.0.exit(0).await;
    });
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
}
