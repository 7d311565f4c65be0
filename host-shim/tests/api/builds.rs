//! Create, get, list and cancel: the seed's list of the build manager's tests, by name.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use kiln::build::{Change, NetworkMode, Status};
use kiln::store::Role;
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::support::{HOST, form, gzip, id_of, refusal, server, source};

#[tokio::test]
async fn create_build_success() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let response = client.post(form()).await;
    assert_eq!(response.status(), 202);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let build: serde_json::Value = response.json().await.unwrap();
    assert_eq!(location, format!("/builds/{}", build["id"].as_str().unwrap()));
    assert_eq!((&build["status"], &build["queue_position"]), (&json!("queued"), &json!(1)));
    assert_eq!((&build["tenant"], &build["tags"]), (&json!("acme"), &json!({})));
    for absent in ["image_digest", "image_ref", "error", "started_at", "completed_at", "failure"] {
        assert_eq!(build.get(absent), None, "{absent}");
    }
    build["created_at"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let sent = gzip(1000);
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(&sent)));
    assert_eq!(build["provenance"]["source_hash"], digest);

    let id = id_of(&build);
    assert_eq!(std::fs::read(server.sources.join(id.as_str()).join("source")).unwrap(), sent);
    let stored = server.store.build(&id).await.unwrap().unwrap();
    assert_eq!(stored.repository(), format!("builds/{id}"));
    assert_eq!((stored.request.source_digest, stored.request.source_bytes), (digest, 1000));
    assert_eq!(server.scheduler.wakes.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn create_build_with_build_policy() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let form = Form::new()
        .text("memory_mb", "4096")
        .text("cpus", "4")
        .text("dockerfile", "FROM scratch\n")
        .part("source", source())
        .text("timeout_seconds", "60")
        .text("disk_gb", "20")
        .text("network_mode", "isolated")
        .text("build_args", r#"{"VERSION":"1.2 "}"#)
        .text("image_name", "team/app:v1")
        .text("target", "release")
        .text("secrets", "[]")
        .text("is_admin_build", "false")
        .text("tags", r#"{"team":"infra"}"#);
    let build = client.submit(form).await;
    assert_eq!(build["tags"], json!({"team": "infra"}));
    let stored = server.store.build(&id_of(&build)).await.unwrap().unwrap();
    assert_eq!((stored.repository().as_str(), stored.tag()), ("acme/team/app", "v1"));
    let r = stored.request;
    assert_eq!((r.timeout_seconds, r.memory_mb, r.cpus, r.disk_gb), (60, 4096, 4, 20));
    assert_eq!((r.network, r.target.as_deref()), (NetworkMode::None, Some("release")));
    assert_eq!(
        (r.dockerfile.as_deref(), r.build_args["VERSION"].as_str()),
        (Some("FROM scratch\n"), "1.2 ")
    );
}

#[tokio::test]
async fn the_provenance_tells_what_was_asked_for_beside_the_source() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let hash = async |parts: &[(&'static str, &'static str)]| {
        let form = parts.iter().fold(form(), |form, (name, text)| form.text(*name, *text));
        let build = client.submit(form).await;
        build["provenance"]["request_hash"].as_str().unwrap().to_owned()
    };
    let args = ("build_args", r#"{"A":"1","B":"2"}"#);
    let plain = hash(&[]).await;
    assert_eq!(
        plain,
        hash(&[("tags", r#"{"k":"v"}"#), ("image_name", "app"), ("cpus", "1")]).await
    );
    let asked = hash(&[("dockerfile", "FROM a\n"), ("target", "t"), args]).await;
    let other_way = ("build_args", r#"{ "B": "2", "A": "1" }"#);
    assert_eq!(asked, hash(&[other_way, ("target", "t"), ("dockerfile", "FROM a\n")]).await);
    let others = [
        hash(&[("dockerfile", "FROM b\n"), ("target", "t"), args]).await,
        hash(&[("dockerfile", "FROM a\n"), ("target", "u"), args]).await,
        hash(&[("dockerfile", "FROM a\n"), ("target", "t"), ("build_args", r#"{"A":"1"}"#)]).await,
        hash(&[("secrets", r#"[{"id":"npm"}]"#)]).await,
        asked,
        plain,
    ];
    assert_eq!(BTreeSet::from(others).len(), 6, "each is another");
}

#[tokio::test]
async fn parts_come_in_any_order_and_archives_in_any_form() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let mut ustar = vec![0; 1024];
    ustar[0] = b'a';
    ustar[257..262].copy_from_slice(b"ustar");
    for bytes in [ustar, vec![0; 1024], vec![0x28, 0xb5, 0x2f, 0xfd], gzip(3_000_000)] {
        for source_first in [true, false] {
            let part = Part::bytes(bytes.clone());
            let form = if source_first {
                Form::new().part("source", part).text("cpus", "3")
            } else {
                Form::new().text("cpus", "3").part("source", part)
            };
            let id = id_of(&client.submit(form).await);
            assert_eq!(server.store.build(&id).await.unwrap().unwrap().request.cpus, 3);
            assert_eq!(
                std::fs::read(server.sources.join(id.as_str()).join("source")).unwrap(),
                bytes
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn create_build_multiple_concurrent() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let builds = futures_util::future::join_all((0..25).map(|_| client.submit(form()))).await;
    let ids: BTreeSet<_> = builds.iter().map(id_of).collect();
    assert_eq!(ids.len(), 25);
    assert_eq!(server.source_dirs(), 25);
    let all = client.json("/builds?limit=200").await;
    let positions: BTreeSet<_> =
        all.as_array().unwrap().iter().map(|b| b["queue_position"].as_u64().unwrap()).collect();
    assert_eq!(positions, (1..=25).collect());
}

#[tokio::test]
async fn get_build_found() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let build = client.submit(form()).await;
    let path = format!("/builds/{}", build["id"].as_str().unwrap());
    assert_eq!(client.json(&path).await, build);

    let claimed = server.scheduler.claim().await;
    let building = client.json(&path).await;
    assert_eq!((&building["status"], building.get("queue_position")), (&json!("building"), None));
    assert_eq!(building["attempt"], 1);
    server.scheduler.publish(&claimed, "sha256:aa").await;
    let ready = client.json(&path).await;
    assert_eq!((&ready["status"], &ready["image_digest"]), (&json!("ready"), &json!("sha256:aa")));
    assert_eq!(ready["image_ref"], format!("{HOST}/builds/{}@sha256:aa", claimed.build.id));
    assert_eq!(
        (&ready["duration_ms"], &ready["started_at"]),
        (&json!(2500), &json!("1970-01-01T00:00:01.000Z"))
    );
}

#[tokio::test]
async fn get_build_not_found() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let long = "a".repeat(65);
    for id in ["nobody", "UPPER", "a_b", "%2e%2e%2fx", "%ff", "a%00", &long] {
        for path in [format!("/builds/{id}"), format!("/builds/{id}/events")] {
            refusal(client.get(&path).await, 404, "not_found").await;
        }
        refusal(client.delete(&format!("/builds/{id}")).await, 404, "not_found").await;
    }
}

#[tokio::test]
async fn update_status_with_error() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let build = client.submit(form()).await;
    server.scheduler.fail(&server.scheduler.claim().await).await;
    let failed = client.json(&format!("/builds/{}", build["id"].as_str().unwrap())).await;
    assert_eq!(
        (&failed["status"], &failed["failure"]["kind"]),
        (&json!("failed"), &json!("step_failed"))
    );
    assert_eq!(failed["error"], "make test failed (step 2, exit code 7)");
    assert_eq!(
        (&failed["failure"]["step"], &failed["failure"]["exit_code"]),
        (&json!(2), &json!(7))
    );
    assert_eq!(failed.get("image_ref"), None);
}

#[tokio::test]
async fn list_builds_empty() {
    let server = server().await;
    let response = server.client("acme", Role::Reader).await.get("/builds").await;
    assert_eq!((response.status().as_u16(), response.headers().get("link")), (200, None));
    assert_eq!(response.json::<serde_json::Value>().await.unwrap(), json!([]));
}

#[tokio::test]
async fn list_builds_with_builds() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let mut ids = vec![];
    for n in 0..5 {
        let tags = json!({"n": n.to_string(), "team": if n < 3 { "a & b" } else { "c" }});
        ids.push(id_of(&client.submit(form().text("tags", tags.to_string())).await).to_string());
    }
    ids.reverse();
    // Page by page, as the Link header leads.
    for query in ["/builds?limit=2", "/builds?limit=2&tags[team]=a+%26+b&status=queued"] {
        let (mut seen, mut next) = (vec![], Some(query.to_owned()));
        while let Some(path) = next.take() {
            let response = client.get(&path).await;
            let link = response.headers().get("link").map(|l| l.to_str().unwrap().to_owned());
            next = link.map(|l| {
                l.strip_prefix('<').unwrap().split_once(">; rel=\"next\"").unwrap().0.to_owned()
            });
            let page: Vec<serde_json::Value> = response.json().await.unwrap();
            assert!(page.len() <= 2);
            seen.extend(page.iter().map(|b| b["id"].as_str().unwrap().to_owned()));
        }
        assert_eq!(seen, if query.contains("tags") { &ids[2..] } else { &ids[..] });
    }
    // As hypeman's SDK writes it.
    let one = client.json("/builds?tags%5Bn%5D=4").await;
    assert_eq!((one.as_array().unwrap().len(), &one[0]["id"]), (1, &json!(ids[0])));
    assert_eq!(client.json("/builds?status=ready").await, json!([]));
    let all = client.json("/builds?limit=5").await;
    assert_eq!(all.as_array().unwrap().len(), 5);
    let response = client.get("/builds?limit=5").await;
    assert_eq!(response.headers().get("link"), None, "a full last page has no next");
}

#[tokio::test]
async fn cancel_build_queued() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let build = client.submit(form()).await;
    let path = format!("/builds/{}", build["id"].as_str().unwrap());
    let source = server.sources.join(build["id"].as_str().unwrap());
    assert!(source.exists());
    let response = client.delete(&path).await;
    assert_eq!(response.status(), 204);
    assert_eq!(client.json(&path).await["status"], "cancelled");
    assert!(server.store.claim("x", 1, &[]).await.unwrap().is_none());
    assert!(!source.exists(), "nobody else removes it");
}

#[tokio::test]
async fn cancel_build_running() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let build = client.submit(form()).await;
    let path = format!("/builds/{}", build["id"].as_str().unwrap());
    server.scheduler.claim().await;
    assert_eq!(client.delete(&path).await.status(), 204);
    assert_eq!(client.json(&path).await["status"], "cancelled", "by the time of the answer");
}

#[tokio::test]
async fn cancel_build_not_found() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    refusal(client.delete("/builds/nobody").await, 404, "not_found").await;
}

#[tokio::test]
async fn cancel_build_completed() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let build = client.submit(form()).await;
    let path = format!("/builds/{}", build["id"].as_str().unwrap());
    let claimed = server.scheduler.claim().await;
    let (id, fence) = (&claimed.build.id, claimed.fence);
    server.scheduler.change(id, fence, Change::Push, None).await.unwrap();
    server.scheduler.change(id, fence, Change::Publish("sha256:aa".into()), None).await.unwrap();
    refusal(client.delete(&path).await, 409, "publishing").await;
    server.scheduler.change(id, fence, Change::Finish, Some(Status::Ready)).await.unwrap();
    let body = refusal(client.delete(&path).await, 409, "finished").await;
    assert!(body["message"].as_str().unwrap().contains("ready"), "{body}");
    assert_eq!(client.json(&path).await["status"], "ready");
}

#[tokio::test]
async fn a_claim_that_nobody_here_holds_is_a_conflict() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let build = client.submit(form()).await;
    server.store.claim("another process", 1, &[]).await.unwrap().unwrap();
    let path = format!("/builds/{}", build["id"].as_str().unwrap());
    refusal(client.delete(&path).await, 409, "conflict").await;
}

#[tokio::test]
async fn an_idempotency_key_makes_one_build() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let send = async |key: &str, form: Form| {
        let request = client.request(Method::POST, "/builds").header("Idempotency-Key", key);
        request.multipart(form).send().await.unwrap()
    };
    let first: serde_json::Value = send("k1", form().text("cpus", "1")).await.json().await.unwrap();
    let again = send("k1", Form::new().text("cpus", "1").part("source", source())).await;
    assert_eq!(again.status(), 202);
    assert_eq!(again.json::<serde_json::Value>().await.unwrap(), first);
    assert_eq!(server.source_dirs(), 1, "the second source is gone");

    refusal(send("k1", form().text("cpus", "2")).await, 422, "idempotency_key_reused").await;
    let other = Form::new().text("cpus", "1").part("source", Part::bytes(gzip(1001)));
    refusal(send("k1", other).await, 422, "idempotency_key_reused").await;
    assert_eq!(server.source_dirs(), 1);

    // Another key, and another tenant's key of that name.
    assert_ne!(
        send("k2", form().text("cpus", "1")).await.json::<serde_json::Value>().await.unwrap(),
        first
    );
    let other = server.client("other", Role::Tenant).await;
    let request = other.request(Method::POST, "/builds").header("Idempotency-Key", "k1");
    assert_eq!(request.multipart(form()).send().await.unwrap().status(), 202);

    assert_eq!(send(&"k".repeat(255), form()).await.status(), 202);
    for bad in ["", &"k".repeat(256)] {
        refusal(send(bad, form()).await, 400, "invalid_header").await;
    }
}
