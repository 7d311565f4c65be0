//! The transition table, exhaustively and by random walks.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

pub(crate) fn request() -> Request {
    Request {
        dockerfile: None,
        target: None,
        image_name: None,
        build_args: BTreeMap::new(),
        tags: BTreeMap::new(),
        base_image_digest: None,
        network: NetworkMode::None,
        allowed_domains: vec![],
        secrets: vec![],
        timeout_seconds: 600,
        memory_mb: 2048,
        cpus: 2,
        disk_gb: 10,
        keep_failed_seconds: 0,
        priority: 50,
        source_digest: "sha256:00".into(),
        source_bytes: 1,
    }
}

pub(crate) fn queued() -> Build {
    Build::queued(BuildId::new("b1").unwrap(), Tenant::new("acme").unwrap(), request(), 10)
}

fn failure() -> Failure {
    Failure::new(FailureKind::Internal, "it broke")
}

/// Every state that differs for the table, by name.
fn states() -> Vec<(&'static str, Build)> {
    let building = queued().apply(Change::Claim, 20).unwrap();
    let pushing = building.apply(Change::Push, 30).unwrap();
    let publishing = pushing.apply(Change::Publish("sha256:aa".into()), 40).unwrap();
    vec![
        ("ready", publishing.apply(Change::Finish, 50).unwrap()),
        ("failed", building.apply(Change::Fail(failure()), 50).unwrap()),
        ("cancelled", queued().apply(Change::Cancel, 50).unwrap()),
        ("queued", queued()),
        ("building", building),
        ("pushing", pushing),
        ("publishing", publishing),
    ]
}

fn changes() -> Vec<(&'static str, Change)> {
    vec![
        ("claim", Change::Claim),
        ("push", Change::Push),
        ("publish", Change::Publish("sha256:aa".into())),
        ("publish another", Change::Publish("sha256:bb".into())),
        ("finish", Change::Finish),
        ("fail", Change::Fail(failure())),
        ("cancel", Change::Cancel),
        ("requeue", Change::Requeue),
    ]
}

#[test]
fn the_whole_table() {
    use Status::{Building, Cancelled, Failed, Pushing, Queued, Ready};
    let allowed = |state: &str, change: &str| match (state, change) {
        ("queued", "claim") => Some(Building),
        ("queued" | "building" | "pushing" | "publishing", "fail") => Some(Failed),
        ("queued" | "building" | "pushing", "cancel") => Some(Cancelled),
        ("building", "push")
        | ("pushing", "publish" | "publish another")
        | ("publishing", "publish") => Some(Pushing),
        ("publishing", "finish") => Some(Ready),
        ("building" | "pushing", "requeue") => Some(Queued),
        _ => None,
    };
    for (state, build) in states() {
        for (name, change) in changes() {
            let after = build.apply(change, 99).ok().map(|b| b.status);
            assert_eq!(after, allowed(state, name), "{name} of a build that is {state}");
        }
    }
}

/// What a state is called in the docs: a build whose digest is recorded is `publishing`, in the status `pushing`.
fn name(build: &Build) -> &'static str {
    let publishing = build.publishing.is_some() && build.status == Status::Pushing;
    if publishing { "publishing" } else { build.status.as_str() }
}

#[test]
fn the_docs_have_the_table() {
    let mut table = String::from("| state |");
    for (change, _) in changes() {
        table.push_str(&format!(" {change} |"));
    }
    table.push_str(&format!("\n|---|{}\n", "---|".repeat(changes().len())));
    let mut states = states();
    // The finished ones last.
    states.rotate_left(3);
    for (state, build) in states {
        assert_eq!(state, name(&build));
        table.push_str(&format!("| `{state}` |"));
        for (_, change) in changes() {
            match build.apply(change, 99) {
                Ok(after) => table.push_str(&format!(" `{}` |", name(&after))),
                Err(_) => table.push_str(" – |"),
            }
        }
        table.push('\n');
    }
    let docs = include_str!("../../../docs/ARCHITECTURE.md");
    assert!(docs.contains(&table), "docs/ARCHITECTURE.md is to have this table:\n{table}");
}

