//! Every bound of a submit, at it and above.

use std::time::Duration;

use kiln::api::Limits;
use kiln::store::Role;
use reqwest::multipart::{Form, Part};
use reqwest::{Body, Method};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::support::{LIMITED, Server, form, gzip, refusal, server, server_with};

async fn limited(limits: Limits) -> Server {
    server_with(limits, Duration::from_mins(10)).await
}

#[tokio::test]
async fn a_source_at_the_limit_is_taken_and_one_above_is_not() {
    const MOST: usize = 200_000;
    let server = limited(Limits { max_source_bytes: MOST as u64, ..Limits::default() }).await;
    let client = server.client("acme", Role::Tenant).await;
    let sized = |n| Form::new().part("source", Part::bytes(gzip(n)));
    client.submit(sized(MOST)).await;
    assert_eq!(server.source_dirs(), 1);
    refusal(client.post(sized(MOST + 1)).await, 413, "too_large").await;
    // By its length alone, before it is received.
    refusal(client.post(sized(MOST + 25 * 1024 * 1024)).await, 413, "too_large").await;
    // And without a length that says so.
    let chunks = tokio_stream::iter(vec![gzip(MOST), gzip(2)]).map(Ok::<_, std::io::Error>);
    let form = Form::new().part("source", Part::stream(Body::wrap_stream(chunks)));
    refusal(client.post(form).await, 413, "too_large").await;
    assert_eq!(server.source_dirs(), 1);
}

#[tokio::test]
async fn what_is_no_archive_is_refused_and_removed() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    for bytes in [vec![], b"PK\x03\x04".to_vec(), vec![1; 5_000_000], vec![0; 511]] {
        let form = Form::new().part("source", Part::bytes(bytes));
        refusal(client.post(form).await, 400, "invalid_source").await;
    }
    assert_eq!(server.source_dirs(), 0);
}

#[tokio::test]
async fn a_text_part_is_bounded() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let text = |n| form().text("cache_scope", "x".repeat(n));
    refusal(client.post(text(1024 * 1024)).await, 422, "not_supported").await;
    refusal(client.post(text(1024 * 1024 + 1)).await, 413, "too_large").await;
    client.submit(form().text("dockerfile", "x".repeat(512 * 1024))).await;
    refusal(
        client.post(form().text("dockerfile", "x".repeat(512 * 1024 + 1))).await,
        413,
        "too_large",
    )
    .await;
}

#[tokio::test]
async fn a_tenant_has_so_many_queued_builds() {
    let server = limited(Limits { max_queued: 2, ..Limits::default() }).await;
    let acme = server.client("acme", Role::Tenant).await;
    let other = server.client("other", Role::Tenant).await;
    acme.submit(form()).await;
    acme.submit(form()).await;
    let refused = acme.post(form()).await;
    assert!(refused.headers().contains_key("retry-after"));
    refusal(refused, 429, "queue_full").await;
    other.submit(form()).await;
    server.scheduler.claim().await;
    acme.submit(form()).await;
}

