//! `kiln serve --log-format json`, a real one.

use std::process::Command;

use kiln::build::FailureKind;
use serde_json::Value;

#[test]
fn each_line_is_an_object_and_those_of_a_build_have_its_id() {
    let bundle = tempfile::tempdir().unwrap();
    crate::bundle::whole(bundle.path());
    let flags = ["--log-format", "json", "--metrics-open"];
    let server = crate::real::Server::start_without_vms_with(bundle.path(), &flags);
    let id = server.submit(&[("Dockerfile", b"FROM scratch\n")], &[]);
    let build = server.wait(&id);
    assert_eq!(build["failure"]["kind"], FailureKind::Internal.as_str());
    let objects: Vec<Value> = server
        .log()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
        .collect();
    for object in &objects {
        for key in ["timestamp", "level", "target", "message"] {
            assert!(object[key].is_string(), "no {key} in {object}");
        }
    }
    let of_build = |object: &&Value| {
        object["build"] == *id
            || object["spans"].as_array().is_some_and(|spans| {
                spans.iter().any(|span| span["name"] == "build" && span["build"] == *id)
            })
    };
    let said: Vec<_> = objects.iter().filter(of_build).map(|o| o["message"].as_str()).collect();
    for message in ["a build was accepted", "building", "cannot start a VM", "finished"] {
        assert!(said.contains(&Some(message)), "no {message:?} in {said:?}");
    }

    // A driver of this server's own has counted it.
    let url = format!("http://{}/metrics", server.address);
    let metrics = Command::new("curl").args(["-sS", "--fail", &url]).output().unwrap();
    let metrics = String::from_utf8(metrics.stdout).unwrap();
    for line in [
        "kiln_builds_finished_total{outcome=\"failed\",cause=\"internal\"} 1",
        "kiln_build_phase_duration_seconds_count{phase=\"queued\",outcome=\"done\"} 1",
        "kiln_build_phase_duration_seconds_count{phase=\"boot\",outcome=\"failed\"} 1",
    ] {
        assert!(metrics.contains(line), "no {line} in {metrics}");
    }
    server.stop();
}
