//! GET `/metrics`: who may read it, its form, and that it moves with what happens.

#![allow(clippy::float_cmp, reason = "counts are whole numbers")]

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use kiln::api::Limits;
use kiln::events::payload;
use kiln::instances::{Change, End, State};
use kiln::store::Role;
use kiln_protocol::event::LogStream;
use reqwest::Method;
use serde_json::json;

use crate::support::{Client, Pull, form, id_of, refusal, server, server_that, source};

/// Samples by name and labels as they are written; checked for form on the way.
struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    async fn of(client: &Client<'_>) -> Self {
        let response = client.get("/metrics").await;
        assert_eq!(response.status(), 200);
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        assert_eq!(response.headers()["content-type"], kind);
        Self::parse(&response.text().await.unwrap())
    }

    /// OpenMetrics 1.0, as far as this server writes it.
    fn parse(text: &str) -> Self {
        let body = text.strip_suffix("# EOF\n").expect("it has an end");
        let (mut types, mut helped) = (BTreeMap::new(), HashSet::new());
        let mut samples = BTreeMap::new();
        for line in body.lines() {
            if let Some(words) = line.strip_prefix("# ") {
                let mut words = words.splitn(3, ' ');
                let (keyword, family) = (words.next().unwrap(), words.next().unwrap());
                let rest = words.next().unwrap();
                assert!(family.starts_with("kiln_"), "{line}");
                match keyword {
                    "HELP" => assert!(helped.insert(family) && rest.len() > 5, "{line}"),
                    "TYPE" => assert!(types.insert(family, rest).is_none(), "{line}"),
                    "UNIT" => assert!(family.ends_with(&format!("_{rest}")), "{line}"),
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
            let suffixes = ["_total", "_bucket", "_sum", "_count", "_info", ""];
            let family = suffixes.iter().find_map(|suffix| {
                name.strip_suffix(suffix).filter(|family| types.contains_key(family))
            });
            let family = family.unwrap_or_else(|| panic!("{line} has no type"));
            assert!(helped.contains(family), "{line}");
            assert_eq!(types[family] == "counter", name.ends_with("_total"), "{line}");
            let before = samples.insert(series.to_owned(), value.parse().unwrap());
            assert!(before.is_none(), "{line} is there twice");
        }
        Self(samples)
    }

    fn get(&self, series: &str) -> f64 {
        *self.0.get(series).unwrap_or_else(|| panic!("no {series} in {:#?}", self.0.keys()))
    }

    fn has(&self, series: &str) -> bool {
        self.0.contains_key(series)
    }
}

#[tokio::test]
async fn it_takes_a_readers_token_or_none_where_the_server_is_set_so() {
    let server = server().await;
    refusal(server.anonymous().get("/metrics").await, 401, "unauthorized").await;
    for role in [Role::Reader, Role::Tenant, Role::Admin] {
        Metrics::of(&server.client("acme", role).await).await;
    }
    let open = server_that(Limits::default(), Duration::from_mins(10), true).await;
    Metrics::of(&open.anonymous()).await;
    refusal(open.anonymous().get("/builds").await, 401, "unauthorized").await;
}

#[tokio::test]
async fn counters_follow_builds_from_the_queue_to_their_ends() {
    let server = server().await;
    let client = server.client("acme", Role::Tenant).await;
    let before = Metrics::of(&client).await;
    assert_eq!(before.get("kiln_queue_builds"), 0.0);
    assert_eq!(before.get("kiln_queue_oldest_seconds"), 0.0);
    let ends = |outcome, cause| {
        format!("kiln_builds_finished_total{{outcome=\"{outcome}\",cause=\"{cause}\"}}")
    };
    // They are there from the start, so that the first one is a change.
    assert_eq!(before.get(&ends("ready", "none")), 0.0);
    assert_eq!(before.get(&ends("failed", "vm_lost")), 0.0);
    let info = format!("kiln_server_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_eq!(before.get(&info), 1.0);

    for _ in 0..3 {
        client.submit(form()).await;
    }
    let last = client.submit(form()).await;
    let queued = Metrics::of(&client).await;
    assert_eq!(queued.get("kiln_queue_builds"), 4.0);
    assert_eq!(queued.get("kiln_build_source_bytes_total"), 4000.0);
    let route = "kiln_http_requests_total{method=\"POST\",route=\"/builds\",status=\"2xx\"}";
    assert_eq!(queued.get(route), 4.0);

    let [published, failed, running] = [
        server.scheduler.claim().await,
        server.scheduler.claim().await,
        server.scheduler.claim().await,
    ];
    let line = payload::log(LogStream::Stdout, Some(1), false, b"twelve bytes");
    let id = &published.build.id;
    server.events.append(id, &[payload::of_host(2_000, line)]).await.unwrap();
    server.scheduler.publish(&published, "sha256:aa").await;
    server.scheduler.fail(&failed).await;
    let cancelled = client.delete(&format!("/builds/{}", id_of(&last))).await;
    assert_eq!(cancelled.status(), 204);

    let after = Metrics::of(&client).await;
    assert_eq!(after.get("kiln_queue_builds"), 0.0);
    assert_eq!(after.get("kiln_active_builds{status=\"building\"}"), 1.0);
    assert_eq!(after.get("kiln_active_builds{status=\"pushing\"}"), 0.0);
    assert_eq!(after.get(&ends("ready", "none")), 1.0);
    assert_eq!(after.get(&ends("failed", "step_failed")), 1.0);
    assert_eq!(after.get(&ends("cancelled", "none")), 1.0);
    assert_eq!(after.get("kiln_build_log_bytes_total"), 12.0);
    let count = |phase, outcome| {
        let series = format!("{{phase=\"{phase}\",outcome=\"{outcome}\"}}");
        after.get(&format!("kiln_build_phase_duration_seconds_count{series}"))
    };
    assert_eq!(count("queued", "done"), 3.0);
    assert_eq!(count("queued", "cancelled"), 1.0);
    assert_eq!(count("push", "done"), 1.0);
    assert_eq!(count("publish", "done"), 1.0);
    assert_eq!(count("boot", "failed"), 1.0);
    assert_eq!((after.get("kiln_kept_vms"), after.get("kiln_exec_sessions")), (0.0, 0.0));
    server.scheduler.fail(&running).await;
}

#[tokio::test]
async fn refusals_are_counted_by_their_cause() {
    let server = server().await;
    let reader = server.client("acme", Role::Reader).await;
    refusal(reader.post(form()).await, 403, "forbidden").await;
    refusal(reader.get("/builds/b1").await, 404, "not_found").await;
    refusal(reader.get("/nowhere").await, 404, "not_found").await;
    let metrics = Metrics::of(&reader).await;
    assert_eq!(metrics.get("kiln_http_errors_total{code=\"forbidden\"}"), 1.0);
    assert_eq!(metrics.get("kiln_http_errors_total{code=\"not_found\"}"), 2.0);
    let requests = |method, route| {
        metrics.get(&format!(
            "kiln_http_requests_total{{method=\"{method}\",route=\"{route}\",status=\"4xx\"}}"
        ))
    };
    assert_eq!(requests("POST", "/builds"), 1.0);
    assert_eq!(requests("GET", "/builds/{id}"), 1.0);
    assert_eq!(requests("GET", "none"), 1.0);
}

#[tokio::test]
async fn nothing_that_anybody_chose_is_in_it() {
    let server = server().await;
    let other = server.client("zebra-corp", Role::Tenant).await;
    let form = form()
        .text("image_name", "hidden-image:hidden-tag")
        .text("tags", json!({"hidden-key": "hidden-value"}).to_string())
        .text("target", "hidden-stage");
    let build = other.submit(form).await;
    let claimed = server.scheduler.claim().await;
    server.scheduler.fail(&claimed).await;
    for path in ["/builds/hidden-id", "/hidden-path", "/builds?hidden=1", "/instances/hidden"] {
        other.get(path).await;
    }
    let made_up = Method::from_bytes(b"HIDDEN").unwrap();
    other.request(made_up, "/builds").send().await.unwrap();
    let hidden = reqwest::multipart::Form::new().part("hidden-part", source());
    other.post(hidden).await;

    let text = server.client("acme", Role::Reader).await.get("/metrics").await;
    let text = text.text().await.unwrap();
    assert!(text.contains("method=\"other\""), "{text}");
    for name in ["zebra", "idden", "acme", "HIDDEN", build["id"].as_str().unwrap()] {
        assert!(!text.contains(name), "{name} is in it: {text}");
    }
}

#[tokio::test]
async fn without_a_store_there_is_the_rest() {
    let server = server_that(Limits::default(), Duration::from_mins(10), true).await;
    let client = server.client("acme", Role::Tenant).await;
    client.submit(form()).await;
    server.database.close().await;
    let metrics = Metrics::of(&server.anonymous()).await;
    assert_eq!(metrics.get("kiln_build_source_bytes_total"), 1000.0);
    // Nothing is said where nothing is known.
    assert!(!metrics.has("kiln_queue_builds") && !metrics.has("kiln_active_builds"));
}

#[tokio::test]
async fn instances_are_counted_by_state_start_and_end() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let states = async || {
        let now = Metrics::of(&client).await;
        let of = |state: State| now.get(&format!("kiln_instances{{state=\"{state}\"}}"));
        State::ALL.map(of)
    };
    let ends = async || {
        let now = Metrics::of(&client).await;
        let of = |outcome| now.get(&format!("kiln_instances_ended_total{{outcome=\"{outcome}\"}}"));
        (now.get("kiln_instances_started_total"), ["exited", "failed", "cancelled"].map(of))
    };
    assert_eq!((states().await, ends().await), ([0.0; 4], (0.0, [0.0; 3])));

    let mut paths = vec![];
    for name in ["runs", "waits", "fails"] {
        let body = json!({"image": "app", "name": name});
        let new = client.request(Method::POST, "/instances").json(&body).send().await.unwrap();
        paths.push(new.headers()["location"].to_str().unwrap().to_owned());
    }
    assert_eq!(states().await, [3.0, 0.0, 0.0, 0.0]);
    for change in [Change::Initialize, Change::Run] {
        server.runner.pull("runs", Pull::Change(change)).await;
    }
    server.runner.pull("fails", Pull::Change(Change::Initialize)).await;
    server.runner.pull("fails", Pull::End(End::failed("no VM"))).await;
    // Their ends are told to who follows them.
    let logs = |path: &str| format!("{path}/logs?follow=true");
    client.get(&logs(&paths[2])).await.text().await.unwrap();
    server.runner.pull("runs", Pull::Print(payload::kiln_log("up"))).await;
    let mut follow = client.get(&logs(&paths[0])).await;
    while !String::from_utf8_lossy(&follow.chunk().await.unwrap().unwrap()).contains("up") {}
    assert_eq!(states().await, [1.0, 0.0, 1.0, 1.0]);
    assert_eq!(ends().await, (1.0, [0.0, 1.0, 0.0]));

    server.runner.pull("runs", Pull::End(End::exited(3))).await;
    while follow.chunk().await.unwrap().is_some() {}
    assert_eq!(client.delete(&paths[1]).await.status(), 204);
    assert_eq!(states().await, [0.0, 0.0, 0.0, 2.0]);
    // The puppet's program runs at once, and ends as it is told to.
    assert_eq!(ends().await, (1.0, [2.0, 1.0, 0.0]));
}
