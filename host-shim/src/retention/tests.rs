//! Rounds over a real store.

use serde_json::json;

use super::*;
use crate::build::tests::request;
use crate::build::{Build, BuildId, Change, Failure, FailureKind, Tenant};
use crate::events::{Batch, EventLog, payload};
use crate::exec::{End, How, Session, Subject, Who};
use crate::store::sqlite::SqliteStore;
use crate::store::{NewEvent, Role, SessionFilter};

const DAYS: Millis = 24 * 60 * 60 * 1000;
const NOW: Millis = 1000 * DAYS;

struct Bench {
    dir: tempfile::TempDir,
    store: Arc<dyn Store>,
}

fn id(name: &str) -> BuildId {
    BuildId::new(name).unwrap()
}

fn build(name: &str) -> Build {
    Build::queued(id(name), Tenant::new("acme").unwrap(), request(), 1)
}

fn line(text: &str) -> NewEvent {
    payload::of_host(2, payload::kiln_log(text))
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(SqliteStore::open(dir.path()).await.unwrap());
        Self { dir, store }
    }

    fn retention(&self, keep: Keep) -> Retention {
        let sources = Sources::new(self.dir.path().join("builds"));
        let (store, kept, metrics) = (Arc::clone(&self.store), Kept::new(1), Metrics::default());
        Retention::new(store, kept, sources, metrics, keep, Room::default())
    }

    async fn collect(&self, keep: Keep) -> Collected {
        self.retention(keep).collect(NOW).await.unwrap()
    }

    /// A build that is under way.
    async fn begin(&self, name: &str) {
        let first = payload::of_host(1, json!({ "type": "status", "status": "queued" }));
        self.store.insert_build(&build(name), &[first], None, &[]).await.unwrap();
    }

    /// One that printed so many lines and failed.
    async fn failed(&self, name: &str, ended: Millis, lines: usize) {
        self.begin(name).await;
        let claimed = self.store.claim("me", 2, &[]).await.unwrap().unwrap();
        assert_eq!(claimed.build.id, id(name));
        let all: Vec<_> = (0..lines).map(|n| line(&n.to_string())).collect();
        for some in all.chunks(500) {
            self.store.append_events(&id(name), some).await.unwrap();
        }
        let failure = Failure::new(FailureKind::StepFailed, "it failed");
        let last = [
            payload::of_host(3, payload::failure(&failure)),
            payload::of_host(3, json!({ "type": "status", "status": "failed" })),
        ];
        let change = Change::Fail(failure);
        self.store.change(&id(name), claimed.fence, change, ended, &last).await.unwrap();
    }

    async fn seqs(&self, name: &str) -> Vec<u64> {
        let events = self.store.events_after(&id(name), 0, 10_000).await.unwrap();
        events.iter().map(|event| event.seq).collect()
    }

    async fn is_there(&self, name: &str) -> bool {
        self.store.build(&id(name)).await.unwrap().is_some()
    }
}

#[tokio::test]
async fn old_logs_go_and_why_it_failed_stays() {
    let bench = Bench::new().await;
    // More than a piece.
    bench.failed("old", NOW - 3 * DAYS, 2 * BATCH as usize + 1).await;
    bench.failed("young", NOW - 2 * DAYS, 2).await;
    bench.begin("active").await;
    bench.store.append_events(&id("active"), &[line("x")]).await.unwrap();
    let keep = Keep { logs_days: 2, ..Keep::default() };
    let collected = bench.collect(keep).await;
    let last = 2 * u64::from(BATCH) + 3;
    assert_eq!(collected.log_events, 2 * u64::from(BATCH) + 1);
    assert_eq!((collected.builds, collected.sessions), (0, 0));
    assert_eq!(bench.seqs("old").await, [1, last, last + 1]);
    assert_eq!(bench.seqs("young").await, [1, 2, 3, 4, 5]);
    assert_eq!(bench.seqs("active").await, [1, 2]);
    let failed = bench.store.build(&id("old")).await.unwrap().unwrap();
    assert_eq!(failed.failure.unwrap().message, "it failed");
    assert_eq!(bench.collect(keep).await, Collected::default(), "there is nothing left to do");
}

