//! `/instances`, over a registry with a few images and a runner that does as it is told.

use futures_util::StreamExt;
use kiln::build::Tenant;
use kiln::instances::disk::{self, DiskError};
use kiln::instances::quota::{Full, Quota};
use kiln::instances::{Change, End, InstanceId, State};
use kiln::store::Role;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::{Client, HOST, Pull, QUOTA, Server, refusal, server};

async fn create(client: &Client<'_>, body: Value) -> Response {
    client.request(Method::POST, "/instances").json(&body).send().await.unwrap()
}

async fn created(client: &Client<'_>, body: Value) -> Value {
    let response = create(client, body).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let instance: Value = response.json().await.unwrap();
    assert_eq!(location, format!("/instances/{}", instance["id"].as_str().unwrap()));
    instance
}

fn path(instance: &Value) -> String {
    format!("/instances/{}", instance["id"].as_str().unwrap())
}

fn line(text: &str) -> Pull {
    Pull::Print(json!({ "type": "log", "stream": "stdout", "content": text, "timestamp": "t" }))
}

/// The data of a stream's blocks.
async fn blocks(response: Response) -> Vec<Value> {
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

/// Waits for a state, which the instance's own stream tells.
async fn stopped(client: &Client<'_>, instance: &Value) -> Value {
    blocks(client.get(&format!("{}/logs?follow=true", path(instance))).await).await;
    client.json(&path(instance)).await
}

#[tokio::test]
async fn an_instance_lives_from_created_to_stopped() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let new = created(&client, json!({ "name": "web", "image": "app" })).await;
    assert_eq!((&new["state"], &new["name"]), (&json!("Created"), &json!("web")));
    assert_eq!((&new["image"], &new["size"]), (&json!("app"), &json!("1024MB")));
    assert!(new.get("exit_code").is_none(), "{new}");
    for (change, state) in [(Change::Initialize, "Initializing"), (Change::Run, "Running")] {
        server.runner.pull("web", Pull::Change(change)).await;
        server.runner.pull("web", line(state)).await;
        // The line comes after the state.
        let mut stream =
            client.get(&format!("{}/logs?follow=true", path(&new))).await.bytes_stream();
        let mut seen = String::new();
        while !seen.contains(state) {
            seen.push_str(std::str::from_utf8(&stream.next().await.unwrap().unwrap()).unwrap());
        }
        assert_eq!(client.json(&path(&new)).await["state"], state);
        assert_eq!(client.json(&format!("/instances?state={state}")).await[0]["name"], "web");
    }
    server.runner.pull("web", Pull::End(End::exited(7))).await;
    let end = stopped(&client, &new).await;
    assert_eq!((&end["state"], &end["exit_code"]), (&json!("Stopped"), &json!(7)));
    assert!(end["started_at"].is_string() && end["stopped_at"].is_string());
    let dir = server.instances_dir.join(new["id"].as_str().unwrap());
    assert!(dir.join("log").exists() && !dir.join("disk").exists());

    assert_eq!(client.delete(&path(&new)).await.status(), StatusCode::NO_CONTENT);
    refusal(client.get(&path(&new)).await, 404, "not_found").await;
    refusal(client.delete(&path(&new)).await, 404, "not_found").await;
    assert!(!dir.exists());
    assert_eq!(client.json("/instances").await, json!([]));
}

