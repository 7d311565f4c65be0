//! VMs of builds that failed, and builds that need their memory.

use kiln::build::{BuildId, Status};
use kiln::exec::Line;
use kiln_protocol::event::{Failure, FailureKind, Outcome};
use kiln_protocol::message::AgentToHost;
use kiln_protocol::port;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::house::{House, MEMORY_MB, until};

/// A quarter of all memory.
const QUARTER: u32 = MEMORY_MB / 4;

/// A build whose step failed, and whose VM stays.
async fn lodger(house: &House, name: &str, tenant: &str) -> BuildId {
    let id = house.kept(name, tenant, QUARTER).await;
    let mut agent = house.agent(&id).await;
    agent.begin().await;
    agent.say(AgentToHost::Kept).await;
    agent
        .end(Outcome::Failed(Failure {
            kind: FailureKind::StepFailed,
            message: "step 1 failed".into(),
            step: Some(1),
            exit_code: Some(3),
            detail: None,
        }))
        .await;
    assert_eq!(house.end(&id).await.status, Status::Failed);
    // Its own memory is no build's any more.
    until(|| house.workshop.capacity.room().free_mb == MEMORY_MB).await;
    id
}

/// Somebody comes in, by the socket of the VM's device.
async fn enter(house: &House, id: &BuildId) -> (Line, UnixStream) {
    let device = UnixListener::bind(house.vm(id).join("sock/v")).unwrap();
    let entrance = house.workshop.kept.entrance(id).unwrap();
    let takes = async {
        let (mut stream, _) = device.accept().await.unwrap();
        let asked = format!("CONNECT {}\n", port::EXEC);
        let mut heard = vec![0; asked.len()];
        stream.read_exact(&mut heard).await.unwrap();
        assert_eq!(String::from_utf8(heard).unwrap(), asked);
        stream.write_all(b"OK 1\n").await.unwrap();
        stream
    };
    let (line, stream) = tokio::join!(entrance.dial(), takes);
    (line.unwrap(), stream)
}

fn staying(house: &House) -> Vec<String> {
    house.workshop.kept.list(None).iter().map(|lease| lease.id.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_needs_their_memory_has_kept_vms_go() {
    let house = House::keeping(3, 4).await;
    let oldest = lodger(&house, "oldest", "a").await;
    let idle = lodger(&house, "idle", "b").await;
    let young = lodger(&house, "young", "c").await;
    assert_eq!(staying(&house), ["oldest", "idle", "young"]);
    let inside = enter(&house, &oldest).await;
    let entrance = house.workshop.kept.entrance(&oldest).unwrap();
    until(|| house.workshop.kept.lease(&oldest).unwrap().sessions == 1).await;

    let start = async |name: &str, memory_mb| {
        let id = house.sized(name, "d", memory_mb).await;
        let mut agent = house.agent(&id).await;
        agent.begin().await;
        assert_eq!(house.build(&id).await.status, Status::Building);
        agent
    };
    // There is room beside the three of them for one.
    let _first = start("first", QUARTER).await;
    assert_eq!(staying(&house), ["oldest", "idle", "young"]);
    // For the next the oldest in which nobody is goes.
    let _second = start("second", QUARTER).await;
    assert_eq!(staying(&house), ["oldest", "young"]);
    assert!(!house.vm(&idle).exists());
    // And where all memory is wanted, whoever is inside is put out.
    let _third = start("third", 2 * QUARTER).await;
    assert_eq!(staying(&house), [""; 0]);
    assert!(!house.vm(&young).exists() && !house.vm(&oldest).exists());
    entrance.closed().await;
    drop(inside);
    assert_eq!(house.workshop.capacity.room().free_mb, 0);
    house.abandon.cancel();
    house.close().await;
}
