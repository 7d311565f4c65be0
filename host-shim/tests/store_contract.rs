//! One contract, run over every implementation of [`Store`].
//!
//! An implementation is a [`Place`]: somewhere that a store can be opened, and opened again.

#![allow(clippy::unwrap_used, missing_docs)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::slice;
use std::sync::Arc;

use kiln::build::{
    Build, BuildId, Change, Failure, FailureKind, GuestSays, ImageName, NetworkMode, Provenance,
    Pulled, Reached, Refused, Request, Status, Tenant, Usage,
};
use kiln::exec::{self, How, Session, Subject, Who};
use kiln::instances::instance::{self, End, Instance, InstanceId, State};
use kiln::store::sqlite::SqliteStore;
use kiln::store::{
    Claimed, Fence, Filter, FinishedLog, IdempotencyKey, LEASE, MAX_PAGE_BYTES, MAX_PIECE_BYTES,
    NewEvent, Next, Piece, Role, SessionFilter, Store, StoreError, TokenRecord,
};
use serde_json::json;

/// Where a store lives on after it was closed.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(SqliteStore::open(self.dir.path()).await.unwrap())
    }
}

fn tenant(name: &str) -> Tenant {
    Tenant::new(name).unwrap()
}

fn id(name: &str) -> BuildId {
    BuildId::new(name).unwrap()
}

fn build(name: &str, owner: &str, at: i64) -> Build {
    let request = Request {
        dockerfile: Some("FROM scratch\n".into()),
        target: Some("last".into()),
        image_name: None,
        build_args: BTreeMap::from([("K".into(), "V".into())]),
        tags: BTreeMap::new(),
        base_image_digest: None,
        network: NetworkMode::Open,
        allowed_domains: vec![],
        secrets: vec![],
        timeout_seconds: 600,
        memory_mb: 2048,
        cpus: 2,
        disk_gb: 10,
        keep_failed_seconds: 0,
        priority: 50,
        source_digest: "sha256:00".into(),
        source_bytes: u64::from(u32::MAX) + 1,
    };
    Build::queued(id(name), tenant(owner), request, at)
}

fn event(n: u64) -> NewEvent {
    NewEvent { at: 7, agent_seq: None, payload: json!({"type": "log", "content": n.to_string()}) }
}

fn of_agent(seq: u64) -> NewEvent {
    NewEvent { agent_seq: Some(seq), ..event(seq) }
}

fn status(status: Status) -> NewEvent {
    NewEvent { payload: json!({"type": "status", "status": status}), ..event(0) }
}

async fn put(store: &dyn Store, build: &Build) {
    store.insert_build(build, &[status(Status::Queued)], None, &[]).await.unwrap();
}

async fn claim(store: &dyn Store) -> Claimed {
    store.claim("me", 50, &[status(Status::Building)]).await.unwrap().unwrap()
}

async fn seqs(store: &dyn Store, id: &BuildId) -> Vec<u64> {
    store.events_after(id, 0, 10_000).await.unwrap().iter().map(|e| e.seq).collect()
}

async fn contents(store: &dyn Store, id: &BuildId) -> Vec<String> {
    let events = store.events_after(id, 0, 10_000).await.unwrap();
    let text = |e: &kiln::store::StoredEvent| {
        e.payload["content"].as_str().or(e.payload["status"].as_str()).unwrap().to_owned()
    };
    events.iter().map(text).collect()
}

