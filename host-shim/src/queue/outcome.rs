//! How the end of a session, or of a VM, becomes the cause of a failed build. Pure.

mod denied;

use kiln_protocol::event::Outcome;

pub(super) use self::denied::denied;
use super::sink::LogLimit;
use crate::build::{Build, Change, Failure, FailureKind, GuestSays, Pulled};
use crate::session::End;
use crate::store::{Disk, StoreError};

/// What the driver does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The guest has pushed an image: check it and publish.
    Publish {
        /// As the guest says.
        digest: String,
        /// What else it says.
        guest: GuestSays,
    },
    /// The build failed.
    Fail(Failure),
    /// The build was cancelled.
    Cancel,
    /// The server ends, and the build's VM with it.
    Abandoned,
}

/// How often a build is begun, where it was the server's end that took its VM.
const ATTEMPTS: u32 = 2;

/// What becomes of a build whose VM went with its server: it is built again, once. A build that ends its server would
/// end every one.
pub(super) fn gone_with_its_server(build: &Build) -> Change {
    if build.attempt < ATTEMPTS {
        return Change::Requeue;
    }
    let message = "the host was restarted while the build ran, and again while it ran a second time; submit it again";
    Change::Fail(Failure::new(FailureKind::HostRestarted, message))
}

/// Decides what follows from the end of a session.
pub(super) fn next(end: End) -> Next {
    let fail = |kind, message: String| Next::Fail(Failure::new(kind, message));
    match end {
        End::Outcome(Outcome::Built(built)) => {
            Next::Publish { guest: GuestSays::from(&built), digest: built.digest }
        }
        End::Outcome(Outcome::Failed(failure)) | End::Kept(failure) => {
            Next::Fail(host_checked(failure.into()))
        }
        End::Outcome(Outcome::Exited(_)) => fail(
            FailureKind::Internal,
            "the VM's agent ended a build as if it were an instance".into(),
        ),
        End::Outcome(Outcome::Cancelled) => fail(
            FailureKind::Internal,
            "the VM's agent stopped the build though nobody asked it to".into(),
        ),
        End::Cancelled(_) => Next::Cancel,
        End::Lost(why) => fail(FailureKind::VmLost, format!("the VM was lost: {why}")),
        End::Protocol(why) => {
            fail(FailureKind::ProtocolMismatch, format!("the VM's agent broke the protocol: {why}"))
        }
        // It may be built again, as if its VM had gone with the server.
        End::NotResumed => Next::Abandoned,
        End::Version(why) => fail(FailureKind::ProtocolMismatch, why),
        End::Store(error) if error.is::<LogLimit>() => fail(
            FailureKind::LogLimit,
            format!("{error}; print less, or ask the host's operator for more"),
        ),
        End::Store(error) if is_full(&error) => fail(
            FailureKind::Internal,
            "the host's disk is full: what the build printed could not be stored; tell the host's operator, and submit it again".into(),
        ),
        End::Store(error) => fail(
            FailureKind::Internal,
            format!("the host could not store the build's events: {error:#}"),
        ),
    }
}

fn is_full(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(StoreError::Database { disk: Some(Disk::Full), .. }))
}

/// Holds a build to the base that it asks for: the host knows what was pulled.
pub(super) fn pinned(next: Next, pin: &str, pulled: &[Pulled]) -> Next {
    if pulled.iter().any(|pulled| pulled.digest == pin) {
        return next;
    }
    let mismatch = |why: String| Next::Fail(Failure::new(FailureKind::BaseDigestMismatch, why));
    match next {
        Next::Publish { .. } => {
            mismatch(format!("the build asks for the base {pin}, but pulled no such image"))
        }
        Next::Fail(failure) if failure.kind == FailureKind::PullFailed => mismatch(format!(
            "the base image is not to be had as {pin}, which the build asks for: {}",
            failure.message
        )),
        other => other,
    }
}

