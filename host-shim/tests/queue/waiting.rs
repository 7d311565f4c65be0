//! Builds that wait.

use std::time::Duration;

use kiln::build::{FailureKind, Status};
use kiln::store::Store;

use super::house::{House, MEMORY_MB, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_waits_for_too_long_fails_and_was_never_started() {
    let house = House::that(1, Duration::from_secs(2)).await;
    let first = house.submit("first", "a", 10).await;
    let mut agent = house.agent(&first).await;
    agent.begin().await;
    let second = house.submit("second", "b", 10).await;
    let ended = house.end(&second).await;
    let failure = ended.failure.unwrap();
    assert_eq!(failure.kind, FailureKind::TimedOut);
    for words in ["2 s", "--max-queue-seconds", "never started"] {
        assert!(failure.message.contains(words), "{}", failure.message);
    }
    assert!(ended.completed_at.unwrap() - ended.created_at > 2000);
    assert_eq!((ended.started_at, ended.attempt), (None, 0));
    // Its source goes once its end is stored: until then it may be claimed.
    until(|| !house.workshop.builds_dir.join("second").exists()).await;
    // What is under way is not meant.
    assert_eq!(house.build(&first).await.status, Status::Building);
    house.abandon.cancel();
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waited_for_too_long_while_no_server_ran_is_not_started() {
    let hour = Duration::from_secs(3600);
    let house = House::new(0).await;
    let now = kiln::clock::now();
    // Before the limit, and after it by as long as this test may take.
    let old = house.submitted("old", "a", 10, now - 3_600_000).await;
    let young = house.submitted("young", "a", 10, now - 3_600_000 + 600_000).await;
    let house = house.restarted(1, hour).await;
    assert_eq!(house.end(&old).await.failure.unwrap().kind, FailureKind::TimedOut);
    let mut agent = house.agent(&young).await;
    agent.begin().await;
    house.abandon.cancel();
    house.close().await;
}

/// A large build waits for memory; a small one of another tenant starts past it, its own tenant's does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_waits_for_memory_and_keeps_its_place() {
    let house = House::new(4).await;
    let first = house.sized("first", "a", MEMORY_MB / 2).await;
    let mut agent = house.agent(&first).await;
    agent.begin().await;
    let large = house.sized("large", "b", MEMORY_MB).await;
    house.sized("behind", "b", 1).await;
    let small = house.sized("small", "c", MEMORY_MB / 2).await;
    // There is a VM for each, and memory for this one.
    let mut other = house.agent(&small).await;
    other.begin().await;
    assert_eq!(house.build(&large).await.status, Status::Queued);
    assert_eq!(house.store.queue_position(&large).await.unwrap(), Some(1));
    house.cancel(&first).await;
    // There is room for the one behind it, and for nobody else.
    assert_eq!(house.store.queue_position(&large).await.unwrap(), Some(1));
    house.cancel(&small).await;
    let mut agent = house.agent(&large).await;
    agent.begin().await;
    assert_eq!(house.workshop.capacity.room().free_mb, 0);
    house.abandon.cancel();
    house.close().await;
}

/// It was queued when there was more memory: it is in nobody's way, and ends as those that wait for too long.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_can_never_start_is_in_nobodys_way() {
    let house = House::that(1, Duration::from_secs(3)).await;
    let huge = house.sized("huge", "a", MEMORY_MB + 1).await;
    for name in ["one", "two"] {
        let id = house.submit(name, "b", 10).await;
        let mut agent = house.agent(&id).await;
        agent.begin().await;
        house.cancel(&id).await;
        assert_eq!(house.build(&id).await.status, Status::Cancelled);
    }
    assert_eq!(house.end(&huge).await.failure.unwrap().kind, FailureKind::TimedOut);
    house.close().await;
}
