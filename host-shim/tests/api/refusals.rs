//! Who may do what, and the shape of every refusal.

use kiln::api::Check;
use kiln::store::Role;
use reqwest::multipart::Form;
use reqwest::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{form, id_of, refusal, server, source};

#[tokio::test]
async fn without_a_token_there_are_only_health_ready_and_the_document() {
    let server = server().await;
    let nobody = server.anonymous();
    assert_eq!(nobody.json("/health").await, json!({"status": "ok"}));
    assert_eq!(nobody.json("/ready").await["status"], "ready");
    for (method, path) in [
        (Method::GET, "/builds"),
        (Method::POST, "/builds"),
        (Method::GET, "/builds/b1"),
        (Method::DELETE, "/builds/b1"),
        (Method::GET, "/builds/b1/events"),
        (Method::GET, "/metrics"),
        (Method::GET, "/tokens"),
        (Method::POST, "/tokens"),
        (Method::DELETE, "/tokens/t1"),
    ] {
        let response = nobody.request(method.clone(), path).send().await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], "Bearer", "{method} {path}");
        refusal(response, 401, "unauthorized").await;
        let response =
            nobody.request(method, path).bearer_auth("kiln_nonsense").send().await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], "Bearer error=\"invalid_token\"");
        refusal(response, 401, "unauthorized").await;
    }
}

/// The real `kiln build` against the real API.
#[tokio::test]
async fn the_command_line_names_its_own_flags() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").unwrap();
    let tags: Vec<_> = (0..65).flat_map(|n| ["--tag".to_owned(), format!("t{n}=x")]).collect();
    let tags: Vec<_> = tags.iter().map(String::as_str).collect();
    let cases: [(&[&str], &str); 9] = [
        (&["--memory", "1"], "kiln: --memory is \"1\"; it must be a number from 256 to 65536\n"),
        (&["--disk", "501"], "kiln: --disk is \"501\"; it must be a number from 1 to 500\n"),
        (&["--timeout", "86401"], "kiln: --timeout is \"86401\"; "),
        (&["--cpus", "65"], "kiln: --cpus is \"65\"; "),
        (
            &["--network", "none", "--allow", "a.test"],
            "kiln: --network none does not go with --allow; ",
        ),
        (&["--allow", "10.0.0.1"], "kiln: --allow has \"10.0.0.1\", which is an address; "),
        (&["--target", "memory_mb!"], "kiln: --target is \"memory_mb!\"; "),
        (&["--secret", "id=a,env_var=1"], "kiln: env_var of the secret a is \"1\"; "),
        (&tags, "kiln: --tag has more than 64 tags\n"),
    ];
    for (args, said) in cases {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_kiln"))
            .arg("build")
            .arg(dir.path())
            .args(args)
            .env("KILN_URL", &server.url)
            .env("KILN_TOKEN", &client.token)
            .output()
            .await
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(said), "{args:?}: {stderr}");
    }
}

