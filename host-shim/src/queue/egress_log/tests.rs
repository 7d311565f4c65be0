//! A record over a real store.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::build::{Build, Change, NetworkMode, Request, Tenant};
use crate::egress::domains::Domain;
use crate::events::payload;
use crate::store::Store;
use crate::store::sqlite::SqliteStore;

struct Bench {
    _dir: TempDir,
    store: Arc<dyn Store>,
    record: Arc<EgressRecord>,
    id: BuildId,
}

async fn bench(reach: Reach) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(dir.path()).await.unwrap());
    let id = BuildId::new("b1").unwrap();
    let request = Request {
        dockerfile: None,
        target: None,
        image_name: None,
        build_args: BTreeMap::new(),
        tags: BTreeMap::new(),
        base_image_digest: None,
        network: NetworkMode::Open,
        allowed_domains: vec![],
        secrets: vec![],
        timeout_seconds: 1,
        memory_mb: 256,
        cpus: 1,
        disk_gb: 1,
        keep_failed_seconds: 0,
        priority: 50,
        source_digest: String::new(),
        source_bytes: 0,
    };
    let build = Build::queued(id.clone(), Tenant::new("acme").unwrap(), request, 1);
    store.insert_build(&build, &[], None, &[]).await.unwrap();
    let record = EgressRecord::new(id.clone(), EventLog::new(Arc::clone(&store)), reach);
    Bench { _dir: dir, store, record, id }
}

impl Bench {
    async fn events(&self) -> Vec<Value> {
        let stored = self.store.events_after(&self.id, 0, 10_000).await.unwrap();
        stored.into_iter().map(|event| event.payload).collect()
    }
}

fn egress(step: u32, host: &str, allowed: bool) -> Value {
    json!({"type": "egress", "step": step, "host": host, "allowed": allowed})
}

#[tokio::test]
async fn each_host_of_a_step_is_told_once_and_every_port_is_recorded() {
    let bench = bench(Reach::Public).await;
    for _ in 0..3 {
        bench.record.reached(Some(1), "A.test.", 443);
        bench.record.reached(Some(1), "a.test", 8443);
        bench.record.refused(Some(1), "10.0.0.1", 80, Denied::NotListed);
        bench.record.asked(Some(1), "b.test");
        bench.record.reached(Some(2), "a.test", 443);
    }
    let all = bench.record.close().await;
    let reached = |port| Reached { host: "a.test".into(), port };
    assert_eq!(all.reached, [reached(443), reached(8443)]);
    let fates: Vec<_> =
        all.wanted.iter().map(|s| (s.step, s.host.as_str(), s.port, s.fate)).collect();
    assert_eq!(
        fates,
        [
            (Some(1), "a.test", Some(443), Fate::Reached),
            (Some(1), "a.test", Some(8443), Fate::Reached),
            (Some(1), "10.0.0.1", Some(80), Fate::Denied(Denied::NotListed)),
            (Some(1), "b.test", None, Fate::Asked { listed: true }),
            (Some(2), "a.test", Some(443), Fate::Reached),
        ]
    );
    assert_eq!(
        bench.events().await,
        [
            egress(1, "a.test", true),
            egress(1, "10.0.0.1", false),
            egress(1, "b.test", false),
            egress(2, "a.test", true),
        ]
    );
}

#[tokio::test]
async fn a_name_on_the_list_is_one_that_the_proxy_reaches() {
    let bench = bench(Reach::Listed([Domain::parse("*.a.test:8080").unwrap()].into())).await;
    bench.record.asked(None, "x.a.test");
    bench.record.asked(None, "a.test");
    let wanted = bench.record.close().await.wanted;
    let fates: Vec<_> = wanted.into_iter().map(|seen| seen.fate).collect();
    assert_eq!(fates, [Fate::Asked { listed: true }, Fate::Asked { listed: false }]);
}

