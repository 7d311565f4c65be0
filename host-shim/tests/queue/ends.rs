//! What ends is stored, whatever the store does; and what breaks down ends.

use std::time::Duration;

use kiln::build::{FailureKind, Status};
use kiln::events::payload;
use kiln::store::Store;
use kiln_protocol::event::{Failure, Outcome};

use super::faulty::Fault;
use super::guest::Agent;
use super::house::{House, until};

/// The build's step failed.
async fn fail(agent: &mut Agent) {
    agent
        .end(Outcome::Failed(Failure {
            kind: FailureKind::StepFailed,
            message: "step 1 failed".into(),
            step: Some(1),
            exit_code: Some(3),
            detail: None,
        }))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_cannot_be_stored_is_tried_again_and_holds_no_place() {
    let house = House::new(1).await;
    house.store.fault("annotate", Fault::Fails, 2);
    house.store.fault("fail", Fault::Fails, 4);
    let first = house.submit("first", "a", 10).await;
    let mut agent = house.agent(&first).await;
    agent.begin().await;
    // It is there when the first one's end is tried.
    let second = house.submit("second", "a", 10).await;
    fail(&mut agent).await;
    house.store.had(4).await;
    assert_eq!(house.build(&first).await.status, Status::Building);
    assert!(house.workshop.builds_dir.join("second").exists());
    // There is one place, and the second has it while the first one's end is still unstored.
    let mut agent = house.agent(&second).await;
    agent.begin().await;
    let ended = house.end(&first).await;
    assert_eq!(ended.failure.unwrap().kind, FailureKind::StepFailed);
    assert_eq!(ended.usage.log_bytes, None);
    assert!(ended.provenance.builder_digest.is_some(), "what is known of it is stored as well");
    fail(&mut agent).await;
    assert_eq!(house.end(&second).await.status, Status::Failed);
    until(|| house.is_gone(&first) && house.is_gone(&second)).await;
    house.close().await;
}

/// A commit whose answer was lost: stored once, told once.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_was_stored_unheard_is_not_stored_twice() {
    let house = House::new(1).await;
    house.store.fault("annotate", Fault::Unheard, 1);
    house.store.fault("fail", Fault::Unheard, 1);
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    fail(&mut agent).await;
    let ended = house.end(&id).await;
    assert_eq!(ended.failure.unwrap().kind, FailureKind::StepFailed);
    let events = house.store.events_after(&id, 0, 100).await.unwrap();
    let ends = events.iter().filter(|e| payload::status_of(&e.payload) == Some(Status::Failed));
    assert_eq!(ends.count(), 1, "{events:?}");
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_server_ends_the_tries() {
    let house = House::new(1).await;
    house.store.fault("fail", Fault::Fails, u32::MAX);
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    fail(&mut agent).await;
    house.store.had(7).await;
    house.stop.cancel();
    house.abandon.cancel();
    // Pauses are longer than this by now.
    tokio::time::timeout(Duration::from_secs(5), house.dispatcher).await.unwrap().unwrap();
    // The next start finds it.
    let left = house.store.reclaim("next", kiln::clock::now()).await.unwrap();
    assert_eq!(left.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_panics_while_the_vm_runs_ends_the_build_and_leaves_nothing() {
    let house = House::new(1).await;
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    assert_eq!(house.processes().len(), 2);
    house.store.fault("events", Fault::Panics, 1);
    // And the store is not well either.
    house.store.fault("fail", Fault::Fails, 2);
    agent.print(2, "what cannot be stored").await;
    let ended = house.end(&id).await;
    let failure = ended.failure.unwrap();
    assert_eq!(failure.kind, FailureKind::Internal);
    assert!(failure.message.contains("broke down"), "{}", failure.message);
    assert!(house.is_gone(&id), "{:?}", house.processes());
    assert!(agent.hear().await.is_none());
    // Its place is free.
    let next = house.submit("next", "a", 10).await;
    let mut agent = house.agent(&next).await;
    agent.begin().await;
    fail(&mut agent).await;
    assert_eq!(house.end(&next).await.failure.unwrap().kind, FailureKind::StepFailed);
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_panics_after_the_vm_ends_the_build() {
    let house = House::new(1).await;
    house.store.fault("annotate", Fault::Panics, 1);
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    fail(&mut agent).await;
    let failure = house.end(&id).await.failure.unwrap();
    assert!(failure.message.contains("broke down"), "{failure:?}");
    assert!(house.is_gone(&id), "{:?}", house.processes());
    house.close().await;
}