#[tokio::test]
async fn what_runs_is_what_the_image_and_the_user_say() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let body = json!({
        "name": "web", "image": "a/many", "cmd": ["now"], "env": { "B": "2" }, "vcpus": 2, "size": "2GB",
    });
    let new = created(&client, body).await;
    assert_eq!((&new["vcpus"], &new["size"]), (&json!(2), &json!("2048MB")));
    server.runner.pull("web", line("x")).await;
    let work = server.runner.work.lock().unwrap().remove("web").unwrap();
    let job = work.job;
    assert_eq!(job.args, ["/app", "now"]);
    assert_eq!(job.env, [("A".into(), "1".into()), ("B".into(), "2".into())]);
    assert_eq!((job.user.as_str(), job.working_dir.as_str()), ("app", "/srv"));
    assert_eq!((job.stop_signal, job.hostname.as_str()), (2, "web"));
    assert_eq!(new["image_digest"], work.image.digest.to_string());

    // The whole of it, as a layout.
    let dir = tempfile::tempdir().unwrap();
    let url = crate::registry::start().await;
    let backing = kiln::gateway::Backing::external(&url, None).unwrap();
    work.image.write_layout(&backing, dir.path()).await.unwrap();
    let index = std::fs::read(dir.path().join("index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["manifests"][0]["digest"], work.image.digest.to_string());
    assert_eq!(std::fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count(), 3);
}

#[tokio::test]
async fn every_way_to_name_an_image_is_understood_and_others_are_refused() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let first = created(&client, json!({ "image": "a/app:latest" })).await;
    let digest = first["image_digest"].as_str().unwrap();
    for image in [
        format!("{HOST}/a/app@{digest}"),
        format!("a/app@{digest}"),
        "registry.kiln/base/debian".to_owned(),
        "base/debian:latest".to_owned(),
    ] {
        let new = created(&client, json!({ "image": image })).await;
        assert!(new["name"].as_str().unwrap().starts_with("run-"), "{new}");
    }
    for (image, status, code) in [
        ("docker.io/library/debian", 422, "other_registry"),
        ("A B", 422, "invalid_field"),
        ("a/nothing", 404, "image_not_found"),
        ("b/app", 404, "image_not_found"),
        ("builds/b1", 404, "image_not_found"),
        ("a/arm", 422, "image_not_runnable"),
        ("a/bare", 422, "invalid_command"),
    ] {
        refusal(create(&client, json!({ "image": image })).await, status, code).await;
    }
    created(&client, json!({ "image": "a/bare", "cmd": ["/x"] })).await;
    // An administrator runs whatever it may pull.
    let admin = server.client("root", Role::Admin).await;
    created(&admin, json!({ "image": "b/app" })).await;
    created(&admin, json!({ "image": "builds/b1" })).await;
}

#[tokio::test]
async fn what_is_not_asked_for_rightly_is_refused() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    for (body, code) in [
        (json!({}), "missing_field"),
        (json!({ "image": "app", "volumes": [] }), "unknown_field"),
        (json!({ "image": "app", "size": "1 potato" }), "invalid_field"),
        (json!([]), "invalid_field"),
        (json!({ "image": "app", "cmd": ["a\u{0}b"] }), "invalid_command"),
        (json!({ "image": "app", "cmd": ["x".repeat(40_000)] }), "invalid_command"),
    ] {
        refusal(create(&client, body).await, 422, code).await;
    }
    created(&client, json!({ "image": "app", "name": "web" })).await;
    refusal(create(&client, json!({ "image": "app", "name": "web" })).await, 409, "name_taken")
        .await;
    // Nothing of what was refused is left.
    assert_eq!(std::fs::read_dir(&server.instances_dir).unwrap().count(), 1);
    refusal(client.get("/instances?state=x").await, 400, "invalid_query").await;
    refusal(client.get("/instances?limit=1").await, 400, "unknown_parameter").await;
}

