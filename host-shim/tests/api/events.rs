//! The event stream, byte by byte where that matters.

use std::time::Duration;

use futures_util::StreamExt;
use kiln::api::Limits;
use kiln::build::{BuildId, Status};
use kiln::events::payload;
use kiln::store::Role;
use kiln_protocol::event::LogStream;
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::support::{Client, form, id_of, refusal, server, server_with};

async fn stream(client: &Client<'_>, id: &BuildId, follow: bool, last: Option<&str>) -> Response {
    let mut request = client.request(Method::GET, &format!("/builds/{id}/events?follow={follow}"));
    if let Some(last) = last {
        request = request.header("Last-Event-ID", last);
    }
    request.send().await.unwrap()
}

/// One block of a stream.
#[derive(Debug, PartialEq)]
struct Block {
    id: Option<u64>,
    event: String,
    retry: bool,
    data: Value,
}

fn blocks(text: &str) -> Vec<Block> {
    assert!(text.is_empty() || text.ends_with("\n\n"), "{text:?}");
    text.split_terminator("\n\n").map(block).collect()
}

/// Reads a block strictly: each field once, no comments, always data.
fn block(text: &str) -> Block {
    let mut fields = std::collections::BTreeMap::new();
    for line in text.lines() {
        let (name, value) = line.split_once(": ").unwrap();
        assert_eq!(fields.insert(name, value), None, "{text:?}");
    }
    let data: Value = serde_json::from_str(fields.remove("data").unwrap()).unwrap();
    let event = fields.remove("event").unwrap().to_owned();
    assert_eq!(data["type"], event);
    data["timestamp"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let retry = fields.remove("retry");
    assert!(retry.is_none_or(|r| r == "1000"));
    let id = fields.remove("id").map(|id| id.parse().unwrap());
    assert_eq!(fields.len(), 0, "{text:?}");
    Block { id, event, retry: retry.is_some(), data }
}

#[tokio::test]
async fn get_build_logs_framing() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let id = id_of(&client.submit(form()).await);
    let line = |bytes: &[u8]| {
        payload::of_host(1_500, payload::log(LogStream::Stdout, Some(1), false, bytes))
    };
    server.events.append(&id, &[line(b"hello\r"), line(b"\xff")]).await.unwrap();

    let response = stream(&client, &id, false, None).await;
    assert_eq!(response.status(), 200);
    let headers = response.headers();
    assert_eq!(headers["content-type"], "text/event-stream");
    assert_eq!(headers["cache-control"], "no-store");
    assert_eq!(headers["x-accel-buffering"], "no");
    assert_eq!(headers.get("content-encoding"), None);
    let text = response.text().await.unwrap();
    let (first, rest) = text.split_once("\n\n").unwrap();
    let lines: Vec<_> = first.lines().collect();
    assert_eq!(lines[..3], ["id: 1", "event: status", "retry: 1000"]);
    assert!(lines[3].starts_with("data: {") && lines.len() == 4, "{first}");
    assert_eq!(
        rest,
        "id: 2\nevent: log\ndata: {\"content\":\"hello\\r\",\"step\":1,\"stream\":\"stdout\",\
         \"timestamp\":\"1970-01-01T00:00:01.500Z\",\"type\":\"log\"}\n\n\
         id: 3\nevent: log\ndata: {\"content\":\"\u{fffd}\",\"content_b64\":\"/w==\",\"step\":1,\"stream\":\"stdout\",\
         \"timestamp\":\"1970-01-01T00:00:01.500Z\",\"type\":\"log\"}\n\n"
    );
}

#[tokio::test]
async fn get_build_logs_of_a_finished_build_end_either_way() {
    let server = server().await;
    let client = server.client("acme", Role::Reader).await;
    let owner = server.client("acme", Role::Tenant).await;
    let id = id_of(&owner.submit(form()).await);
    server.scheduler.publish(&server.scheduler.claim().await, "sha256:aa").await;
    for follow in [true, false] {
        let text = stream(&client, &id, follow, None).await.text().await.unwrap();
        let statuses: Vec<_> =
            blocks(&text).into_iter().map(|b| b.data["status"].clone()).collect();
        assert_eq!(statuses, ["queued", "building", "pushing", "ready"]);
    }
    // A parameter that is left out is false.
    let text = client.get(&format!("/builds/{id}/events")).await.text().await.unwrap();
    assert_eq!(blocks(&text).len(), 4);
}

