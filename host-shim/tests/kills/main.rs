//! A server that is killed again and again, at named points and at random moments, while clients submit builds: what was
//! acknowledged ends once, with every event once, and is in the registry once.
//!
//! `KILN_TEST_KILLS` says how often (25), `KILN_TEST_SEED` repeats a run.

#![allow(clippy::unwrap_used, missing_docs)]

mod agent;
mod full;
mod machine;
mod pressure;
mod read_only;
mod server;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use agent::{Agent, LINES, Place};
use server::Home;

/// Where the server can be made to end, see `src/points.rs`.
const POINTS: [&str; 12] = [
    "stored",
    "claimed",
    "started",
    "hello",
    "tokens",
    "events",
    "outcome",
    "publishing",
    "pushed",
    "ended",
    "recovering",
    "events:15",
];

const CLIENTS: usize = 4;

/// How long anything may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Numbers that a seed decides (splitmix64).
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

/// What was acknowledged: id by name.
type Acknowledged = Arc<Mutex<BTreeMap<String, String>>>;

/// A client that knows where the server is now, and tries until it is answered.
#[derive(Clone)]
struct Client {
    http: reqwest::Client,
    address: watch::Receiver<String>,
    token: String,
}

impl Client {
    async fn get(&self, path: &str) -> String {
        let begun = tokio::time::Instant::now();
        loop {
            let url = format!("http://{}{path}", *self.address.borrow());
            let asked = self.http.get(url).bearer_auth(&self.token).send().await;
            if let Ok(answer) = asked
                && answer.status().is_success()
                && let Ok(text) = answer.text().await
            {
                return text;
            }
            assert!(begun.elapsed() < PATIENCE, "{path} is not answered");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn build(&self, id: &str) -> Value {
        serde_json::from_str(&self.get(&format!("/builds/{id}")).await).unwrap()
    }

    /// Submits a build until it is acknowledged: with one key it is one build.
    async fn submit(&self, name: &str) -> String {
        let begun = tokio::time::Instant::now();
        loop {
            let source = reqwest::multipart::Part::bytes(source());
            let form = reqwest::multipart::Form::new()
                .part("source", source)
                .text("network_mode", "none")
                .text("image_name", name.to_owned());
            let url = format!("http://{}/builds", *self.address.borrow());
            let asked = self.http.post(url).bearer_auth(&self.token);
            let asked = asked.header("Idempotency-Key", name).multipart(form).send().await;
            if let Ok(answer) = asked {
                let status = answer.status();
                if let (202, Ok(build)) = (status.as_u16(), answer.json::<Value>().await) {
                    return build["id"].as_str().unwrap().to_owned();
                }
                assert!(matches!(status.as_u16(), 202 | 409 | 503), "{status}");
            }
            assert!(begun.elapsed() < PATIENCE, "{name} is not acknowledged");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn end(&self, id: &str) -> Value {
        let begun = tokio::time::Instant::now();
        loop {
            let build = self.build(id).await;
            if matches!(build["status"].as_str(), Some("ready" | "failed" | "cancelled")) {
                return build;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end: {build}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn source() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    let text = b"FROM scratch\n";
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    archive.append_data(&mut header, "Dockerfile", &text[..]).unwrap();
    archive.into_inner().unwrap()
}

/// Boots an agent for each VM that appears.
async fn boot(home: Arc<Home>, stop: CancellationToken) {
    boot_with(home, stop, 0).await;
}

/// The same, of builds whose images have a layer of so many bytes.
async fn boot_with(home: Arc<Home>, stop: CancellationToken, layer: usize) {
    let (agents, mut known) = (TaskTracker::new(), Vec::<Arc<Place>>::new());
    while !stop.is_cancelled() {
        // A file system may give the number of a directory that is gone to the next one, unless somebody holds it.
        known.retain(|place| !place.is_gone());
        let vms = home.run_dir().and_then(|dir| std::fs::read_dir(dir).ok());
        for vm in vms.into_iter().flatten().flatten() {
            let Some(place) = Place::of(&vm.path()) else { continue };
            if known.iter().all(|known| known.number() != place.number()) {
                let (place, name) =
                    (Arc::new(place), vm.file_name().to_string_lossy().into_owned());
                known.push(Arc::clone(&place));
                agents.spawn(Agent::new(place, name).with_layer(layer).run());
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    agents.close();
    agents.wait().await;
}

#[test]
fn what_is_acknowledged_survives_kills() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let kills = number("KILN_TEST_KILLS").unwrap_or(25);
    let seed = number("KILN_TEST_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("KILN_TEST_KILLS={kills} KILN_TEST_SEED={seed}");
    let mut dice = Dice(seed);
    let home = Arc::new(Home::new());
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut server = home.serve(None);
    let (told, address) = watch::channel(server.address.clone().expect("it starts"));
    let client = Client { http: reqwest::Client::new(), address, token: home.token() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (acknowledged, done) = (Acknowledged::default(), CancellationToken::new());
    let down = CancellationToken::new();
    let agents = runtime.spawn(boot(Arc::clone(&home), down.clone()));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (client, done) = (client.clone(), done.clone());
            let acknowledged = Arc::clone(&acknowledged);
            runtime.spawn(async move {
                for count in 0.. {
                    if done.is_cancelled() {
                        break;
                    }
                    let name = format!("c{number}-{count}");
                    let id = client.submit(&name).await;
                    acknowledged.lock().unwrap().insert(name, id.clone());
                    client.end(&id).await;
                }
            })
        })
        .collect();

    for _ in 0..kills {
        // Half of them at a point, if the server comes there; the others whenever it is.
        let point = (dice.throw(2) == 0)
            .then(|| POINTS[usize::try_from(dice.throw(POINTS.len() as u64)).unwrap()]);
        let most = if point.is_some() { 800 } else { dice.throw(500) };
        server.kill_within(Duration::from_millis(most));
        server = home.serve(point);
        // It may have ended as it started.
        match &server.address {
            Some(address) => told.send_replace(address.clone()),
            None => continue,
        };
    }
    server.kill_within(Duration::from_millis(dice.throw(500)));
    let server = home.serve(None);
    told.send_replace(server.address.clone().expect("it starts"));
    done.cancel();
    runtime.block_on(async {
        for client in clients {
            tokio::time::timeout(2 * PATIENCE, client).await.unwrap().unwrap();
        }
    });
    let names = acknowledged.lock().unwrap().clone();
    assert!(!home.processes().is_empty() || names.len() > CLIENTS, "nothing was built");
    let (mut attempts, mut published) = ([0; 3], BTreeMap::new());
    for (name, id) in &names {
        let build = runtime.block_on(client.end(id));
        let events = runtime.block_on(client.get(&format!("/builds/{id}/events")));
        check(name, &build, &events);
        attempts[usize::try_from(build["attempt"].as_u64().unwrap()).unwrap()] += 1;
        if build["status"] == "ready" {
            published.insert(name.clone(), build["image_digest"].as_str().unwrap().to_owned());
        }
    }
    println!("{} builds: {} in one attempt, {} in two", names.len(), attempts[1], attempts[2]);
    // Among so many some were in the middle of a build.
    let went_on = home.log().matches("resumed the session of an earlier server").count();
    println!("{went_on} times a build went on in its VM");
    assert!(went_on > 0 || kills < 20);
    // More than those that somebody waited for: none. Each has one tag, if it is ready, and no other image.
    let all: Vec<Value> =
        serde_json::from_str(&runtime.block_on(client.get("/builds?limit=200"))).unwrap();
    if all.len() < 200 {
        let ids: HashSet<_> = names.values().map(String::as_str).collect();
        assert_eq!(all.len(), names.len());
        assert!(all.iter().all(|build| ids.contains(build["id"].as_str().unwrap())));
    }
    server.stop();
    down.cancel();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, agents).await.unwrap().unwrap() });
    check_registry(&home, &published);
    assert_eq!(home.processes(), Vec::<std::path::PathBuf>::new());
    let left = |dir: std::path::PathBuf| std::fs::read_dir(dir).map_or(0, Iterator::count);
    assert_eq!(left(home.dir.path().join("data/builds")), 0, "sources or staging are left");
    assert_eq!(home.run_dir().map_or(0, left), 0, "directories of VMs are left");
}

/// One end, and every event once and in order.
#[track_caller]
fn check(name: &str, build: &Value, events: &str) {
    let data: Vec<Value> = events
        .lines()
        .filter_map(|line| Some(serde_json::from_str(line.strip_prefix("data:")?).unwrap()))
        .collect();
    let ids: Vec<u64> =
        events.lines().filter_map(|line| line.strip_prefix("id:")?.trim().parse().ok()).collect();
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>(), "{name}: {events}");
    let ends = data
        .iter()
        .filter(|event| matches!(event["status"].as_str(), Some("ready" | "failed" | "cancelled")));
    assert_eq!(ends.count(), 1, "{name}: {events}");
    let lines: Vec<_> = data
        .iter()
        .filter(|event| event["type"] == "log")
        .map(|event| event["content"].as_str().unwrap())
        .collect();
    let attempts: Vec<_> =
        lines.split(|line| line.contains("is built again")).map(<[&str]>::to_vec).collect();
    assert_eq!(attempts.len() as u64, build["attempt"].as_u64().unwrap(), "{name}: {events}");
    let whole: Vec<_> = (1..=LINES).map(|number| format!("line {number}")).collect();
    let (last, before) = attempts.split_last().unwrap();
    for lines in before {
        assert!(
            whole.iter().map(String::as_str).take(lines.len()).eq(lines.iter().copied()),
            "{name}: {events}"
        );
    }
    if build["status"] == "ready" {
        assert_eq!(*last, whole, "{name}: {events}");
        return;
    }
    // The one cause: two servers were killed while it was built, or one as it was published.
    assert_eq!(build["failure"]["kind"], "host_restarted", "{name}: {build}");
}

/// The registry has the one image of each build that is ready, and nothing else.
fn check_registry(home: &Home, published: &BTreeMap<String, String>) {
    let tenants = home.dir.path().join("data/registry/storage/docker/registry/v2/repositories/dev");
    let entries = |dir: &std::path::Path| -> Vec<String> {
        let all = std::fs::read_dir(dir).into_iter().flatten().flatten();
        all.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let found: BTreeMap<_, _> = entries(&tenants)
        .into_iter()
        .map(|name| {
            let manifests = entries(&tenants.join(&name).join("_manifests/revisions/sha256"));
            (name, manifests.join(" and "))
        })
        .collect();
    let expected: BTreeMap<_, _> = published
        .iter()
        .map(|(name, digest)| (name.clone(), digest.trim_start_matches("sha256:").to_owned()))
        .collect();
    assert_eq!(found, expected);
}
