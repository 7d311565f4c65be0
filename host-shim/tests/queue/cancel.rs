//! A cancel ends a build within two seconds, to the last process, wherever its VM is and whatever that does. (One that
//! has no VM yet: `tests/api`.)

use std::time::{Duration, Instant};

use kiln::api::CancelOutcome;
use kiln::build::{BuildId, Status};
use kiln_protocol::event::{Event, Outcome, Phase};
use kiln_protocol::message::HostToAgent;

use super::house::{House, until};

const AT_MOST: Duration = Duration::from_secs(2);

/// More than the host sends ahead.
const LARGE: usize = 16 << 20;

/// Cancels, and looks at once: who is told that a build is cancelled may count on it.
async fn cancel(house: &House, id: &BuildId) {
    let begun = Instant::now();
    assert_eq!(house.cancel(id).await, CancelOutcome::Cancelled);
    let took = begun.elapsed();
    assert!(house.is_gone(id), "left: {:?}", house.processes());
    assert!(took < AT_MOST, "it took {took:?}");
    let build = house.build(id).await;
    assert_eq!((build.status, build.failure), (Status::Cancelled, None));
    assert_eq!(house.end(id).await.status, Status::Cancelled);
    // Whoever asks once more is told the same.
    assert_eq!(house.cancel(id).await, CancelOutcome::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_whose_vm_boots() {
    let house = House::new(1).await;
    let id = house.submit("b", "a", 10).await;
    until(|| !house.processes().is_empty()).await;
    cancel(&house, &id).await;
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_whose_source_is_not_taken() {
    let house = House::new(1).await;
    let id = house.submit("b", "a", LARGE).await;
    let _agent = house.agent(&id).await;
    cancel(&house, &id).await;
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_whose_agent_obeys() {
    let house = House::new(1).await;
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    let guest = tokio::spawn(async move {
        assert_eq!(agent.hear().await, Some(HostToAgent::Cancel));
        agent.print(2, "the last line").await;
        agent.end(Outcome::Cancelled).await;
        agent.hear().await
    });
    cancel(&house, &id).await;
    // What it said last is stored.
    assert_eq!(guest.await.unwrap(), Some(HostToAgent::Finish));
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_whose_agent_does_not_listen() {
    let house = House::new(1).await;
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    cancel(&house, &id).await;
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_being_pushed_beside_one_that_goes_on() {
    let house = House::new(2).await;
    let (id, other) = (house.submit("b", "a", 10).await, house.submit("other", "a", 10).await);
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    agent.event(2, Event::Phase(Phase::Pushing)).await;
    let mut unharmed = house.agent(&other).await;
    unharmed.begin().await;
    let begun = Instant::now();
    assert_eq!(house.cancel(&id).await, CancelOutcome::Cancelled);
    assert!(begun.elapsed() < AT_MOST);
    assert_eq!(house.build(&other).await.status, Status::Building);
    assert_eq!(house.processes().len(), 2, "the other's");
    cancel(&house, &other).await;
    assert!(house.is_gone(&id));
    house.close().await;
}
