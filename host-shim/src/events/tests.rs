//! Followers over a real store.

use std::collections::BTreeMap;

use super::*;
use crate::build::{NetworkMode, Request, Status, Tenant};
use crate::store::sqlite::SqliteStore;

/// Silence that no test reaches unless it wants to.
const LONG: Duration = Duration::from_mins(10);

struct Bench {
    _dir: tempfile::TempDir,
    store: Arc<dyn Store>,
    log: EventLog,
    id: BuildId,
}

async fn bench(quiet: Duration) -> Bench {
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
        network: NetworkMode::None,
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
    let first = payload::of_host(1, payload::status(Status::Queued, Some(1)));
    store.insert_build(&build, &[first], None, &[]).await.unwrap();
    Bench { _dir: dir, log: EventLog::with_quiet(store.clone(), quiet), store, id }
}

fn line(n: u64) -> NewEvent {
    payload::of_host(2, payload::kiln_log(&n.to_string()))
}

fn cancelled() -> [NewEvent; 1] {
    [payload::of_host(3, payload::status(Status::Cancelled, None))]
}

async fn all(mut follower: Follower) -> Vec<u64> {
    let mut seen = vec![];
    loop {
        match follower.next().await.unwrap() {
            Batch::Events(blocks) => seen.extend(blocks.seqs()),
            Batch::Quiet => {}
            Batch::End => return seen,
        }
    }
}