#[tokio::test]
async fn refusals_are_bounded_and_do_not_hide_what_was_reached() {
    let bench = bench(Reach::Public).await;
    for n in 0..MOST_TOLD + 100 {
        bench.record.asked(Some(1), &format!("n{n}.test"));
    }
    // A mirror that every step of many uses is one host.
    for step in 0..100 {
        bench.record.reached(Some(step), "mirror.test", 80);
    }
    for n in 0..MOST_TOLD {
        bench.record.reached(Some(1), &format!("n{n}.test"), 443);
    }
    let all = bench.record.close().await;
    assert_eq!((all.wanted.len(), all.reached.len()), (2 * MOST_TOLD, MOST_REACHED));
    let events = bench.events().await;
    let lines: Vec<_> = events.iter().filter_map(|event| event["content"].as_str()).collect();
    assert_eq!(
        lines,
        [
            "steps were refused more than 1000 hosts; further ones are not told",
            "steps reached more than 256 hosts and ports; the build's record has the first",
            "steps reached more than 1000 hosts; further ones are not told",
        ]
    );
    assert_eq!(events.len(), 2 * MOST_TOLD + 3);
}

#[tokio::test]
async fn nothing_follows_the_end_of_the_build() {
    let bench = bench(Reach::Public).await;
    bench.record.reached(Some(1), "a.test", 443);
    assert_eq!(bench.record.close().await.reached.len(), 1);
    let end = payload::of_host(9, payload::status(crate::build::Status::Failed, None));
    let claimed = bench.store.claim("me", 2, &[]).await.unwrap().unwrap();
    let failed = Change::Fail(crate::build::Failure::new(crate::build::FailureKind::Internal, "x"));
    bench.store.change(&bench.id, claimed.fence, failed, 3, &[end]).await.unwrap();
    // As a session in a kept VM does.
    bench.record.reached(None, "b.test", 443);
    assert_eq!(bench.record.close().await, AllSeen::default());
    let types: Vec<_> = bench.events().await.into_iter().map(|e| e["type"].clone()).collect();
    assert_eq!(types, ["egress", "status"]);
}

#[tokio::test]
async fn hosts_show_no_secret_in_either_case() {
    let bench = bench(Reach::Public).await;
    let id = SecretId::new("key").unwrap();
    bench.record.asked(Some(1), "hunter2hunter2.before.test");
    bench.record.learn(&id, &SecretValue::new(b"Hunter2Hunter2".to_vec())).await;
    bench.record.refused(Some(1), "Hunter2Hunter2.evil.test", 443, Denied::NotListed);
    bench.record.asked(Some(1), "48756e7465723248756e74657232.evil.test");
    for n in 0..2 {
        bench.record.reached(
            Some(1),
            &format!("x{}.test", ["hunter2hunter2", "HUNTER2HUNTER2"][n]),
            443,
        );
    }
    let all = bench.record.close().await;
    assert_eq!(all.reached, [Reached { host: "x***.test".into(), port: 443 }]);
    let hosts: Vec<_> = all.wanted.into_iter().map(|seen| seen.host).collect();
    assert_eq!(hosts[..3], ["hunter2hunter2.before.test", "***.evil.test", "***.evil.test"]);
    assert_eq!(bench.events().await[1], egress(1, "***.evil.test", false));
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn so_many_refusals_are_logged_and_then_one_line_more() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    // The task runs on this thread.
    let _until_the_end = tracing::subscriber::set_default(subscriber);
    let bench = bench(Reach::Public).await;
    for n in 0..110 {
        bench.record.refused(Some(1), &format!("10.0.0.{n}"), 80, Denied::NotListed);
    }
    bench.record.close().await;
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<_> = text.lines().filter(|line| line.contains("refused")).collect();
    assert_eq!(lines.len(), 101, "{text}");
    let (last, each) = lines.split_last().unwrap();
    assert!(each.iter().all(|line| line.contains("a step was refused")), "{each:?}");
    assert!(last.contains("further refusals of this VM are not shown"), "{last}");
}
