//! Builds whose server ends while they run.

use std::time::Duration;

use kiln::build::{FailureKind, Status};
use kiln::events::payload;
use kiln::store::Store;
use kiln_protocol::event::{Failure, FailureKind as Reported, Outcome};
use kiln_protocol::message::AgentToHost;

use super::house::House;

const LONG: Duration = Duration::from_secs(3600);

/// The server ends and waits for no build; another one starts.
async fn restarted(house: House) -> House {
    house.abandon.cancel();
    house.restarted(1, LONG).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_built_again_from_the_beginning() {
    let house = House::new(1).await;
    let id = house.submit("b", "a", 10).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    agent.print(2, "of the first attempt").await;
    // It was stored.
    assert!(agent.acknowledged(2).await);
    let house = restarted(house).await;

    // All of the source comes again, to a VM of its own.
    let mut agent = house.agent(&id).await;
    assert_eq!(house.build(&id).await.attempt, 2);
    agent.begin().await;
    agent.print(2, "of the second attempt").await;
    agent
        .say(AgentToHost::Outcome(Outcome::Failed(Failure {
            kind: Reported::StepFailed,
            message: "step 1 failed".into(),
            step: Some(1),
            exit_code: Some(1),
            detail: None,
        })))
        .await;
    let ended = house.end(&id).await;
    assert_eq!(ended.failure.unwrap().kind, FailureKind::StepFailed);
    let events = house.store.events_after(&id, 0, 100).await.unwrap();
    let seqs: Vec<_> = events.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
    let told: Vec<_> = events
        .iter()
        .filter_map(|event| {
            let status = payload::status_of(&event.payload).map(|status| status.to_string());
            status.or_else(|| event.payload["content"].as_str().map(str::to_owned))
        })
        .collect();
    assert_eq!(
        told,
        [
            "queued",
            "building",
            "of the first attempt",
            "the host was restarted while the build ran: it is built again, from the beginning",
            "queued",
            "building",
            "of the second attempt",
            "failed"
        ]
    );
    assert!(house.is_gone(&id));
    house.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_goes_with_two_servers_fails() {
    let mut house = House::new(1).await;
    let id = house.submit("b", "a", 10).await;
    for _ in 1..=2 {
        house.agent(&id).await.begin().await;
        house = restarted(house).await;
    }
    let ended = house.end(&id).await;
    assert_eq!((ended.status, ended.attempt), (Status::Failed, 2));
    assert_eq!(ended.failure.unwrap().kind, FailureKind::HostRestarted);
    assert!(house.is_gone(&id));
    house.close().await;
}