#[tokio::test]
async fn no_address_and_no_header_is_believed() {
    let server = server().await;
    for (name, value) in [
        ("X-Real-IP", "127.0.0.1"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("Forwarded", "for=127.0.0.1"),
        ("X-Forwarded-User", "admin"),
        ("Authorization", "Basic YW55OnRva2Vu"),
        ("Cookie", "token=kiln_x"),
    ] {
        let response =
            server.anonymous().request(Method::GET, "/builds").header(name, value).send().await;
        refusal(response.unwrap(), 401, "unauthorized").await;
    }
    let client = server.client("acme", Role::Admin).await;
    let twice =
        client.request(Method::GET, "/builds").bearer_auth("kiln_other").send().await.unwrap();
    refusal(twice, 401, "unauthorized").await;
    let request = client.request(Method::GET, "/builds").header("X-Request-Id", "forged");
    let response = request.send().await.unwrap();
    assert_ne!(response.headers()["x-request-id"], "forged");
}

#[tokio::test]
async fn a_tenant_does_not_know_of_anothers_builds() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    let other = server.client("other", Role::Tenant).await;
    let admin = server.client("dev", Role::Admin).await;
    let id = id_of(&acme.submit(form()).await);
    let path = format!("/builds/{id}");
    // To the byte as one that never was.
    let mine = refusal(other.get(&path).await, 404, "not_found").await;
    assert_eq!(mine, refusal(other.get("/builds/nobody").await, 404, "not_found").await);
    refusal(other.get(&format!("{path}/events")).await, 404, "not_found").await;
    refusal(other.delete(&path).await, 404, "not_found").await;
    refusal(other.get(&format!("/builds?cursor={id}")).await, 400, "invalid_query").await;
    assert_eq!(other.json("/builds").await, json!([]));
    assert_eq!(acme.json(&path).await["status"], "queued");

    assert_eq!(admin.json("/builds").await[0]["id"], id.as_str());
    assert_eq!(admin.json(&path).await["tenant"], "acme");
    assert_eq!(admin.delete(&path).await.status(), StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn a_reader_reads() {
    let server = server().await;
    let owner = server.client("acme", Role::Tenant).await;
    let reader = server.client("acme", Role::Reader).await;
    let path = format!("/builds/{}", id_of(&owner.submit(form()).await));
    assert_eq!(reader.json(&path).await["status"], "queued");
    assert_eq!(reader.get(&format!("{path}/events")).await.status(), 200);
    refusal(reader.post(form()).await, 403, "forbidden").await;
    refusal(reader.delete(&path).await, 403, "forbidden").await;
    for client in [&reader, &owner] {
        refusal(client.get("/tokens").await, 403, "forbidden").await;
        refusal(client.delete("/tokens/x").await, 403, "forbidden").await;
    }
    assert_eq!(server.source_dirs(), 1);
}

#[tokio::test]
async fn paths_methods_and_media_types_that_are_none() {
    let server = server().await;
    let client = server.client("acme", Role::Admin).await;
    for path in ["/", "/nothing", "/builds/", "/builds/x/y", "/v1/builds"] {
        refusal(client.get(path).await, 404, "not_found").await;
    }
    for (method, path, allow) in [
        (Method::PUT, "/builds", "GET,HEAD,POST"),
        (Method::POST, "/builds/b1", "DELETE,GET,HEAD"),
        (Method::DELETE, "/health", "GET,HEAD"),
    ] {
        let response = client.request(method, path).send().await.unwrap();
        let mut allowed: Vec<_> =
            response.headers()["allow"].to_str().unwrap().split(',').collect();
        allowed.sort_unstable();
        assert_eq!(allowed.join(","), allow);
        refusal(response, 405, "method_not_allowed").await;
    }
    let post = |path: &str| client.request(Method::POST, path);
    refusal(post("/builds").json(&json!({})).send().await.unwrap(), 415, "unsupported_media_type")
        .await;
    refusal(post("/builds").send().await.unwrap(), 415, "unsupported_media_type").await;
    let bare = post("/builds").header("content-type", "multipart/form-data").body("x");
    refusal(bare.send().await.unwrap(), 415, "unsupported_media_type").await;
    let broken =
        post("/builds").header("content-type", "multipart/form-data; boundary=B").body("nonsense");
    refusal(broken.send().await.unwrap(), 400, "invalid_multipart").await;
    refusal(post("/tokens").body("{}").send().await.unwrap(), 415, "unsupported_media_type").await;
    let json =
        |body: String| post("/tokens").header("content-type", "application/json").body(body).send();
    refusal(json("{".into()).await.unwrap(), 400, "invalid_json").await;
    refusal(json("[]".into()).await.unwrap(), 422, "invalid_field").await;
    refusal(json("x".repeat(64 * 1024 + 1)).await.unwrap(), 413, "too_large").await;
}

#[tokio::test]
async fn lists_refuse_what_they_do_not_know() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    for bad in ["limit=0", "limit=201", "limit=x", "status=done", "cursor=nobody", "cursor=.."] {
        refusal(client.get(&format!("/builds?{bad}")).await, 400, "invalid_query").await;
    }
    refusal(client.get("/builds?page=2").await, 400, "unknown_parameter").await;
    assert_eq!(client.get("/builds?limit=200").await.status(), 200);
}

#[tokio::test]
async fn fields_are_refused_by_name_value_and_what_is_allowed() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let body = refusal(client.post(form().text("cpus", "many")).await, 422, "invalid_field").await;
    assert_eq!(body["message"], "cpus is \"many\"; it must be a number from 1 to 64");
    let body =
        refusal(client.post(form().text("volume_size", "1")).await, 422, "unknown_field").await;
    assert!(body["message"].as_str().unwrap().contains("volume_size"));
    for twice in [form().text("cpus", "1").text("cpus", "1"), form().part("source", source())] {
        refusal(client.post(twice).await, 422, "duplicate_field").await;
    }
    refusal(client.post(Form::new().text("cpus", "1")).await, 400, "missing_source").await;
    let part = reqwest::multipart::Part::bytes(vec![0xff, 0xfe]);
    refusal(client.post(form().part("dockerfile", part)).await, 422, "invalid_field").await;
    assert_eq!(server.source_dirs(), 0, "nothing is left of what was refused");
    assert_eq!(client.json("/builds").await, json!([]));
}

#[tokio::test]
async fn ready_names_each_thing_that_it_looked_at_and_all_that_is_missing() {
    let server = server().await;
    let check = |name, missing: Option<&str>| Check { name, missing: missing.map(Into::into) };
    *server.scheduler.checks.lock().unwrap() = vec![check("registry", None), check("disk", None)];
    let there = |name| json!({"name": name, "ready": true});
    let all = json!([there("store"), there("registry"), there("disk")]);
    let ready = server.anonymous().json("/ready").await;
    assert_eq!(ready, json!({"status": "ready", "checks": all}));

    let missing = vec![check("registry", None), check("disk", Some("the disk is full"))];
    *server.scheduler.checks.lock().unwrap() = missing;
    let body = refusal(server.anonymous().get("/ready").await, 503, "not_ready").await;
    assert_eq!(body["message"], "the disk is full");
    server.database.close().await;
    let body = refusal(server.anonymous().get("/ready").await, 503, "not_ready").await;
    assert_eq!(body["message"], "the store cannot be written; the disk is full");
    let gone = |name, detail| json!({"name": name, "ready": false, "detail": detail});
    let store = gone("store", "the store cannot be written");
    let expected = json!([store, there("registry"), gone("disk", "the disk is full")]);
    assert_eq!(body["checks"], expected);
    assert_eq!(server.anonymous().get("/health").await.status(), 200);
}

#[tokio::test]
async fn a_request_names_one_host() {
    let server = server().await;
    let address = server.url.strip_prefix("http://").unwrap();
    for (head, status) in [
        ("GET /health HTTP/1.1\r\nHost: a\r\n", "200"),
        ("GET /health HTTP/1.0\r\n", "200"),
        ("GET /health HTTP/1.1\r\n", "400"),
        ("GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n", "400"),
    ] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some(status), "{head}");
    }
}