#[tokio::test]
async fn last_event_id_continues_after_it() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let id = id_of(&client.submit(form()).await);
    server.scheduler.publish(&server.scheduler.claim().await, "sha256:aa").await;
    for (last, expected) in
        [("0", vec![1, 2, 3, 4]), ("2", vec![3, 4]), ("4", vec![]), ("99", vec![])]
    {
        for follow in [true, false] {
            let text = stream(&client, &id, follow, Some(last)).await.text().await.unwrap();
            let blocks = blocks(&text);
            assert_eq!(blocks.iter().filter_map(|b| b.id).collect::<Vec<_>>(), expected, "{last}");
            assert!(blocks.iter().enumerate().all(|(n, b)| b.retry == (n == 0)));
        }
    }
    for bad in ["", "x", "-1", "+1", "1.5", "99999999999999999999"] {
        refusal(stream(&client, &id, true, Some(bad)).await, 400, "invalid_header").await;
    }
    for bad in ["follow=yes", "follow=1", "follow=", "follow=true&follow=true", "tail=5"] {
        let response = client.get(&format!("/builds/{id}/events?{bad}")).await;
        let code = if bad == "tail=5" { "unknown_parameter" } else { "invalid_query" };
        refusal(response, 400, code).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_join_while_events_are_stored_see_each_once() {
    const LINES: u64 = 300;
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let id = id_of(&client.submit(form()).await);
    let writer = tokio::spawn({
        let (events, id) = (server.events.clone(), id.clone());
        async move {
            for n in 0..LINES {
                let line = payload::of_host(1, payload::kiln_log(&n.to_string()));
                events.append(&id, &[line]).await.unwrap();
            }
            let last = payload::of_host(2, payload::status(Status::Cancelled, None));
            events.cancel_queued(&id, 2, &[last]).await.unwrap();
        }
    });
    let readers = (0..12).map(async |n| {
        // Broken off at a place of its own, and continued from the last id.
        let mut response = stream(&client, &id, true, None).await.bytes_stream();
        let (mut text, mut seen) = (String::new(), vec![]);
        while seen.len() < 10 * n {
            text.push_str(std::str::from_utf8(&response.next().await.unwrap().unwrap()).unwrap());
            let whole = text.rfind("\n\n").map_or(0, |at| at + 2);
            seen = blocks(&text[..whole]).iter().filter_map(|b| b.id).collect();
        }
        drop(response);
        let last = seen.last().map(ToString::to_string);
        let rest = stream(&client, &id, true, last.as_deref()).await.text().await.unwrap();
        seen.extend(blocks(&rest).iter().filter_map(|b| b.id));
        seen
    });
    for seen in futures_util::future::join_all(readers).await {
        assert_eq!(seen, (1..=LINES + 2).collect::<Vec<_>>());
    }
    writer.await.unwrap();
}

#[tokio::test]
async fn a_line_is_seen_before_the_build_ends() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let id = id_of(&client.submit(form()).await);
    let mut stream = stream(&client, &id, true, None).await.bytes_stream();
    let mut next =
        async || String::from_utf8(stream.next().await.unwrap().unwrap().to_vec()).unwrap();
    assert_eq!(blocks(&next().await)[0].data["status"], "queued");
    for n in 0..3 {
        server
            .events
            .append(&id, &[payload::of_host(1, payload::kiln_log(&n.to_string()))])
            .await
            .unwrap();
        assert_eq!(blocks(&next().await)[0].data["content"], n.to_string());
    }
}

#[tokio::test]
async fn silence_has_a_heartbeat_without_an_id() {
    let server = server_with(Limits::default(), Duration::from_millis(30)).await;
    let client = server.client("acme", Role::Tenant).await;
    let id = id_of(&client.submit(form()).await);
    let mut stream = stream(&client, &id, true, Some("1")).await.bytes_stream();
    for first in [true, false] {
        let text = String::from_utf8(stream.next().await.unwrap().unwrap().to_vec()).unwrap();
        let beat = &blocks(&text)[0];
        assert_eq!((beat.id, beat.event.as_str(), beat.retry), (None, "heartbeat", first));
        assert_eq!(beat.data.as_object().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_slow_reader_keeps_nobody_waiting() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let id = id_of(&client.submit(form()).await);
    // More than any socket's buffers hold.
    let line = payload::of_host(1, payload::kiln_log(&"x".repeat(16 * 1024)));
    let batch = vec![line; 64];
    let slow = stream(&client, &id, true, None).await;
    for _ in 0..10 {
        server.events.append(&id, &batch).await.unwrap();
    }
    let quick = stream(&client, &id, false, None).await.text().await.unwrap();
    assert_eq!(blocks(&quick).len(), 1 + 10 * 64);
    client.delete(&format!("/builds/{id}")).await;
    let late = blocks(&slow.text().await.unwrap());
    assert_eq!(
        late.iter().filter_map(|b| b.id).collect::<Vec<_>>(),
        (1..=10 * 64 + 2).collect::<Vec<_>>()
    );
    assert_eq!(late.last().unwrap().data["status"], json!("cancelled"));
}