/// A guest is not believed where it names a cause that only the host can know.
fn host_checked(failure: Failure) -> Failure {
    match failure.kind {
        FailureKind::SecretLeaked
        | FailureKind::EgressDenied
        | FailureKind::VmLost
        | FailureKind::HostRestarted => Failure { kind: FailureKind::Internal, ..failure },
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::event::{Built, Failure as Reported};

    use super::*;

    fn kind(end: End) -> Option<FailureKind> {
        match next(end) {
            Next::Fail(failure) => Some(failure.kind),
            _ => None,
        }
    }

    fn reported(kind: FailureKind) -> End {
        End::Outcome(Outcome::Failed(Reported {
            kind,
            message: "m".into(),
            step: Some(2),
            exit_code: Some(7),
            detail: None,
        }))
    }

    #[test]
    fn a_built_image_is_published() {
        let built = Built { digest: "sha256:1".into(), engine: "e".into(), lockfiles: vec![] };
        let digest = "sha256:1".to_owned();
        let guest =
            GuestSays { engine: "e".into(), lockfiles: std::collections::BTreeMap::default() };
        assert_eq!(next(End::Outcome(Outcome::Built(built))), Next::Publish { digest, guest });
    }

    #[test]
    fn a_guests_cause_is_kept_with_its_step() {
        let Next::Fail(failure) = next(reported(FailureKind::StepFailed)) else { unreachable!() };
        assert_eq!(
            (failure.kind, failure.step, failure.exit_code),
            (FailureKind::StepFailed, Some(2), Some(7))
        );
    }

    #[test]
    fn a_guest_cannot_claim_what_only_the_host_knows() {
        for cause in [
            FailureKind::SecretLeaked,
            FailureKind::EgressDenied,
            FailureKind::VmLost,
            FailureKind::HostRestarted,
        ] {
            assert_eq!(kind(reported(cause)), Some(FailureKind::Internal));
        }
    }

    #[test]
    fn a_session_that_did_not_end_well_has_a_cause() {
        assert_eq!(kind(End::Lost("x".into())), Some(FailureKind::VmLost));
        assert_eq!(kind(End::Protocol("x".into())), Some(FailureKind::ProtocolMismatch));
        assert_eq!(kind(End::Version("x".into())), Some(FailureKind::ProtocolMismatch));
        assert_eq!(kind(End::Outcome(Outcome::Cancelled)), Some(FailureKind::Internal));
        assert_eq!(kind(End::Store(LogLimit(1).into())), Some(FailureKind::LogLimit));
        let full = |disk| {
            let failed = StoreError::Database { operation: "write", disk, source: "no".into() };
            match next(End::Store(failed.into())) {
                Next::Fail(failure) => failure.message.contains("disk is full"),
                other => panic!("{other:?}"),
            }
        };
        assert!(full(Some(Disk::Full)) && !full(None));
        assert_eq!(kind(End::Store(anyhow::anyhow!("x"))), Some(FailureKind::Internal));
        assert_eq!(next(End::Cancelled(None)), Next::Cancel);
    }

    #[test]
    fn a_build_is_held_to_the_base_that_it_asks_for() {
        let guest =
            GuestSays { engine: "e".into(), lockfiles: std::collections::BTreeMap::default() };
        let publish = || Next::Publish { digest: "sha256:1".into(), guest: guest.clone() };
        let pulled = [Pulled { reference: "r".into(), digest: "sha256:2".into() }];
        assert_eq!(pinned(publish(), "sha256:2", &pulled), publish());
        let failed = |kind| Next::Fail(Failure::new(kind, "why"));
        for next in [publish(), failed(FailureKind::PullFailed)] {
            let Next::Fail(failure) = pinned(next, "sha256:3", &pulled) else { panic!() };
            assert_eq!(failure.kind, FailureKind::BaseDigestMismatch);
            assert!(failure.message.contains("sha256:3"), "{}", failure.message);
        }
        let other = failed(FailureKind::StepFailed);
        assert_eq!(pinned(other, "sha256:3", &pulled), failed(FailureKind::StepFailed));
        assert_eq!(pinned(Next::Cancel, "sha256:3", &[]), Next::Cancel);
    }
}
