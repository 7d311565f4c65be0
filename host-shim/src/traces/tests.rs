use serde_json::json;

use super::*;
use crate::build::{Change, Failure, FailureKind, Request, Tenant};

const ID: &str = "0193a1b2c3d4e5f60718293a4b5c6d7e";

fn build() -> Build {
    let request: Request = serde_json::from_value(json!({
        "dockerfile": null, "target": null, "image_name": null, "build_args": {}, "tags": {},
        "network": "none", "allowed_domains": [], "timeout_seconds": 1, "memory_mb": 1, "cpus": 1,
        "disk_gb": 1, "source_digest": "sha256:00", "source_bytes": 1,
    }))
    .unwrap();
    Build::queued(BuildId::new(ID).unwrap(), Tenant::new("acme").unwrap(), request, 1_000)
}

fn step(at: Millis, more: &Value) -> NewEvent {
    let mut payload = json!({"type": "step", "index": 1, "name": "RUN make"});
    payload.as_object_mut().unwrap().append(&mut more.as_object().unwrap().clone());
    NewEvent { at, agent_seq: None, payload }
}

/// Name, parent's name, from, to, error.
type Line<'t> = (&'t str, Option<&'t str>, Millis, Millis, Option<&'t str>);

fn outline(trace: &Trace) -> Vec<Line<'_>> {
    let name = |id: &String| trace.spans.iter().find(|span| span.id == *id).unwrap().name.as_str();
    let line = |span: &'_ Span| (span.parent.as_ref().map(name), span.from, span.to);
    trace
        .spans
        .iter()
        .map(|span| {
            let (parent, from, to) = line(span);
            (span.name.as_str(), parent, from, to, span.error.as_deref())
        })
        .collect()
}

#[test]
fn a_build_is_one_trace_from_its_request_to_its_publication() {
    let (traces, mut ended) = Traces::collected();
    let build = build();
    traces.received(&build, 900);
    let build = build.apply(Change::Claim, 2_000).unwrap();
    traces.claimed(&build, 2_000);
    traces.booted(&build, 3_000);
    traces.stored(&build.id, &[step(3_100, &json!({"state": "started"}))]);
    traces.stored(&build.id, &[step(3_900, &json!({"state": "done", "exit_code": 0}))]);
    let build = build.apply(Change::Push, 4_000).unwrap();
    traces.changed(&build, 4_000);
    let build = build.apply(Change::Publish("sha256:aa".into()), 5_000).unwrap();
    traces.changed(&build, 5_000);
    let build = build.apply(Change::Finish, 6_000).unwrap();
    traces.changed(&build, 6_000);

    let trace = ended.try_recv().unwrap();
    assert_eq!(trace.id, ID);
    let of_build = Some("build");
    assert_eq!(
        outline(&trace),
        [
            ("build", None, 900, 6_000, None),
            ("request", of_build, 900, 1_000, None),
            ("queued", of_build, 1_000, 2_000, None),
            ("boot", of_build, 2_000, 3_000, None),
            ("RUN make", Some("dockerfile"), 3_100, 3_900, None),
            ("dockerfile", of_build, 3_000, 4_000, None),
            ("push", of_build, 4_000, 5_000, None),
            ("publish", of_build, 5_000, 6_000, None),
        ]
    );
    assert!(traces.0.as_ref().unwrap().lock().is_empty());
}

#[test]
fn a_failure_is_the_phase_s_and_the_build_s() {
    let (traces, mut ended) = Traces::collected();
    let build = build().apply(Change::Claim, 2_000).unwrap();
    traces.claimed(&build, 2_000);
    let failure = Failure::new(FailureKind::VmLost, "a secret of somebody's");
    let build = build.apply(Change::Fail(failure), 3_000).unwrap();
    traces.changed(&build, 3_000);
    let trace = ended.try_recv().unwrap();
    let lost = Some("vm_lost");
    assert_eq!(
        outline(&trace),
        [
            ("build", None, 1_000, 3_000, lost),
            ("queued", Some("build"), 1_000, 2_000, None),
            ("boot", Some("build"), 2_000, 3_000, lost),
        ]
    );
    assert!(!format!("{trace:?}").contains("secret"));
}

#[test]
fn what_a_guest_reports_is_bounded() {
    let (traces, mut ended) = Traces::collected();
    let build = build().apply(Change::Claim, 2_000).unwrap();
    traces.claimed(&build, 2_000);
    let steps: Vec<_> = (0..3 * MOST_SPANS)
        .flat_map(|n| {
            let started = step(1, &json!({"index": n, "state": "started"}));
            [started, step(2, &json!({"index": n + 10_000, "state": "done"}))]
        })
        .collect();
    traces.stored(&build.id, &steps);
    assert!(traces.0.as_ref().unwrap().lock()[&build.id].steps.len() <= MOST_SPANS);
    let build = build.apply(Change::Cancel, 3_000).unwrap();
    traces.changed(&build, 3_000);
    assert_eq!(ended.try_recv().unwrap().spans.len(), MOST_SPANS + 2);
}

#[test]
fn traces_that_go_nowhere_keep_nothing() {
    let traces = Traces::default();
    let build = build();
    traces.received(&build, 1);
    traces.claimed(&build, 1);
    assert!(traces.0.is_none());
}