#[tokio::test]
async fn without_follow_it_ends_with_what_is_stored() {
    let b = bench(LONG).await;
    b.log.append(&b.id, &[line(1), line(2)]).await.unwrap();
    assert_eq!(all(b.log.read(&b.id, 0, false)).await, [1, 2, 3]);
    assert_eq!(all(b.log.read(&b.id, 2, false)).await, [3]);
    assert_eq!(all(b.log.read(&b.id, u64::MAX, false)).await, [0; 0]);
    assert_eq!(b.log.channels(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_of_a_busy_build_lose_nothing_and_see_nothing_twice() {
    const LINES: u64 = 400;
    let b = bench(LONG).await;
    let mut followers = tokio::task::JoinSet::new();
    let writer = {
        let (log, id) = (b.log.clone(), b.id.clone());
        tokio::spawn(async move {
            for n in 0..LINES {
                log.append(&id, &[line(n)]).await.unwrap();
            }
            log.cancel_queued(&id, 3, &cancelled()).await.unwrap();
        })
    };
    for n in 0..40 {
        // Each begins somewhere else, while events are being stored.
        let (log, id) = (b.log.clone(), b.id.clone());
        followers.spawn(async move { (n, all(log.read(&id, n, true)).await) });
        tokio::task::yield_now().await;
    }
    writer.await.unwrap();
    while let Some(result) = followers.join_next().await {
        let (after, seen) = result.unwrap();
        assert_eq!(seen, (after + 1..=LINES + 2).collect::<Vec<_>>());
    }
    assert_eq!(b.log.channels(), 0, "channels go with their followers");
}

#[tokio::test]
async fn a_follower_of_a_finished_build_ends() {
    let b = bench(LONG).await;
    b.log.cancel_queued(&b.id, 3, &cancelled()).await.unwrap();
    assert_eq!(all(b.log.read(&b.id, 0, true)).await, [1, 2]);
    assert_eq!(all(b.log.read(&b.id, 2, true)).await, [0; 0]);
    assert_eq!(all(b.log.read(&b.id, 99, true)).await, [0; 0]);
    assert_eq!(b.log.channels(), 0);
}

#[tokio::test]
async fn silence_is_reported_and_other_writers_are_found() {
    let b = bench(Duration::from_millis(20)).await;
    let mut follower = b.log.read(&b.id, 1, true);
    assert_eq!(follower.next().await.unwrap(), Batch::Quiet);
    assert_eq!(follower.next().await.unwrap(), Batch::Quiet);
    // Another process stores without a wake.
    b.store.append_events(&b.id, &[line(1)]).await.unwrap();
    let found = loop {
        match follower.next().await.unwrap() {
            Batch::Events(events) => break events,
            Batch::Quiet => {}
            Batch::End => panic!("ended"),
        }
    };
    assert_eq!(found.seqs().collect::<Vec<_>>(), [2]);
    b.store.cancel_queued(&b.id, 3, &[]).await.unwrap();
    assert_eq!(all(follower).await, [0; 0], "ends even where no event told of the end");
}

#[tokio::test]
async fn a_dropped_read_takes_nothing() {
    let b = bench(LONG).await;
    let mut follower = b.log.read(&b.id, 0, true);
    for _ in 0..50 {
        tokio::select! {
            biased;
            () = std::future::ready(()) => {}
            _ = follower.next() => unreachable!("ready comes first"),
        }
    }
    let Batch::Events(blocks) = follower.next().await.unwrap() else { panic!("no events") };
    assert_eq!(blocks.seqs().next(), Some(1));
}

#[tokio::test]
async fn nothing_is_stored_after_the_end() {
    let b = bench(LONG).await;
    b.log.cancel_queued(&b.id, 3, &cancelled()).await.unwrap();
    let refused = b.log.append(&b.id, &[line(1)]).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
}

/// What a reader is told: the numbers of events, and those that it is told are gone.
#[derive(Debug, PartialEq)]
enum Told {
    Event(u64),
    Trimmed(std::ops::RangeInclusive<u64>),
}

async fn told(mut follower: Follower) -> Vec<Told> {
    let mut told = vec![];
    loop {
        let Batch::Events(blocks) = follower.next().await.unwrap() else { return told };
        for (seq, data) in blocks.parsed() {
            told.push(match data["from"].as_u64() {
                None => Told::Event(seq),
                Some(from) => {
                    assert_eq!(data, payload::trimmed(from, seq));
                    Told::Trimmed(from..=seq)
                }
            });
        }
    }
}

fn step(n: u64) -> NewEvent {
    payload::of_host(2, serde_json::json!({ "type": "step", "index": n, "name": "make" }))
}

async fn trim(b: &Bench) {
    let mut after = 0;
    while let Some(next) = b.store.trim_log(&b.id, after, 100).await.unwrap().next {
        after = next;
    }
}

#[tokio::test]
async fn gaps_are_told_wherever_they_are_and_wherever_a_reader_begins() {
    use Told::{Event, Trimmed};
    let b = bench(LONG).await;
    // 1 status, 2 to 4 log, 5 step, 6 log, 7 step, 8 status
    let all = [line(2), line(3), line(4), step(5), line(6), step(7)];
    b.log.append(&b.id, &all).await.unwrap();
    b.log.cancel_queued(&b.id, 3, &cancelled()).await.unwrap();
    trim(&b).await;
    let whole = || vec![Event(1), Trimmed(2..=4), Event(5), Trimmed(6..=6), Event(7), Event(8)];
    for follow in [false, true] {
        let from = async |after| told(b.log.read(&b.id, after, follow)).await;
        assert_eq!(from(0).await, whole());
        assert_eq!(from(1).await, whole()[1..]);
        // Inside of a gap; behind it, as one goes on who was told of it.
        let mut rest = whole().split_off(1);
        rest[0] = Trimmed(3..=4);
        assert_eq!(from(2).await, rest);
        assert_eq!(from(4).await, whole()[2..]);
        assert_eq!(from(6).await, whole()[4..]);
        assert_eq!(from(8).await, []);
        assert_eq!(from(99).await, []);
        assert_eq!(from(u64::MAX).await, []);
    }
}

#[tokio::test]
async fn a_gap_over_pages_is_one_and_may_open_while_it_is_read() {
    use Told::{Event, Trimmed};
    let b = bench(LONG).await;
    let lines = 3 * u64::from(PAGE);
    let all: Vec<_> = (0..lines).map(line).collect();
    b.log.append(&b.id, &all).await.unwrap();
    b.log.cancel_queued(&b.id, 3, &cancelled()).await.unwrap();
    let mut half = b.log.read(&b.id, 0, true);
    let Batch::Events(first) = half.next().await.unwrap() else { panic!("no events") };
    assert_eq!(first.seqs().count(), PAGE as usize);
    trim(&b).await;
    let (from, last) = (u64::from(PAGE) + 1, lines + 2);
    assert_eq!(told(half).await, [Trimmed(from..=last - 1), Event(last)]);
    let whole = told(b.log.read(&b.id, 0, false)).await;
    assert_eq!(whole, [Event(1), Trimmed(2..=last - 1), Event(last)]);
}

#[tokio::test]
async fn a_log_that_began_with_lines_begins_with_a_gap() {
    use Told::{Event, Trimmed};
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(dir.path()).await.unwrap());
    let build = crate::build::tests::queued();
    store.insert_build(&build, &[line(1), line(2)], None, &[]).await.unwrap();
    store.cancel_queued(&build.id, 3, &cancelled()).await.unwrap();
    let b = Bench { _dir: dir, log: EventLog::new(store.clone()), store, id: build.id };
    trim(&b).await;
    assert_eq!(told(b.log.read(&b.id, 0, true)).await, [Trimmed(1..=2), Event(3)]);
    assert_eq!(told(b.log.read(&b.id, 1, true)).await, [Trimmed(2..=2), Event(3)]);
}

/// Numbers that look random.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_that_come_fall_behind_and_come_again_at_any_moment_see_each_once() {
    const BATCHES: u64 = 150;
    for seed in 1..=3_u64 {
        let b = bench(LONG).await;
        let stalled = b.log.read(&b.id, 0, true);
        let mut followers = tokio::task::JoinSet::new();
        let writer = {
            let (log, id, mut state) = (b.log.clone(), b.id.clone(), seed);
            tokio::spawn(async move {
                let mut last = 1;
                for _ in 0..BATCHES {
                    // In the end several times what is kept for all.
                    let lines = 1 + random(&mut state) % 8;
                    let text = "x".repeat(usize::try_from(random(&mut state) % 8000).unwrap());
                    let line = payload::of_host(2, payload::kiln_log(&text));
                    let stored =
                        log.append(&id, &vec![line; usize::try_from(lines).unwrap()]).await;
                    assert_eq!(stored.unwrap(), last + lines);
                    last += lines;
                }
                log.cancel_queued(&id, 3, &cancelled()).await.unwrap();
                last + 1
            })
        };
        for n in 0..60 {
            let (log, id, mut state) = (b.log.clone(), b.id.clone(), seed * 1000 + n);
            followers.spawn(async move {
                let after = random(&mut state) % 40;
                let (mut seen, mut at) = (vec![], after);
                'again: loop {
                    let mut follower = log.read(&id, at, true);
                    loop {
                        // Slower than others, now and then.
                        for _ in 0..random(&mut state) % 64 {
                            tokio::task::yield_now().await;
                        }
                        match follower.next().await.unwrap() {
                            Batch::Events(blocks) => {
                                seen.extend(blocks.seqs());
                                at = blocks.last();
                            }
                            Batch::Quiet => {}
                            Batch::End => return (after, seen),
                        }
                        if random(&mut state).is_multiple_of(8) {
                            continue 'again;
                        }
                    }
                }
            });
            tokio::task::yield_now().await;
        }
        let last = writer.await.unwrap();
        while let Some(result) = followers.join_next().await {
            let (after, seen) = result.unwrap();
            assert_eq!(seen, (after + 1..=last).collect::<Vec<_>>(), "seed {seed}");
        }
        // It has taken nothing while all that happened.
        assert_eq!(all(stalled).await, (1..=last).collect::<Vec<_>>(), "seed {seed}");
        assert_eq!(b.log.channels(), 0);
    }
}