#[tokio::test]
async fn another_tenants_instance_is_unknown_and_a_reader_only_reads() {
    let server = server().await;
    let (a, b) = (server.client("a", Role::Tenant).await, server.client("b", Role::Tenant).await);
    let new = created(&a, json!({ "image": "app", "name": "web" })).await;
    let of_b = created(&b, json!({ "image": "app", "name": "web" })).await;
    for path in [path(&new), "/instances/NOT-AN-ID".into(), "/instances/i-unknown".into()] {
        refusal(b.get(&path).await, 404, "not_found").await;
        refusal(b.delete(&path).await, 404, "not_found").await;
        refusal(b.get(&format!("{path}/logs")).await, 404, "not_found").await;
    }
    assert_eq!(a.json("/instances").await.as_array().unwrap().len(), 1);
    let reader = server.client("a", Role::Reader).await;
    assert_eq!(reader.json(&path(&new)).await["name"], "web");
    refusal(reader.delete(&path(&new)).await, 403, "forbidden").await;
    refusal(create(&reader, json!({ "image": "app" })).await, 403, "forbidden").await;
    refusal(server.anonymous().get("/instances").await, 401, "unauthorized").await;
    let admin = server.client("root", Role::Admin).await;
    assert_eq!(admin.json("/instances").await.as_array().unwrap().len(), 2);
    assert_eq!(admin.delete(&path(&of_b)).await.status(), StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn a_log_is_lines_for_hypeman_and_events_for_kiln() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let new = created(&client, json!({ "image": "app", "name": "web" })).await;
    let logs = format!("{}/logs", path(&new));
    for text in ["one", "two", "three"] {
        server.runner.pull("web", line(text)).await;
    }
    server.runner.pull("web", Pull::End(End { exit_code: Some(3), message: None })).await;
    let all = client.get(&format!("{logs}?follow=true")).await;
    assert_eq!(blocks(all).await, [json!("one"), json!("two"), json!("three")]);
    let tail = client.get(&format!("{logs}?tail=2&source=app")).await;
    assert_eq!(blocks(tail).await, [json!("two"), json!("three")]);

    let text = client.get(&format!("{logs}?format=events")).await.text().await.unwrap();
    assert!(text.starts_with("id: ") && text.contains("event: log\n"), "{text}");
    let after = text.lines().next().unwrap().strip_prefix("id: ").unwrap().to_owned();
    let rest = client.request(Method::GET, &format!("{logs}?format=events"));
    let rest = blocks(rest.header("last-event-id", after).send().await.unwrap()).await;
    let said: Vec<_> = rest.iter().map(|event| event["content"].clone()).collect();
    assert_eq!(said, [json!("two"), json!("three"), Value::Null]);
    assert_eq!((&rest[2]["status"], &rest[2]["exit_code"]), (&json!("Stopped"), &json!(3)));

    refusal(client.get(&format!("{logs}?source=vmm")).await, 400, "invalid_query").await;
    refusal(client.get(&format!("{logs}?tail=x")).await, 400, "invalid_query").await;
}

#[tokio::test]
async fn who_follows_a_deleted_instance_sees_its_end() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let new = created(&client, json!({ "image": "app", "name": "web" })).await;
    server.runner.pull("web", line("up")).await;
    let follow = client.get(&format!("{}/logs?follow=true&format=events", path(&new))).await;
    assert_eq!(client.delete(&path(&new)).await.status(), StatusCode::NO_CONTENT);
    let seen = blocks(follow).await;
    let last = seen.last().unwrap();
    assert_eq!((&last["status"], &last["exit_code"]), (&json!("Stopped"), &json!(143)));
    assert_eq!(seen[0]["content"], "up");
    assert_eq!(std::fs::read_dir(&server.instances_dir).unwrap().count(), 0);
}

#[tokio::test]
async fn a_server_that_stops_ends_its_instances_and_the_next_one_cleans_up() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let new = created(&client, json!({ "image": "app", "name": "web" })).await;
    server.runner.pull("web", line("up")).await;
    // What a server that was killed leaves: a row that is not stopped, and files of nobody.
    let id = InstanceId::parse(new["id"].as_str().unwrap()).unwrap();
    let mut left = server.store.instance(&id).await.unwrap().unwrap();
    left.id = InstanceId::parse("left").unwrap();
    left.name = "left".into();
    server.store.insert_instance(&left, 100).await.unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    stop.cancel();
    server.instances.clone().run(stop).await;
    let ended = client.json(&path(&new)).await;
    assert_eq!((&ended["state"], &ended["exit_code"]), (&json!("Stopped"), &json!(143)));
    assert_eq!(ended["exit_message"], "the server stopped");
    refusal(create(&client, json!({ "image": "app" })).await, 503, "stopping").await;

    for (dir, file) in [("left", "log"), ("left", "disk"), ("nobody", "disk")] {
        std::fs::create_dir_all(server.instances_dir.join(dir)).unwrap();
        std::fs::write(server.instances_dir.join(dir).join(file), "x").unwrap();
    }
    server.instances.recover().await.unwrap();
    let left = server.store.instance(&left.id).await.unwrap().unwrap();
    assert_eq!((left.state, left.exit_code), (State::Stopped, None));
    assert!(left.exit_message.unwrap().contains("restarted"));
    assert!(server.instances_dir.join("left/log").exists());
    assert!(!server.instances_dir.join("left/disk").exists());
    assert!(!server.instances_dir.join("nobody").exists());
}