#[test]
fn refusals_say_why() {
    for (state, build) in states() {
        let refused = build.apply(Change::Cancel, 99).err();
        let expected = match state {
            "ready" | "failed" | "cancelled" => Some(Refused::Final(build.status)),
            "publishing" => Some(Refused::Publishing),
            _ => None,
        };
        assert_eq!(refused, expected, "{state}");
    }
    assert_eq!(queued().apply(Change::Push, 1), Err(Refused::From(Status::Queued)));
}

#[test]
fn times_attempts_and_digest_are_kept() {
    let first = queued().apply(Change::Claim, 20).unwrap();
    assert_eq!((first.attempt, first.started_at), (1, Some(20)));
    let mut lost = first.clone();
    lost.pulled.push(Pulled { reference: "r".into(), digest: "d".into() });
    lost.reached.push(Reached { host: "h".into(), port: 80 });
    lost.usage.boot_ms = Some(7);
    lost.provenance.builder_digest = Some("sha256:cc".into());

    let again = lost.apply(Change::Requeue, 30).unwrap();
    assert_eq!(
        (again.usage, again.pulled.len(), again.reached.len(), &again.provenance),
        (Usage::default(), 0, 0, &Provenance::default())
    );
    let second = again.apply(Change::Claim, 40).unwrap();
    assert_eq!((second.attempt, second.started_at), (2, Some(20)), "when it was first claimed");

    let publishing = second
        .apply(Change::Push, 50)
        .unwrap()
        .apply(Change::Publish("sha256:aa".into()), 60)
        .unwrap();
    assert_eq!(publishing.image_digest(), None, "not before it is published");
    let ready = publishing.apply(Change::Finish, 70).unwrap();
    assert_eq!((ready.completed_at, ready.image_digest()), (Some(70), Some("sha256:aa")));
}

#[test]
fn repositories_are_the_tenants_or_the_builds() {
    let mut build = queued();
    assert_eq!((build.repository().as_str(), build.tag()), ("builds/b1", "latest"));
    build.request.image_name = Some(ImageName { name: "team/app".into(), tag: "v1".into() });
    assert_eq!((build.repository().as_str(), build.tag()), ("acme/team/app", "v1"));
}

#[test]
fn tenants_have_plain_names() {
    for good in ["a", "0", "acme-2", &"a".repeat(39)] {
        assert!(Tenant::new(good).is_ok(), "{good}");
    }
    for bad in ["", "-a", "A", "a_b", "a/b", "a.b", &"a".repeat(40)] {
        assert_eq!(Tenant::new(bad), Err(BadTenant::Form(bad.into())));
    }
    for taken in RESERVED_TENANTS {
        assert_eq!(Tenant::new(taken), Err(BadTenant::Reserved(taken.into())));
    }
}

#[test]
fn names_of_states_go_both_ways() {
    for status in Status::ALL {
        assert_eq!(Status::from_name(status.as_str()), Some(status));
        assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
    }
    assert_eq!(Status::from_name("Ready"), None);
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => Just(Change::Claim),
        3 => Just(Change::Push),
        2 => prop_oneof!["sha256:[ab]"].prop_map(Change::Publish),
        2 => Just(Change::Finish),
        1 => Just(Change::Fail(failure())),
        1 => Just(Change::Cancel),
        2 => Just(Change::Requeue),
    ]
}

proptest! {
    #[test]
    fn walks_keep_the_invariants(walk in proptest::collection::vec(any_change(), 0..40)) {
        let mut build = queued();
        for (now, change) in (100..).zip(walk) {
            let before = build.clone();
            let Ok(next) = build.apply(change, now) else { continue };
            prop_assert!(!before.status.is_final(), "a finished build changed");
            prop_assert_eq!(&next.request, &before.request);
            prop_assert_eq!(next.created_at, before.created_at);
            prop_assert!(next.attempt >= before.attempt && next.attempt <= before.attempt + 1);
            prop_assert!(before.started_at.is_none() || next.started_at == before.started_at);
            prop_assert_eq!(next.completed_at.is_some(), next.status.is_final());
            prop_assert_eq!(next.failure.is_some(), next.status == Status::Failed);
            prop_assert!(before.publishing.is_none() || next.publishing == before.publishing);
            if next.publishing.is_some() {
                prop_assert!(matches!(next.status, Status::Pushing | Status::Ready | Status::Failed));
            }
            prop_assert!(next.status != Status::Ready || next.image_digest().is_some());
            build = next;
        }
    }
}