#[tokio::test]
async fn what_is_up_to_date_is_read_and_written_out_once_for_all() {
    let b = bench(LONG).await;
    let mut followers: Vec<_> = (0..3).map(|_| b.log.read(&b.id, 1, true)).collect();
    tokio::select! {
        biased;
        _ = followers[0].next() => panic!("there is nothing yet"),
        () = read_for_all_up_to(&b, 1) => {}
    }
    b.log.append(&b.id, &[line(1), line(2)]).await.unwrap();
    read_for_all_up_to(&b, 3).await;
    let mut texts = vec![];
    for follower in &mut followers {
        let Batch::Events(blocks) = follower.next().await.unwrap() else { panic!("no events") };
        assert_eq!(blocks.seqs().collect::<Vec<_>>(), [2, 3]);
        texts.push(blocks.text());
    }
    assert!(texts.iter().all(|text| text.as_ptr() == texts[0].as_ptr()), "written out again");
}

/// Whoever comes when all is read for all asks the store nothing.
#[tokio::test]
async fn one_who_comes_later_waits_with_the_rest() {
    let b = bench(LONG).await;
    let mut first = b.log.read(&b.id, 1, true);
    tokio::select! {
        biased;
        _ = first.next() => panic!("there is nothing yet"),
        () = read_for_all_up_to(&b, 1) => {}
    }
    let mut second = b.log.read(&b.id, 1, true);
    {
        let mut next = Box::pin(second.next());
        // A look at the store would not be over yet, and would be known.
        assert!(futures_util::poll!(&mut next).is_pending());
    }
    assert_eq!((second.known_final, b.log.channels()), (None, 1));
    b.log.cancel_queued(&b.id, 3, &cancelled()).await.unwrap();
    for follower in [first, second] {
        assert_eq!(all(follower).await, [2]);
    }
    assert_eq!(b.log.channels(), 0);
}

async fn read_for_all_up_to(b: &Bench, last: u64) {
    let channel = Arc::clone(&b.log.inner.channels()[&b.id]);
    while channel.shared().recent.read() != Some(last) {
        tokio::task::yield_now().await;
    }
}
