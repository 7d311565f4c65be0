//! The lease of a claim.

use std::time::Duration;

use kiln::build::{Change, Status};
use kiln::store::{LEASE, Store, StoreError};

use super::house::{House, until};

const LONG: Duration = Duration::from_secs(3600);

fn lease_ms() -> i64 {
    i64::try_from(LEASE.as_millis()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_renews_its_claim() {
    let house = House::new(1).await;
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    // Without a renewal it lapses before then.
    let later = kiln::clock::now() + lease_ms() + 200;
    while !house.store.lapsed(later).await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(house.build(&id).await.status, Status::Building);
    house.abandon.cancel();
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_whose_claim_was_taken_over_stops_and_changes_nothing() {
    let house = House::new(1).await;
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    let later = kiln::clock::now() + 100 * lease_ms();
    let other = house.store.take_over(&id, "another server", later).await.unwrap().unwrap();
    until(|| !house.vm(&id).exists() && house.processes().is_empty()).await;
    let build = house.build(&id).await;
    assert_eq!((build.status, build.attempt), (Status::Building, 1));
    // Its source is the other's now.
    assert!(house.workshop.builds_dir.join("b").exists());
    let now = kiln::clock::now();
    house.store.change(&id, other.fence, Change::Cancel, now, &[]).await.unwrap();
    house.close().await;
}

/// Nobody knows why its driver has gone: it is built again all the same, and not at the next start only.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_nobody_drives_is_built_again() {
    let house = House::new(0).await;
    let id = house.submit("b", "a", 10).await;
    let before = kiln::clock::now() - lease_ms() - 1;
    let gone = house.store.claim("gone", before, &[]).await.unwrap().unwrap();
    let house = house.restarted(1, LONG).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    assert_eq!(house.build(&id).await.attempt, 2);
    let late = house.store.annotate(&gone.build, gone.fence).await;
    assert!(matches!(late, Err(StoreError::Fenced)), "{late:?}");
    house.abandon.cancel();
    house.close().await;
}