#[tokio::test]
async fn a_submit_that_is_sent_again_gets_its_build_though_the_queue_is_full() {
    let server = limited(Limits { max_queued: 1, ..Limits::default() }).await;
    let acme = server.client("acme", Role::Tenant).await;
    let submit = || {
        acme.request(Method::POST, "/builds")
            .header("Idempotency-Key", "k")
            .multipart(form())
            .send()
    };
    let first: serde_json::Value = submit().await.unwrap().json().await.unwrap();
    refusal(acme.post(form()).await, 429, "queue_full").await;
    let again = submit().await.unwrap();
    assert_eq!(again.status(), 202);
    let again: serde_json::Value = again.json().await.unwrap();
    assert_eq!(again["id"], first["id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_sends_slowly_leaves_room_for_others() {
    let server = limited(Limits { max_uploads: 2, ..Limits::default() }).await;
    let (send, first) = begun(&server, None).await;
    let acme = server.client("acme", Role::Tenant).await;
    let refused = acme.post(form()).await;
    assert!(refused.headers().contains_key("retry-after"));
    refusal(refused, 429, "too_many_uploads").await;
    server.client("other", Role::Tenant).await.submit(form()).await;
    drop(send);
    assert_eq!(first.await.unwrap().status(), 202);
    acme.submit(form()).await;
}

/// A submit that has begun and waits for more of its source.
async fn begun(
    server: &Server,
    key: Option<&str>,
) -> (mpsc::Sender<Result<Vec<u8>, std::io::Error>>, tokio::task::JoinHandle<reqwest::Response>) {
    let client = server.client("acme", Role::Tenant).await;
    let before = server.source_dirs();
    let (send, chunks) = mpsc::channel(1);
    let part = Part::stream(Body::wrap_stream(ReceiverStream::new(chunks)));
    let mut request =
        client.request(Method::POST, "/builds").multipart(Form::new().part("source", part));
    if let Some(key) = key {
        request = request.header("Idempotency-Key", key);
    }
    let task = tokio::spawn(async move { request.send().await.unwrap() });
    send.send(Ok(gzip(600_000))).await.unwrap();
    // It is being received once its directory is there.
    while server.source_dirs() == before {
        tokio::task::yield_now().await;
    }
    (send, task)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_flight_is_a_conflict() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let (send, first) = begun(&server, Some("k")).await;
    let again = || {
        client
            .request(Method::POST, "/builds")
            .header("Idempotency-Key", "k")
            .multipart(form())
            .send()
    };
    refusal(again().await.unwrap(), 409, "idempotency_key_in_flight").await;
    drop(send);
    assert_eq!(first.await.unwrap().status(), 202);
    refusal(again().await.unwrap(), 422, "idempotency_key_reused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_sources_are_received_at_one_time() {
    let server = limited(Limits { max_uploads: 1, ..Limits::default() }).await;
    let client = server.client("acme", Role::Tenant).await;
    let (send, first) = begun(&server, None).await;
    refusal(client.post(form()).await, 503, "busy").await;
    drop(send);
    assert_eq!(first.await.unwrap().status(), 202);
    client.submit(form()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_nothing() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let (send, first) = begun(&server, Some("k")).await;
    first.abort();
    drop(send);
    while server.source_dirs() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(client.json("/builds").await, serde_json::json!([]));
    // Its key is free again.
    loop {
        let request = client.request(Method::POST, "/builds").header("Idempotency-Key", "k");
        match request.multipart(form()).send().await.unwrap().status().as_u16() {
            202 => break,
            other => assert_eq!(other, 409),
        }
    }
}

#[tokio::test]
async fn a_token_that_asks_too_often_is_told_when_to_come_back() {
    let server = limited(Limits { max_requests_per_second: 1, ..Limits::default() }).await;
    let client = server.client("acme", Role::Tenant).await;
    // A burst of two.
    assert_eq!(client.get("/builds").await.status(), 200);
    assert_eq!(client.get("/builds").await.status(), 200);
    let refused = client.get("/builds").await;
    let after: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=2).contains(&after), "{after}");
    refusal(refused, 429, "too_many_requests").await;
    // Another token of the same tenant, and what needs none.
    assert_eq!(server.client("acme", Role::Tenant).await.get("/builds").await.status(), 200);
    assert_eq!(client.get("/health").await.status(), 200);
}

#[tokio::test]
async fn a_tenant_may_have_less_than_the_host_gives() {
    let server = server().await;
    let (other, client) =
        (server.client("acme", Role::Tenant).await, server.client(LIMITED, Role::Tenant).await);
    let above = [("timeout_seconds", 61), ("memory_mb", 513), ("cpus", 2), ("disk_gb", 3)];
    for (name, value) in above {
        let asked = || form().text(name, value.to_string());
        let problem = refusal(client.post(asked()).await, 422, "invalid_field").await;
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(&format!("to {}", value - 1)), "{detail}");
        other.submit(asked()).await;
    }
    let instance = client.request(Method::POST, "/instances");
    let instance = instance.json(&serde_json::json!({ "image": "limited/x", "vcpus": 2 }));
    refusal(instance.send().await.unwrap(), 422, "invalid_field").await;
    let large = || Form::new().part("source", Part::bytes(gzip((1 << 20) + 1)));
    refusal(client.post(large()).await, 413, "too_large").await;
    other.submit(large()).await;
    // What does not say gets no more either, and an administrator of the tenant is of the tenant.
    let build = client.submit(form()).await;
    assert_eq!(build["status"], "queued");
    let admin = server.client(LIMITED, Role::Admin).await;
    refusal(admin.post(form().text("cpus", "2")).await, 422, "invalid_field").await;
    admin.submit(form().text("cpus", "1")).await;
    refusal(client.post(form()).await, 429, "queue_full").await;
}
