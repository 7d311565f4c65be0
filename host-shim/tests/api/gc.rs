//! Rounds of retention that are asked for, and what readers are told afterwards.

use kiln::build::{BuildId, Change, Status};
use kiln::events::payload;
use kiln::store::Role;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Client, KEEP, Server, form, id_of, refusal, server};

const DAYS: i64 = 24 * 60 * 60 * 1000;

async fn collect(client: &Client<'_>) -> reqwest::Response {
    client.request(Method::POST, "/gc").send().await.unwrap()
}

/// A build of three lines that ended so many days ago.
async fn ended(server: &Server, client: &Client<'_>, days: i64) -> BuildId {
    let id = id_of(&client.submit(form()).await);
    let claimed = server.scheduler.claim().await;
    assert_eq!(claimed.build.id, id);
    let lines = [1, 2, 3].map(|n| payload::of_host(1_500, payload::kiln_log(&n.to_string())));
    server.events.append(&id, &lines).await.unwrap();
    let at = jiff::Timestamp::now().as_millisecond() - days * DAYS;
    let last = payload::of_host(at, payload::status(Status::Cancelled, None));
    server.events.change(&id, claimed.fence, Change::Cancel, at, &[last]).await.unwrap();
    id
}

#[tokio::test]
async fn administrators_have_old_things_removed_now() {
    let server = server().await;
    let admin = server.client("ops", Role::Admin).await;
    let client = server.client("acme", Role::Tenant).await;
    let older = i64::from(KEEP.builds_days) + 1;
    let ids = [
        ended(&server, &client, older).await,
        ended(&server, &client, i64::from(KEEP.logs_days) + 1).await,
        ended(&server, &client, i64::from(KEEP.logs_days) - 1).await,
    ];
    for (who, role) in [("acme", Role::Tenant), ("ops", Role::Reader)] {
        let other = server.client(who, role).await;
        refusal(collect(&other).await, 403, "forbidden").await;
    }
    refusal(collect(&server.anonymous()).await, 401, "unauthorized").await;
    // The scheduler of these tests removes no source: here are those of three finished builds.
    assert_eq!(server.source_dirs(), 3);
    let measured = server.store.log_bytes().await.unwrap();

    let response = collect(&admin).await;
    assert_eq!(response.status(), 200);
    let removed: Value = response.json().await.unwrap();
    assert_eq!(
        removed,
        json!({
            "log_events_removed": 6, "log_bytes_removed": measured / 3 * 2,
            "builds_removed": 1, "sessions_removed": 0, "sources_removed": 3,
            "images_removed": 0, "blobs_removed": 0, "blob_bytes_removed": 0,
        })
    );
    refusal(client.get(&format!("/builds/{}", ids[0])).await, 404, "not_found").await;
    refusal(client.get(&format!("/builds/{}/events", ids[0])).await, 404, "not_found").await;
    assert_eq!(client.json(&format!("/builds/{}", ids[1])).await["status"], "cancelled");
    let whole = client.get(&format!("/builds/{}/events", ids[2])).await.text().await.unwrap();
    assert!(whole.contains("id: 5\nevent: log") && !whole.contains("trimmed"), "{whole}");
    let metrics = admin.get("/metrics").await.text().await.unwrap();
    for counted in [
        "kiln_removed_total{what=\"log_event\"} 6\n",
        "kiln_removed_total{what=\"build\"} 1\n",
        "kiln_removed_total{what=\"session\"} 0\n",
        "kiln_removed_total{what=\"source\"} 3\n",
        "kiln_removed_total{what=\"image\"} 0\n",
        &format!("kiln_removed_log_bytes_total {}\n", measured / 3 * 2),
    ] {
        assert!(metrics.contains(counted), "{counted} {metrics}");
    }
    let again: Value = collect(&admin).await.json().await.unwrap();
    assert!(again.as_object().unwrap().values().all(|n| *n == 0), "{again}");
}

#[tokio::test]
async fn a_gap_is_one_block_with_the_last_number_as_its_id() {
    let server = server().await;
    let admin = server.client("ops", Role::Admin).await;
    let client = server.client("acme", Role::Tenant).await;
    let id = ended(&server, &client, i64::from(KEEP.logs_days) + 1).await;
    assert_eq!(collect(&admin).await.status(), 200);
    let read = async |query: &str, last: Option<&str>| {
        let request = client.request(Method::GET, &format!("/builds/{id}/events{query}"));
        let request = match last {
            Some(last) => request.header("Last-Event-ID", last),
            None => request,
        };
        request.send().await.unwrap().text().await.unwrap()
    };
    // 1 queued, 2 building, 3 to 5 log, 6 cancelled.
    let build = client.json(&format!("/builds/{id}")).await;
    let end = build["completed_at"].as_str().unwrap();
    let block = |from, retry: &str| {
        format!(
            "id: 5\nevent: trimmed\n{retry}data: {{\"from\":{from},\"timestamp\":\"{end}\",\"to\":5,\"type\":\"trimmed\"}}\n\n"
        )
    };
    for query in ["", "?follow=true"] {
        let whole = read(query, None).await;
        assert!(whole.contains(&format!("\n\n{}id: 6\n", block(3, ""))), "{whole}");
        assert_eq!(whole.matches("\n\n").count(), 4, "{whole}");
        let inside = read(query, Some("3")).await;
        assert!(inside.starts_with(&block(4, "retry: 1000\n")), "{inside}");
        let behind = read(query, Some("5")).await;
        assert!(behind.starts_with("id: 6\nevent: status\n"), "{behind}");
    }
}