/// Each keeps a log on the host's disk.
#[tokio::test]
async fn a_tenant_has_only_so_many() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    for _ in 0..98 {
        created(&client, json!({ "image": "app" })).await;
    }
    // However many ask at one time, no more get in than there is room for.
    let asked = (0..6).map(|_| create(&client, json!({ "image": "app" })));
    let answers = futures_util::future::join_all(asked).await;
    let of = |status| answers.iter().filter(|answer| answer.status() == status).count();
    let counts = (of(StatusCode::CREATED), of(StatusCode::TOO_MANY_REQUESTS));
    assert_eq!(counts, (2, 4));
    assert_eq!(std::fs::read_dir(&server.instances_dir).unwrap().count(), 100);
    refusal(create(&client, json!({ "image": "app" })).await, 429, "too_many_instances").await;
    // Another tenant's do not count.
    let other = server.client("b", Role::Tenant).await;
    created(&other, json!({ "image": "app" })).await;
    let one = &client.json("/instances").await[0];
    assert_eq!(client.delete(&path(one)).await.status(), StatusCode::NO_CONTENT);
    created(&client, json!({ "image": "app" })).await;
    drop_all(&server).await;
}

/// Half of what there is for all.
#[tokio::test]
async fn logs_of_a_tenant_have_a_bound_and_count_until_they_are_deleted() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let half = usize::try_from(QUOTA / 2).unwrap();
    let first = created(&client, json!({ "image": "app", "name": "first" })).await;
    server.runner.pull("first", line(&"x".repeat(half - 1000))).await;
    server.runner.pull("first", Pull::End(End::exited(0))).await;
    assert_eq!(stopped(&client, &first).await["exit_code"], 0);
    let second = created(&client, json!({ "image": "app", "name": "second" })).await;
    server.runner.pull("second", line(&"x".repeat(1000))).await;
    let message = stopped(&client, &second).await["exit_message"].clone();
    let message = message.as_str().unwrap();
    assert!(message.contains("log") && message.contains("--instance-disks-gb"), "{message}");
    // Another tenant is not in the way of it.
    let other = server.client("b", Role::Tenant).await;
    let others = created(&other, json!({ "image": "app", "name": "other" })).await;
    server.runner.pull("other", line(&"x".repeat(half - 1000))).await;
    server.runner.pull("other", Pull::End(End::exited(0))).await;
    assert_eq!(stopped(&other, &others).await["exit_code"], 0);

    // A server that begins anew counts what there is.
    let mut held = server.quota.hold(&Tenant::new("a").unwrap());
    assert!(held.resize(2000).is_err());
    server.instances.recover().await.unwrap();
    assert!(held.resize(2000).is_err());
    for instance in [&first, &second] {
        assert_eq!(client.delete(&path(instance)).await.status(), StatusCode::NO_CONTENT);
    }
    held.resize(2000).unwrap();
}

#[tokio::test]
async fn an_images_disk_is_made_counted_and_gone_with_its_last_user() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let new = created(&client, json!({ "image": "a/real", "name": "web" })).await;
    server.runner.pull("web", line("x")).await;
    let image = server.runner.work.lock().unwrap().remove("web").unwrap().image;
    let url = crate::registry::start().await;
    let backing = kiln::gateway::Backing::external(&url, None).unwrap();
    let tenant = Tenant::new("a").unwrap();
    let make = async |most: u64, cancel: &CancellationToken| {
        let quota = Quota::new(most);
        let dir = tempfile::tempdir().unwrap();
        let disk = disk::prepare(&backing, &image, dir.path(), quota.hold(&tenant), cancel).await;
        (quota, dir, disk)
    };
    let never = CancellationToken::new();
    let (quota, dir, ready) = make(1 << 30, &never).await;
    let ready = ready.unwrap();
    assert!(ready.file.metadata().unwrap().len() > 1 << 20);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let fits = |bytes| quota.hold(&tenant).resize(bytes).is_ok();
    assert!(!fits(1 << 29), "the disk counts");
    drop(ready);
    assert!(fits(1 << 29));

    // Too large as it is stored, and as a disk.
    for most in [100, image.stored_bytes() * 2] {
        let (quota, _dir, refused) = make(most, &never).await;
        let share = Err(Full::Tenant { share: most.div_ceil(2) });
        assert!(matches!(refused, Err(DiskError::Full(Full::Tenant { .. }))), "{refused:?}");
        let mut all = quota.hold(&tenant);
        all.resize(most / 2).unwrap();
        assert_eq!(all.resize(most / 2 + 1), share);
    }
    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let (_, _, gone) = make(1 << 30, &cancelled).await;
    assert!(matches!(gone, Err(DiskError::Cancelled)), "{gone:?}");
    assert_eq!(client.delete(&path(&new)).await.status(), StatusCode::NO_CONTENT);
}

async fn drop_all(server: &Server) {
    let stop = tokio_util::sync::CancellationToken::new();
    stop.cancel();
    server.instances.clone().run(stop).await;
}