#[tokio::test]
async fn a_build_comes_back_as_it_was_after_a_restart() {
    let place = Place::new();
    let mut first = build("b1", "acme", 10);
    first.request.tags.insert("team".into(), "infra".into());
    let key = IdempotencyKey { key: "k".into(), digest: "d".into() };
    let (claimed, pushed);
    {
        let store = place.open().await;
        store.insert_build(&first, &[status(Status::Queued)], Some(&key), &[]).await.unwrap();
        assert_eq!(store.build(&first.id).await.unwrap(), Some(first.clone()));
        claimed = claim(&*store).await;
        let mut annotated = claimed.build.clone();
        annotated.usage =
            Usage { memory_peak_bytes: Some(9), boot_ms: Some(3), ..Usage::default() };
        annotated.pulled = vec![Pulled { reference: "r".into(), digest: "d".into() }];
        annotated.reached = vec![Reached { host: "h".into(), port: 443 }];
        annotated.provenance = Provenance {
            builder_digest: Some("sha256:bb".into()),
            kernel_digest: Some("sha256:cc".into()),
            guest: Some(GuestSays {
                engine: "e 1".into(),
                lockfiles: [("Cargo.lock".to_owned(), "sha256:dd".to_owned())].into(),
            }),
        };
        store.annotate(&annotated, claimed.fence).await.unwrap();
        pushed =
            store.change(&first.id, claimed.fence, Change::Push, 60, &[of_agent(1)]).await.unwrap();
        assert_eq!(pushed, Build { status: Status::Pushing, ..annotated });
        // Not closed: what was acknowledged does not need a farewell.
    }
    let store = place.open().await;
    assert_eq!(store.build(&first.id).await.unwrap(), Some(pushed));
    assert_eq!(contents(&*store, &first.id).await, ["queued", "building", "1"]);
    assert_eq!(
        store.build_by_key(&first.tenant, "k").await.unwrap(),
        Some((first.id.clone(), "d".into()))
    );

    // What was claimed by the process before has a new claim, and the old one is worth nothing.
    let again = store.reclaim("me, later", 70).await.unwrap();
    assert_eq!(again.len(), 1);
    assert!(again[0].fence > claimed.fence);
    let late = store.change(&first.id, claimed.fence, Change::Cancel, 70, &[]).await;
    assert!(matches!(late, Err(StoreError::Fenced)), "{late:?}");
    let failure = Failure::new(FailureKind::HostRestarted, "again").with_detail("tail");
    let failed = store
        .change(
            &first.id,
            again[0].fence,
            Change::Fail(failure.clone()),
            80,
            &[status(Status::Failed)],
        )
        .await
        .unwrap();
    assert_eq!((failed.failure.as_ref(), failed.completed_at), (Some(&failure), Some(80)));
    assert_eq!(store.build(&first.id).await.unwrap(), Some(failed));
    assert!(store.reclaim("me, later still", 70).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_claim_is_a_lease() {
    let place = Place::new();
    let store = place.open().await;
    let b1 = id("b1");
    put(&*store, &build("b1", "acme", 10)).await;
    let lease = i64::try_from(LEASE.as_millis()).unwrap();
    let first = store.claim("one", 50, &[]).await.unwrap().unwrap();
    assert_eq!(store.lapsed(50 + lease).await.unwrap(), []);
    assert_eq!(store.lapsed(51 + lease).await.unwrap(), slice::from_ref(&b1));

    // While it is renewed nobody takes it over.
    store.renew(&b1, first.fence, 100).await.unwrap();
    assert_eq!(store.lapsed(100 + lease).await.unwrap(), []);
    assert!(store.take_over(&b1, "two", 100 + lease).await.unwrap().is_none());
    let second = store.take_over(&b1, "two", 101 + lease).await.unwrap().unwrap();
    assert!(second.fence > first.fence);
    assert_eq!(second.build, first.build);
    // One alone takes it over, and has a lease as well.
    assert!(store.take_over(&b1, "three", 101 + lease).await.unwrap().is_none());
    assert_eq!(store.lapsed(101 + 2 * lease).await.unwrap(), []);
    let late = store.renew(&b1, first.fence, 200).await;
    assert!(matches!(late, Err(StoreError::Fenced)), "{late:?}");
    assert_eq!(store.lapsed(102 + 2 * lease).await.unwrap(), slice::from_ref(&b1));

    // A new server does not wait for leases to run out.
    let third = store.reclaim("four", 102 + 2 * lease).await.unwrap().remove(0);
    assert_eq!(store.lapsed(102 + 3 * lease).await.unwrap(), []);
    // What waits, and what has ended, is nobody's.
    store.change(&b1, third.fence, Change::Requeue, 60, &[]).await.unwrap();
    assert_eq!(store.lapsed(i64::MAX).await.unwrap(), []);
    let again = claim(&*store).await;
    store.change(&b1, again.fence, Change::Cancel, 60, &[]).await.unwrap();
    assert_eq!(store.lapsed(i64::MAX).await.unwrap(), []);
    assert!(store.take_over(&b1, "five", i64::MAX).await.unwrap().is_none());
    let late = store.renew(&b1, again.fence, 300).await;
    assert!(matches!(late, Err(StoreError::Refused(_))), "{late:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_claims_at_once_never_give_a_build_twice() {
    let place = Place::new();
    // Two handles on one place, as two processes would have.
    let stores = [place.open().await, place.open().await];
    for n in 0..30 {
        put(&*stores[0], &build(&format!("b{n:02}"), "acme", n)).await;
    }
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..48 {
        let store = stores[n % 2].clone();
        tasks.spawn(async move {
            store.claim(&format!("owner-{n}"), 50, &[status(Status::Building)]).await
        });
    }
    let mut claimed = vec![];
    while let Some(result) = tasks.join_next().await {
        claimed.extend(result.unwrap().unwrap().map(|c| c.build.id));
    }
    assert_eq!(claimed.len(), 30);
    assert_eq!(claimed.iter().collect::<BTreeSet<_>>().len(), 30);
    for id in &claimed {
        assert_eq!(contents(&*stores[0], id).await, ["queued", "building"]);
    }
}

#[tokio::test]
async fn the_oldest_is_claimed_first_and_positions_agree() {
    let place = Place::new();
    let store = place.open().await;
    for (name, at) in [("c", 3), ("a", 1), ("d", 3), ("b", 2)] {
        put(&*store, &build(name, "acme", at)).await;
    }
    for (n, name) in (1..).zip(["a", "b", "c", "d"]) {
        assert_eq!(store.queue_position(&id(name)).await.unwrap(), Some(n));
    }
    assert_eq!(store.queued_count(&tenant("acme")).await.unwrap(), 4);
    assert_eq!(store.queued_count(&tenant("other")).await.unwrap(), 0);
    for name in ["a", "b", "c", "d"] {
        assert_eq!(store.queue_position(&id(name)).await.unwrap(), Some(1));
        let claimed = claim(&*store).await;
        assert_eq!((claimed.build.id.as_str(), claimed.build.status), (name, Status::Building));
        assert_eq!((claimed.build.attempt, claimed.build.started_at), (1, Some(50)));
        assert_eq!(store.queue_position(&id(name)).await.unwrap(), None);
    }
    assert!(store.claim("me", 1, &[]).await.unwrap().is_none());
    assert_eq!(store.queue_position(&id("nobody")).await.unwrap(), None);
}

/// By hand: the order that `kiln::store::line` says.
#[tokio::test]
async fn tenants_take_turns_however_much_one_has_queued() {
    let place = Place::new();
    let store = place.open().await;
    for n in 0..100 {
        put(&*store, &build(&format!("much-{n:03}"), "much", n)).await;
    }
    let end = async |claimed: Claimed| {
        store.change(&claimed.build.id, claimed.fence, Change::Cancel, 60, &[]).await.unwrap();
    };
    // One VM: nobody else is there.
    let first = claim(&*store).await;
    assert_eq!(first.build.id.as_str(), "much-000");
    put(&*store, &build("one", "little", 1000)).await;
    put(&*store, &build("two", "little", 1001)).await;
    let positions = async |names: &[&str]| -> Vec<u32> {
        let mut all = vec![];
        for name in names {
            all.push(store.queue_position(&id(name)).await.unwrap().unwrap());
        }
        all
    };
    // With one under way the other has the fewest; then both have one, and `much` was claimed longer ago.
    assert_eq!(positions(&["one", "much-001", "two", "much-002"]).await, [1, 2, 3, 4]);
    assert_eq!(positions(&["much-099"]).await, [101]);
    end(first).await;
    // It had its turn: the other one's comes, though its builds are younger than a hundred.
    for expected in ["one", "much-001", "two", "much-002", "much-003"] {
        let claimed = claim(&*store).await;
        assert_eq!(claimed.build.id.as_str(), expected);
        end(claimed).await;
    }
    // Also when everything is opened again.
    put(&*store, &build("three", "little", 1002)).await;
    let (a, b) = (claim(&*store).await, claim(&*store).await);
    assert_eq!((a.build.id.as_str(), b.build.id.as_str()), ("three", "much-004"));
    drop(store);
    let store = place.open().await;
    store.change(&b.build.id, b.fence, Change::Requeue, 60, &[]).await.unwrap();
    put(&*store, &build("new", "new", 1003)).await;
    // Who never had a turn is first; what is requeued is its tenant's oldest.
    for expected in ["new", "much-004"] {
        assert_eq!(claim(&*store).await.build.id.as_str(), expected);
    }
}

#[tokio::test]
async fn a_claim_within_a_memory_takes_the_next_whose_oldest_build_fits() {
    let place = Place::new();
    let store = place.open().await;
    let sized = async |name: &str, owner: &str, at: i64, memory_mb: u32| {
        let mut one = build(name, owner, at);
        one.request.memory_mb = memory_mb;
        put(&*store, &one).await;
    };
    assert_eq!(store.next_queued().await.unwrap(), None);
    sized("large", "a", 1, 4096).await;
    sized("behind", "a", 2, 256).await;
    sized("middle", "b", 3, 1024).await;
    sized("small", "c", 4, 512).await;
    let within = async |most| {
        let claimed = store.claim_within("me", 50, &[], most).await.unwrap();
        claimed.map(|claimed| claimed.build.id.to_string())
    };
    let next = || async { store.next_queued().await.unwrap().unwrap() };
    assert_eq!(next().await, Next { id: id("large"), memory_mb: 4096 });
    assert_eq!(within(511).await, None);
    assert_eq!(within(1023).await.as_deref(), Some("small"));
    assert_eq!(within(1024).await.as_deref(), Some("middle"));
    // Its tenant's next waits behind it.
    assert_eq!(within(4095).await, None);
    assert_eq!(next().await.id, id("large"));
    assert_eq!(within(4096).await.as_deref(), Some("large"));
    assert_eq!(next().await, Next { id: id("behind"), memory_mb: 256 });
}

#[tokio::test]
async fn a_priority_moves_a_build_among_its_tenants_own() {
    let place = Place::new();
    let store = place.open().await;
    let put_with = async |name: &str, owner: &str, at: i64, priority: u32| {
        let mut one = build(name, owner, at);
        one.request.priority = priority;
        put(&*store, &one).await;
    };
    put_with("usual", "a", 1, 50).await;
    put_with("idle", "a", 2, 0).await;
    put_with("urgent", "a", 3, 100).await;
    put_with("of-b", "b", 4, 50).await;
    assert_eq!(store.next_queued().await.unwrap().unwrap().id, id("urgent"));
    for (n, name) in (1..).zip(["urgent", "of-b", "usual", "idle"]) {
        assert_eq!(store.queue_position(&id(name)).await.unwrap(), Some(n), "{name}");
    }
    for name in ["urgent", "of-b", "usual", "idle"] {
        assert_eq!(claim(&*store).await.build.id.as_str(), name);
    }
}

/// A small generator, so that a failure names a seed that repeats it.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % most as u64).unwrap()
    }
}

/// Submits, claims, ends and requeues at random: every claim is the one that the line says, every number comes true.
#[tokio::test]
async fn claims_follow_the_line_and_numbers_come_true() {
    for seed in [0x9e37_79b9, 0xdead_beef, 0x0bad_cafe] {
        let place = Place::new();
        let store = place.open().await;
        let mut dice = Dice(seed);
        // Of each tenant, its next one first.
        let mut queued: BTreeMap<&str, BTreeSet<(Reverse<u32>, String)>> = BTreeMap::new();
        let mut active: Vec<Claimed> = vec![];
        let mut turns: BTreeMap<&str, i64> = BTreeMap::new();
        let (mut made, mut turn) = (0_i64, 0);
        let names = ["a", "b", "c", "d"];
        for step in 0..160 {
            match dice.below(5) {
                0 | 1 => {
                    let owner = names[dice.below(names.len())];
                    let name = format!("{made:03}");
                    // Two of one moment now and then.
                    let mut one = build(&name, owner, made / 2);
                    one.request.priority = [0, 50, 100][dice.below(3)];
                    put(&*store, &one).await;
                    queued.entry(owner).or_default().insert((Reverse(one.request.priority), name));
                    made += 1;
                }
                2 if !active.is_empty() => {
                    let at = dice.below(active.len());
                    let Claimed { build, fence } = active.swap_remove(at);
                    store.change(&build.id, fence, Change::Cancel, 60, &[]).await.unwrap();
                }
                _ => {
                    let of = |owner: &str| {
                        active.iter().filter(|c| c.build.tenant.as_str() == owner).count()
                    };
                    let at = |(_, name): &(_, String)| name.parse::<i64>().unwrap() / 2;
                    let next = queued
                        .iter()
                        .filter(|(_, builds)| !builds.is_empty())
                        .map(|(owner, builds)| {
                            let turn = turns.get(owner).copied().unwrap_or(0);
                            (of(owner), turn, builds.iter().map(at).min(), *owner)
                        })
                        .min();
                    let claimed = store.claim("me", 50, &[]).await.unwrap();
                    let Some((_, _, _, owner)) = next else {
                        assert!(claimed.is_none());
                        continue;
                    };
                    let claimed = claimed.unwrap();
                    let (_, expected) = queued.get_mut(owner).unwrap().pop_first().unwrap();
                    assert_eq!(claimed.build.id.as_str(), expected, "seed {seed:#x}, step {step}");
                    turn += 1;
                    turns.insert(owner, turn);
                    active.push(claimed);
                }
            }
        }
        // What is left, in the order of its numbers.
        let mut numbers = BTreeMap::new();
        for (_, name) in queued.values().flatten() {
            numbers.insert(store.queue_position(&id(name)).await.unwrap().unwrap(), name.clone());
        }
        let left = queued.values().flatten().count();
        assert!(numbers.keys().copied().eq(1..=u32::try_from(left).unwrap()), "{numbers:?}");
        for (number, name) in numbers {
            let claimed = claim(&*store).await;
            assert_eq!(claimed.build.id.as_str(), name, "seed {seed:#x}, number {number}");
        }
    }
}

#[tokio::test]
async fn a_claim_that_was_taken_over_writes_nothing() {
    let place = Place::new();
    let store = place.open().await;
    put(&*store, &build("b1", "acme", 1)).await;
    let old = claim(&*store).await;
    let requeued = store.change(&id("b1"), old.fence, Change::Requeue, 60, &[]).await.unwrap();
    assert_eq!(requeued.status, Status::Queued);
    let new = claim(&*store).await;
    assert!(new.fence > old.fence);
    assert_eq!((new.build.attempt, new.build.started_at), (2, Some(50)));

    let before = seqs(&*store, &id("b1")).await;
    for change in [Change::Push, Change::Cancel, Change::Requeue, Change::Finish] {
        let late = store.change(&id("b1"), old.fence, change, 70, &[event(1)]).await;
        assert!(matches!(late, Err(StoreError::Fenced)), "{late:?}");
    }
    assert!(matches!(store.annotate(&old.build, old.fence).await, Err(StoreError::Fenced)));
    let later = Fence(new.fence.0 + 1);
    assert!(matches!(store.annotate(&new.build, later).await, Err(StoreError::Fenced)));
    assert_eq!(store.build(&id("b1")).await.unwrap(), Some(new.build));
    assert_eq!(seqs(&*store, &id("b1")).await, before, "a refused change stores no event");
}

#[tokio::test]
async fn a_finished_build_never_changes() {
    let place = Place::new();
    let store = place.open().await;
    for (name, end) in [
        ("cancelled", Change::Cancel),
        ("failed", Change::Fail(Failure::new(FailureKind::VmLost, "gone"))),
        ("ready", Change::Finish),
    ] {
        put(&*store, &build(name, "acme", 1)).await;
        let claimed = claim(&*store).await;
        let fence = claimed.fence;
        if end == Change::Finish {
            store.change(&id(name), fence, Change::Push, 51, &[]).await.unwrap();
            store
                .change(&id(name), fence, Change::Publish("sha256:aa".into()), 52, &[])
                .await
                .unwrap();
            let refused = store.change(&id(name), fence, Change::Cancel, 53, &[]).await;
            assert!(matches!(refused, Err(StoreError::Refused(Refused::Publishing))));
        }
        let last = store.change(&id(name), fence, end, 60, &[event(1)]).await.unwrap();
        assert_eq!((last.status.as_str(), last.completed_at), (name, Some(60)));

        for change in [Change::Claim, Change::Push, Change::Finish, Change::Cancel, Change::Requeue]
        {
            let refused = store.change(&id(name), fence, change, 70, &[event(2)]).await;
            assert!(matches!(refused, Err(StoreError::Refused(Refused::Final(_)))), "{refused:?}");
        }
        let refused = store.annotate(&claimed.build, fence).await;
        assert!(matches!(refused, Err(StoreError::Refused(Refused::Final(_)))));
        let refused = store.cancel_queued(&id(name), 70, &[event(2)]).await;
        assert!(matches!(refused, Err(StoreError::Refused(Refused::Final(_)))));
        let refused = store.append_events(&id(name), &[event(2)]).await;
        assert!(matches!(refused, Err(StoreError::Refused(Refused::Final(_)))));
        assert_eq!(store.build(&id(name)).await.unwrap(), Some(last));
        assert_eq!(seqs(&*store, &id(name)).await, [1, 2, 3]);
    }
}

#[tokio::test]
async fn only_what_is_queued_is_cancelled_without_a_claim() {
    let place = Place::new();
    let store = place.open().await;
    put(&*store, &build("b1", "acme", 1)).await;
    put(&*store, &build("b2", "acme", 2)).await;
    claim(&*store).await;
    let refused = store.cancel_queued(&id("b1"), 60, &[event(1)]).await;
    assert!(
        matches!(refused, Err(StoreError::Refused(Refused::From(Status::Building)))),
        "{refused:?}"
    );
    let cancelled = store.cancel_queued(&id("b2"), 60, &[status(Status::Cancelled)]).await.unwrap();
    assert_eq!((cancelled.status, cancelled.completed_at), (Status::Cancelled, Some(60)));
    assert_eq!(contents(&*store, &id("b2")).await, ["queued", "cancelled"]);
    assert!(
        store.claim("me", 70, &[]).await.unwrap().is_none(),
        "a cancelled build is not claimed"
    );
    let unknown = store.cancel_queued(&id("b3"), 60, &[]).await;
    assert!(matches!(unknown, Err(StoreError::NotFound("build"))));
}

#[tokio::test]
async fn only_what_was_never_claimed_expires() {
    let place = Place::new();
    let store = place.open().await;
    for (name, at) in [("claimed", 1), ("again", 2), ("c", 3), ("b", 4), ("a", 5), ("young", 9)] {
        put(&*store, &build(name, "acme", at)).await;
    }
    claim(&*store).await;
    let again = claim(&*store).await;
    store.change(&id("again"), again.fence, Change::Requeue, 55, &[]).await.unwrap();
    let failure = Failure::new(FailureKind::TimedOut, "never started");
    let expire = async |at_most| {
        let told = [status(Status::Failed)];
        let expired = store.expire_queued(9, at_most, &failure, 60, &told).await.unwrap();
        expired.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(expire(2).await, ["c", "b"]);
    assert_eq!(expire(2).await, ["a"]);
    assert_eq!(expire(2).await, [""; 0]);
    let ended = store.build(&id("a")).await.unwrap().unwrap();
    assert_eq!((ended.status, ended.completed_at), (Status::Failed, Some(60)));
    assert_eq!(ended.failure, Some(failure));
    assert_eq!(contents(&*store, &id("a")).await, ["queued", "failed"]);
    for (name, is) in
        [("claimed", Status::Building), ("again", Status::Queued), ("young", Status::Queued)]
    {
        assert_eq!(store.build(&id(name)).await.unwrap().unwrap().status, is, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_and_claim_race_for_one_winner() {
    let place = Place::new();
    let store = place.open().await;
    for n in 0..20 {
        let one = build(&format!("b{n}"), "acme", n);
        put(&*store, &one).await;
        let (a, b, name) = (store.clone(), store.clone(), one.id.clone());
        let claimed =
            tokio::spawn(async move { a.claim("me", 50, &[status(Status::Building)]).await });
        let cancelled =
            tokio::spawn(
                async move { b.cancel_queued(&name, 50, &[status(Status::Cancelled)]).await },
            );
        let (claimed, cancelled) = (claimed.await.unwrap().unwrap(), cancelled.await.unwrap());
        assert!(claimed.is_some() != cancelled.is_ok());
        assert_eq!(seqs(&*store, &one.id).await, [1, 2]);
    }
}

#[tokio::test]
async fn events_are_numbered_without_gaps_and_kept_once() {
    let place = Place::new();
    let store = place.open().await;
    put(&*store, &build("b1", "acme", 1)).await;
    put(&*store, &build("b2", "acme", 2)).await;
    let claimed = claim(&*store).await;
    let b1 = id("b1");
    assert_eq!(store.append_events(&b1, &[of_agent(1), event(100), of_agent(2)]).await.unwrap(), 5);
    // Sent again after a broken connection, with what is new.
    assert_eq!(
        store.append_events(&b1, &[of_agent(1), of_agent(2), of_agent(3)]).await.unwrap(),
        6
    );
    assert_eq!(store.append_events(&b1, &[of_agent(3), of_agent(3)]).await.unwrap(), 6);
    assert_eq!(store.append_events(&b1, &[]).await.unwrap(), 6);
    assert_eq!(contents(&*store, &b1).await, ["queued", "building", "1", "100", "2", "3"]);
    assert_eq!(seqs(&*store, &b1).await, [1, 2, 3, 4, 5, 6]);

    // Another build's numbers are its own, and so are another attempt's.
    assert_eq!(store.append_events(&id("b2"), &[of_agent(1)]).await.unwrap(), 2);
    store.change(&b1, claimed.fence, Change::Requeue, 60, &[]).await.unwrap();
    claim(&*store).await;
    assert_eq!(store.append_events(&b1, &[of_agent(1)]).await.unwrap(), 8);

    let unknown = store.append_events(&id("b9"), &[event(1)]).await;
    assert!(matches!(unknown, Err(StoreError::NotFound("build"))), "{unknown:?}");
    assert_eq!(store.events_after(&id("b9"), 0, 10).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_many_writers_have_no_gaps() {
    let place = Place::new();
    let store = place.open().await;
    put(&*store, &build("b1", "acme", 1)).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..40 {
        let store = store.clone();
        tasks.spawn(
            async move { store.append_events(&id("b1"), &[event(n), event(n)]).await.unwrap() },
        );
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
    assert_eq!(seqs(&*store, &id("b1")).await, (1..=81).collect::<Vec<_>>());
}

#[tokio::test]
async fn events_come_in_bounded_pages() {
    let place = Place::new();
    let store = place.open().await;
    put(&*store, &build("b1", "acme", 1)).await;
    let b1 = id("b1");
    store.append_events(&b1, &(2..=5).map(event).collect::<Vec<_>>()).await.unwrap();
    let page = store.events_after(&b1, 1, 2).await.unwrap();
    assert_eq!(page.iter().map(|e| e.seq).collect::<Vec<_>>(), [2, 3]);
    assert_eq!((page[0].at, &page[0].payload), (7, &event(2).payload));
    assert!(store.events_after(&b1, 5, 2).await.unwrap().is_empty());
    assert!(store.events_after(&b1, u64::MAX, 2).await.unwrap().is_empty());

    // Two fit together, three do not; one that is larger than a page comes alone.
    let sized = |n: usize| NewEvent { payload: json!("x".repeat(n - 2)), ..event(0) };
    let (half, over) = (MAX_PAGE_BYTES / 2, MAX_PAGE_BYTES + 1);
    store.append_events(&b1, &[sized(half), sized(half), sized(100), sized(over)]).await.unwrap();
    for (after, expected) in [(5, vec![6, 7]), (7, vec![8]), (8, vec![9])] {
        let page = store.events_after(&b1, after, 100).await.unwrap();
        assert_eq!(page.iter().map(|e| e.seq).collect::<Vec<_>>(), expected);
    }
}

/// Ends a queued build.
async fn end(store: &dyn Store, name: &str, at: i64) {
    store.cancel_queued(&id(name), at, &[status(Status::Cancelled)]).await.unwrap();
}

fn size(event: &NewEvent) -> usize {
    event.payload.to_string().len()
}

fn bytes(events: &[NewEvent]) -> u64 {
    events.iter().map(size).sum::<usize>() as u64
}

#[tokio::test]
async fn logs_of_finished_builds_are_measured_and_go_in_pieces() {
    let place = Place::new();
    let store = place.open().await;
    for name in ["c", "a", "b", "silent", "active"] {
        put(&*store, &build(name, "acme", 1)).await;
        if name != "silent" {
            store.append_events(&id(name), &[event(1), of_agent(2)]).await.unwrap();
            // Sent once more, and stored once.
            store.append_events(&id(name), &[of_agent(2), of_agent(3)]).await.unwrap();
        }
    }
    let step = NewEvent { payload: json!({"type": "step", "content": "log"}), ..event(0) };
    let own = [event(4), step, event(5), status(Status::Cancelled)];
    store.cancel_queued(&id("c"), 30, &own).await.unwrap();
    for (name, at) in [("a", 20), ("b", 20), ("silent", 10)] {
        end(&*store, name, at).await;
    }
    let three = bytes(&[event(1), event(2), event(3)]);
    let five = three + bytes(&[event(4), event(5)]);
    assert_eq!(store.log_bytes().await.unwrap(), 2 * three + five);
    let logs = async |at_most| store.finished_logs(at_most).await.unwrap();
    let log = |name, completed_at| FinishedLog { id: id(name), completed_at };
    assert_eq!(logs(9).await, [log("a", 20), log("b", 20), log("c", 30)]);
    assert_eq!(logs(1).await, [log("a", 20)]);

    // c has 1 queued, 2 to 5 log, 6 step, 7 log, 8 cancelled.
    let c = id("c");
    let trim = async |after, at_most| store.trim_log(&c, after, at_most).await.unwrap();
    let piece = |numbers: &[u64], next| {
        let events: Vec<_> = numbers.iter().copied().map(event).collect();
        Piece { events: events.len() as u64, bytes: bytes(&events), next }
    };
    assert_eq!(trim(0, 3).await, piece(&[1, 2], Some(3)));
    assert_eq!(
        store.log_bytes().await.unwrap(),
        3 * three + bytes(&[event(4), event(5)]) - bytes(&[event(1), event(2)])
    );
    // A gap is not counted.
    assert_eq!(trim(0, 2).await, piece(&[3], Some(4)));
    assert_eq!(trim(4, 3).await, piece(&[4, 5], Some(7)));
    assert_eq!(logs(9).await.len(), 3, "it is not known yet that it has gone");
    drop(store);
    let store = place.open().await;
    assert_eq!(store.trim_log(&c, 7, 3).await.unwrap(), piece(&[], Some(8)));
    assert_eq!(store.trim_log(&c, 8, 3).await.unwrap(), Piece::default());
    assert_eq!(store.trim_log(&c, u64::MAX, 3).await.unwrap(), Piece::default());
    assert_eq!(seqs(&*store, &c).await, [1, 6, 8]);
    assert_eq!(store.finished_logs(9).await.unwrap(), [log("a", 20), log("b", 20)]);
    assert_eq!(store.log_bytes().await.unwrap(), 2 * three);

    let refused = store.trim_log(&id("active"), 0, 9).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    let unknown = store.trim_log(&id("nobody"), 0, 9).await;
    assert!(matches!(unknown, Err(StoreError::NotFound("build"))), "{unknown:?}");
    assert_eq!(seqs(&*store, &id("active")).await, [1, 2, 3, 4]);
    assert_eq!(seqs(&*store, &id("a")).await, [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn a_piece_has_a_bound_in_bytes() {
    let place = Place::new();
    let store = place.open().await;
    put(&*store, &build("b", "acme", 1)).await;
    let most = usize::try_from(MAX_PIECE_BYTES).unwrap();
    // By its whole payload.
    let sized = |n: usize| {
        let content = "x".repeat(n - size(&event(1)) + 1);
        NewEvent { payload: json!({"type": "log", "content": content}), ..event(0) }
    };
    let first = size(&status(Status::Queued));
    let all = [sized(most - first - 100), sized(100), sized(100), sized(most + 1), sized(100)];
    assert_eq!(size(&all[1]), 100);
    store.append_events(&id("b"), &all).await.unwrap();
    end(&*store, "b", 2).await;
    let (mut after, mut nexts) = (0, vec![]);
    while let Some(next) = store.trim_log(&id("b"), after, 1000).await.unwrap().next {
        nexts.push(next);
        after = next;
    }
    assert_eq!(nexts, [3, 4, 5, 7]);
    assert_eq!(seqs(&*store, &id("b")).await, [1, 7]);
}

#[tokio::test]
async fn finished_builds_go_in_pieces_with_all_that_is_theirs() {
    let place = Place::new();
    let store = place.open().await;
    let key = IdempotencyKey { key: "k".into(), digest: "d".into() };
    let mut first = build("a", "acme", 1);
    first.request.tags.insert("team".into(), "infra".into());
    store.insert_build(&first, &[status(Status::Queued)], Some(&key), &[]).await.unwrap();
    for (name, at) in [("b", 2), ("c", 3), ("active", 4)] {
        put(&*store, &build(name, "acme", at)).await;
    }
    store.append_events(&id("a"), &[event(1), event(2), event(3)]).await.unwrap();
    store.insert_session(&session("s1", Subject::Build(id("a")), "acme", 5)).await.unwrap();
    for (name, at) in [("b", 30), ("a", 30), ("c", 20)] {
        end(&*store, name, at).await;
    }
    let finished = async |before, at_most| store.finished_builds(before, at_most).await.unwrap();
    assert!(finished(20, 9).await.is_empty());
    assert_eq!(finished(21, 9).await, [id("c")]);
    assert_eq!(finished(31, 9).await, [id("c"), id("a"), id("b")]);
    assert_eq!(finished(31, 2).await, [id("c"), id("a")]);

    let a = id("a");
    assert!(!store.remove_build(&a, 2).await.unwrap());
    assert_eq!(seqs(&*store, &a).await, [3, 4, 5], "the last to go is its end");
    assert!(store.build(&a).await.unwrap().is_some());
    assert!(!store.remove_build(&a, 3).await.unwrap());
    assert!(store.remove_build(&a, 3).await.unwrap());
    assert_eq!(store.build(&a).await.unwrap(), None);
    let again = store.remove_build(&a, 3).await;
    assert!(matches!(again, Err(StoreError::NotFound("build"))), "{again:?}");
    let refused = store.remove_build(&id("active"), 9).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert_eq!(finished(31, 9).await, [id("c"), id("b")]);
    assert_eq!(store.log_bytes().await.unwrap(), 0);
    assert_eq!(store.finished_logs(9).await.unwrap(), []);
    // Its tags and its key are free, and its sessions are in the audit log.
    assert_eq!(store.build_by_key(&tenant("acme"), "k").await.unwrap(), None);
    store.insert_build(&first, &[status(Status::Queued)], Some(&key), &[]).await.unwrap();
    assert_eq!(seqs(&*store, &a).await, [1]);
    let all = SessionFilter { limit: 9, ..SessionFilter::default() };
    assert_eq!(store.sessions(&all).await.unwrap().len(), 1);
    while store.shrink().await.unwrap() {}
}

#[tokio::test]
async fn lists_are_newest_first_filtered_and_paged() {
    let place = Place::new();
    let store = place.open().await;
    for (n, name) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        let owner = if name == "c" { "other" } else { "acme" };
        // Two of them in one millisecond.
        let mut one = build(name, owner, i64::try_from(n.min(3)).unwrap());
        if name != "a" {
            one.request.tags.insert("team".into(), "infra".into());
        }
        if name == "d" {
            one.request.tags.insert("env".into(), "50%'; --".into());
        }
        put(&*store, &one).await;
    }
    store.cancel_queued(&id("b"), 9, &[]).await.unwrap();
    let list = async |filter: Filter| -> Vec<String> {
        let builds = store.builds(&filter).await.unwrap();
        builds.iter().map(|b| b.id.to_string()).collect()
    };
    let all = Filter { limit: 10, ..Filter::default() };
    let tags =
        |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    assert_eq!(list(all.clone()).await, ["e", "d", "c", "b", "a"]);
    let acme = Filter { tenant: Some(tenant("acme")), ..all.clone() };
    assert_eq!(list(acme.clone()).await, ["e", "d", "b", "a"]);
    assert_eq!(list(Filter { status: Some(Status::Cancelled), ..all.clone() }).await, ["b"]);
    assert_eq!(
        list(Filter { tags: tags(&[("team", "infra")]), ..acme.clone() }).await,
        ["e", "d", "b"]
    );
    let both = tags(&[("team", "infra"), ("env", "50%'; --")]);
    assert_eq!(list(Filter { tags: both, ..all.clone() }).await, ["d"]);
    assert_eq!(list(Filter { tags: tags(&[("team", "%")]), ..all.clone() }).await, [""; 0]);

    assert_eq!(list(Filter { limit: 2, ..all.clone() }).await, ["e", "d"]);
    assert_eq!(list(Filter { limit: 2, before: Some(id("d")), ..all.clone() }).await, ["c", "b"]);
    assert_eq!(list(Filter { limit: 2, before: Some(id("e")), ..acme }).await, ["d", "b"]);
    assert_eq!(list(Filter { before: Some(id("a")), ..all.clone() }).await, [""; 0]);
    assert_eq!(list(Filter { before: Some(id("nobody")), ..all }).await, [""; 0]);
}

#[tokio::test]
async fn a_list_has_all_of_a_build_but_what_may_be_large_in_its_request() {
    let place = Place::new();
    let store = place.open().await;
    let mut whole = build("a", "acme", 5);
    whole.request.image_name = Some(ImageName { name: "app".into(), tag: "v1".into() });
    whole.request.tags.insert("team".into(), "\"é\n".into());
    put(&*store, &whole).await;
    let listed = store.builds(&Filter { limit: 1, ..Filter::default() }).await.unwrap();
    let request =
        Request { dockerfile: None, build_args: BTreeMap::new(), ..whole.request.clone() };
    assert_eq!(listed, [Build { request, ..whole.clone() }]);
    assert_eq!(store.build(&id("a")).await.unwrap().unwrap(), whole);
}

#[tokio::test]
async fn ids_and_keys_are_taken_once() {
    let place = Place::new();
    let store = place.open().await;
    let key = |digest: &str| IdempotencyKey { key: "k".into(), digest: digest.into() };
    store.insert_build(&build("b1", "acme", 1), &[], Some(&key("d1")), &[]).await.unwrap();
    let again = store.insert_build(&build("b1", "other", 1), &[], None, &[]).await;
    assert!(matches!(again, Err(StoreError::Taken(_))), "{again:?}");
    let again =
        store.insert_build(&build("b2", "acme", 1), &[event(1)], Some(&key("d2")), &[]).await;
    assert!(matches!(again, Err(StoreError::Taken(_))), "{again:?}");
    assert_eq!(store.build(&id("b2")).await.unwrap(), None, "nothing of it is left");
    // Another tenant's key is another key.
    store.insert_build(&build("b3", "other", 1), &[], Some(&key("d3")), &[]).await.unwrap();
    let found = async |owner| store.build_by_key(&tenant(owner), "k").await.unwrap();
    assert_eq!(found("acme").await, Some((id("b1"), "d1".into())));
    assert_eq!(found("other").await, Some((id("b3"), "d3".into())));
    assert_eq!(found("third").await, None);
}

#[tokio::test]
async fn tokens_are_found_by_hash_listed_and_revoked() {
    let place = Place::new();
    let token = |n: i64| TokenRecord {
        id: format!("t{n}"),
        hash: format!("h{n}"),
        name: (n == 1).then(|| "ci".into()),
        tenant: tenant("acme"),
        role: Role::ALL[usize::try_from(n).unwrap()],
        created_at: n,
        expires_at: (n == 2).then_some(9),
        revoked: false,
        last_used_at: None,
    };
    {
        let store = place.open().await;
        for n in [2, 0, 1] {
            store.insert_token(&token(n)).await.unwrap();
        }
        assert!(matches!(store.insert_token(&token(1)).await, Err(StoreError::Taken(_))));
        store.revoke_token("t0").await.unwrap();
        store.revoke_token("t0").await.unwrap();
        assert!(matches!(store.revoke_token("t9").await, Err(StoreError::NotFound("token"))));
    }
    let store = place.open().await;
    let revoked = TokenRecord { revoked: true, ..token(0) };
    assert_eq!(store.tokens().await.unwrap(), [revoked.clone(), token(1), token(2)]);
    assert_eq!(store.token_by_hash("h0").await.unwrap(), Some(revoked));
    assert_eq!(store.token_by_hash("h2").await.unwrap(), Some(token(2)));
    assert_eq!(store.token_by_hash("H2").await.unwrap(), None);
    assert_eq!(store.token("t1").await.unwrap(), Some(token(1)));
    assert_eq!(store.token("t9").await.unwrap(), None);
    let uses = [("t1".to_owned(), 7), ("t9".to_owned(), 8), ("t0".to_owned(), 9)];
    store.tokens_used(&uses).await.unwrap();
    store.tokens_used(&[("t0".to_owned(), 3)]).await.unwrap();
    let shown = |at| TokenRecord { last_used_at: Some(at), ..token(1) };
    assert_eq!(store.token("t1").await.unwrap(), Some(shown(7)));
    assert_eq!(store.token("t0").await.unwrap().unwrap().last_used_at, Some(9));
    store.ready().await.unwrap();
}

#[tokio::test]
async fn instances_are_kept_changed_listed_and_forgotten() {
    let place = Place::new();
    let store = place.open().await;
    let instance = |name: &str, owner: &str, at| Instance {
        id: InstanceId::parse(&format!("{owner}-{name}")).unwrap(),
        tenant: tenant(owner),
        name: name.into(),
        image: "a/app".into(),
        image_digest: "sha256:00".into(),
        vcpus: 2,
        memory_mb: 1024,
        state: State::Created,
        created_at: at,
        started_at: None,
        stopped_at: None,
        exit_code: None,
        exit_message: None,
    };
    let web = instance("web", "a", 1);
    for new in [&web, &instance("db", "a", 2), &instance("web", "b", 3)] {
        store.insert_instance(new, 2).await.unwrap();
    }
    let again = Instance { id: InstanceId::parse("other").unwrap(), ..web.clone() };
    assert!(matches!(store.insert_instance(&again, 3).await, Err(StoreError::Taken(_))));
    let full = store.insert_instance(&instance("third", "a", 4), 2).await;
    assert!(matches!(full, Err(StoreError::TooMany { limit: 2, .. })), "{full:?}");

    let change = |change| store.change_instance(&web.id, change, 7);
    let refused = change(instance::Change::Run).await;
    assert!(matches!(refused, Err(StoreError::InstanceRefused(_))), "{refused:?}");
    change(instance::Change::Initialize).await.unwrap();
    change(instance::Change::Run).await.unwrap();
    let end = End { exit_code: Some(255), message: Some("why".into()) };
    let stopped = change(instance::Change::Stop(end)).await.unwrap();
    drop(store);

    let store = place.open().await;
    let found = store.instance(&web.id).await.unwrap().unwrap();
    assert_eq!(found, stopped);
    assert_eq!((found.started_at, found.exit_code), (Some(7), Some(255)));
    let names =
        |list: Vec<Instance>| list.into_iter().map(|i| i.id.to_string()).collect::<Vec<_>>();
    assert_eq!(names(store.instances(None).await.unwrap()), ["b-web", "a-db", "a-web"]);
    assert_eq!(names(store.instances(Some(&tenant("a"))).await.unwrap()), ["a-db", "a-web"]);
    store.delete_instance(&web.id).await.unwrap();
    let gone = store.delete_instance(&web.id).await;
    assert!(matches!(gone, Err(StoreError::NotFound("instance"))), "{gone:?}");
    assert_eq!(store.instance(&web.id).await.unwrap(), None);
    let change = store.change_instance(&web.id, instance::Change::Initialize, 8).await;
    assert!(matches!(change, Err(StoreError::NotFound("instance"))), "{change:?}");
    // Its name is free again.
    store.insert_instance(&again, 2).await.unwrap();
}

fn session(name: &str, subject: Subject, owner: &str, at: i64) -> Session {
    Session {
        id: name.into(),
        tenant: tenant(owner),
        subject,
        who: Who {
            token_id: "t1".into(),
            token_name: Some("ci".into()),
            role: Role::Admin,
            tenant: tenant("ops"),
        },
        command: vec!["sh".into(), "-c".into(), "\u{1}\"é".into()],
        cut: true,
        env: vec!["TOKEN".into()],
        directory: Some("/srv".into()),
        user: Some("app".into()),
        tty: true,
        vm: false,
        with_secrets: true,
        started_at: at,
        end: None,
    }
}

#[tokio::test]
async fn sessions_are_logged_ended_once_and_listed() {
    let place = Place::new();
    let store = place.open().await;
    for name in ["b1", "b2"] {
        store.insert_build(&build(name, "a", 1), &[], None, &[]).await.unwrap();
    }
    let (b1, b2) = (Subject::Build(id("b1")), Subject::Build(id("b2")));
    let instance = Subject::Instance(InstanceId::parse("i1").unwrap());
    let first = session("s1", b1.clone(), "a", 5);
    let refused = session("s2", b2.clone(), "a", 6);
    let newest = session("s3", instance.clone(), "b", 6);
    store.insert_session(&first).await.unwrap();
    store.insert_session(&refused).await.unwrap();
    store.insert_session(&newest).await.unwrap();
    let again = store.insert_session(&first).await;
    assert!(matches!(again, Err(StoreError::Taken(_))), "{again:?}");
    let end = exec::End { at: 9, how: How::Exited, exit_code: Some(255), why: Some("why".into()) };
    store.end_session("s1", &end).await.unwrap();
    let again = store.end_session("s1", &exec::End { at: 10, ..end.clone() }).await;
    assert!(matches!(again, Err(StoreError::NotFound(_))), "{again:?}");
    drop(store);

    // What a server that was killed left open is ended by the next, and no more than that.
    let store = place.open().await;
    assert_eq!(store.end_open_sessions(20).await.unwrap(), 2);
    assert_eq!(store.end_open_sessions(21).await.unwrap(), 0);
    let stopped = exec::End { at: 20, how: How::ServerStopped, exit_code: None, why: None };
    let first = Session { end: Some(end), ..first };
    let refused = Session { end: Some(stopped.clone()), ..refused };
    let newest = Session { end: Some(stopped), ..newest };
    let list = async |filter: SessionFilter| store.sessions(&filter).await.unwrap();
    let all = SessionFilter { limit: 9, ..SessionFilter::default() };
    assert_eq!(list(all.clone()).await, [newest.clone(), refused.clone(), first.clone()]);
    assert_eq!(
        list(SessionFilter { limit: 1, ..all.clone() }).await,
        std::slice::from_ref(&newest)
    );
    let before = SessionFilter { before: Some("s3".into()), ..all.clone() };
    assert_eq!(list(before).await, [refused.clone(), first.clone()]);
    let of = |subject: &Subject| SessionFilter { subject: Some(subject.clone()), ..all.clone() };
    assert_eq!(list(of(&b1)).await, [first]);
    assert_eq!(list(of(&instance)).await, std::slice::from_ref(&newest));
    assert_eq!(list(SessionFilter { tenant: Some(tenant("a")), ..of(&instance) }).await, []);
    assert_eq!(list(SessionFilter { tenant: Some(tenant("b")), ..all }).await, [newest]);
}

/// A build that was entered stays so, whatever becomes of it.
#[tokio::test]
async fn a_build_is_marked_as_entered_for_ever() {
    let place = Place::new();
    let store = place.open().await;
    put(&*store, &build("b1", "a", 1)).await;
    let claimed = claim(&*store).await;
    assert!(!claimed.build.entered);
    store.insert_session(&session("s1", Subject::Build(id("b1")), "a", 5)).await.unwrap();
    assert!(!store.build(&id("b1")).await.unwrap().unwrap().entered, "it was only asked for");
    store.mark_entered(&id("b1")).await.unwrap();
    store.mark_entered(&id("b1")).await.unwrap();
    let missing = store.mark_entered(&id("b9")).await;
    assert!(matches!(missing, Err(StoreError::NotFound("build"))), "{missing:?}");
    // The driver does not know, and writes what it knows.
    store.annotate(&claimed.build, claimed.fence).await.unwrap();
    let failed = Change::Fail(Failure::new(FailureKind::Internal, "x"));
    let ended = store.change(&id("b1"), claimed.fence, failed, 9, &[]).await.unwrap();
    assert!(ended.entered);
    drop(store);
    let store = place.open().await;
    assert!(store.build(&id("b1")).await.unwrap().unwrap().entered);
    assert!(store.builds(&Filter { limit: 1, ..Filter::default() }).await.unwrap()[0].entered);
}

#[tokio::test]
async fn the_file_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let dir = place.dir.path().join("data");
    let store = SqliteStore::open(&dir).await.unwrap();
    store.insert_build(&build("b1", "acme", 1), &[], None, &[]).await.unwrap();
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    let files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(files.len() >= 2, "{files:?}");
    for file in files {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
    store.close().await;
}