#[tokio::test]
async fn the_oldest_logs_go_until_the_rest_is_small_enough() {
    let bench = Bench::new().await;
    for (name, ended) in [("second", 20), ("first", 10), ("third", 30)] {
        bench.failed(name, NOW + ended, 9).await;
    }
    let of_one = bench.store.log_bytes().await.unwrap() / 3;
    let keep = |logs_bytes| Keep { logs_bytes, ..Keep::default() };
    assert_eq!(bench.collect(keep(3 * of_one)).await, Collected::default());
    let collected = bench.collect(keep(3 * of_one - 1)).await;
    assert_eq!((collected.log_events, collected.log_bytes), (9, of_one));
    assert_eq!((bench.seqs("first").await.len(), bench.seqs("second").await.len()), (3, 12));
    // What is under way does not count.
    bench.begin("active").await;
    bench.store.append_events(&id("active"), &[line(&"x".repeat(10_000))]).await.unwrap();
    assert_eq!(bench.collect(keep(2 * of_one)).await, Collected::default());
    assert_eq!(bench.collect(keep(1)).await.log_events, 18);
    assert_eq!(bench.store.log_bytes().await.unwrap(), 0);
    assert_eq!(bench.seqs("active").await, [1, 2]);
}

#[tokio::test]
async fn a_follower_of_a_build_under_way_is_told_of_no_other() {
    let bench = Bench::new().await;
    bench.failed("old", 5, 300).await;
    bench.begin("active").await;
    let log = EventLog::new(Arc::clone(&bench.store));
    let mut follower = log.read(&id("active"), 0, true);
    let mut seen = vec![];
    let mut told = async |least: usize| {
        while seen.len() < least {
            let Batch::Events(blocks) = follower.next().await.unwrap() else { panic!("quiet") };
            seen.extend(blocks.parsed());
        }
        seen.iter().map(|(_, data)| data["type"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(told(1).await, ["status"]);
    log.append(&id("active"), &[line("1")]).await.unwrap();
    let collected = bench.collect(Keep { logs_days: 1, builds_days: 2, ..Keep::default() }).await;
    assert_eq!((collected.log_events, collected.builds), (300, 1));
    log.append(&id("active"), &[line("2")]).await.unwrap();
    assert_eq!(told(3).await, ["status", "log", "log"]);
    assert_eq!(bench.seqs("active").await, [1, 2, 3]);
}

#[tokio::test]
async fn old_builds_go_with_all_that_is_theirs_but_sessions() {
    let bench = Bench::new().await;
    bench.failed("old", NOW - 3 * DAYS, BATCH as usize).await;
    bench.failed("young", NOW - 2 * DAYS, 1).await;
    bench.begin("active").await;
    let tenant = Tenant::new("acme").unwrap();
    let (token_id, token_name) = ("t".into(), None);
    let session = Session {
        id: "s".into(),
        tenant: tenant.clone(),
        subject: Subject::Build(id("old")),
        who: Who { token_id, token_name, role: Role::Tenant, tenant },
        command: vec![],
        cut: false,
        env: vec![],
        directory: None,
        user: None,
        tty: false,
        vm: false,
        with_secrets: false,
        started_at: 1,
        end: None,
    };
    bench.store.insert_session(&session).await.unwrap();
    let end = End { at: NOW - 3 * DAYS, how: How::Exited, exit_code: Some(0), why: None };
    bench.store.end_session("s", &end).await.unwrap();
    let keep = Keep { builds_days: 2, sessions_days: 4, ..Keep::default() };
    let collected = bench.collect(keep).await;
    assert_eq!((collected.builds, collected.log_events), (1, u64::from(BATCH)));
    assert!(!bench.is_there("old").await && bench.is_there("young").await);
    assert!(bench.is_there("active").await);
    assert_eq!(bench.seqs("old").await, [0; 0]);
    let all = SessionFilter { limit: 9, ..SessionFilter::default() };
    assert_eq!(bench.store.sessions(&all).await.unwrap().len(), 1);
    let collected = bench.collect(Keep { sessions_days: 2, ..keep }).await;
    assert_eq!((collected.sessions, collected.builds), (1, 0));
}

#[tokio::test]
async fn nothing_goes_where_all_is_kept() {
    let bench = Bench::new().await;
    bench.failed("old", 1, 5).await;
    assert_eq!(bench.collect(Keep::default()).await, Collected::default());
    assert_eq!(bench.seqs("old").await.len(), 8);
}

#[tokio::test]
async fn a_server_removes_when_it_starts_and_rounds_do_not_meet() {
    let bench = Bench::new().await;
    for n in 0..4 {
        bench.failed(&format!("b{n}"), n, 50).await;
    }
    let keep = Keep { logs_days: 1, ..Keep::default() };
    let retention = bench.retention(keep);
    let stop = CancellationToken::new();
    let running = tokio::spawn(retention.clone().run(stop.clone()));
    while bench.store.log_bytes().await.unwrap() > 0 {
        tokio::task::yield_now().await;
    }
    stop.cancel();
    running.await.unwrap();

    for n in 4..8 {
        bench.failed(&format!("b{n}"), n, 50).await;
    }
    let (one, other) = tokio::join!(retention.collect(NOW), retention.collect(NOW));
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(one.log_events.max(other.log_events), 200);
    assert_eq!(one.log_events.min(other.log_events), 0, "the second one had waited");
}
