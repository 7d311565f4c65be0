//! What steps of real VMs find of a network: an allow-list with a package manager, names, and nothing.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::{Value, json};
use support::{BASE, Server, text};

/// One list of packages is enough, and takes a third of the time.
const APT: &str = "RUN sed -i '1!d' /etc/apt/sources.list && apt-get update --print-uris\n\
                   RUN apt-get update && apt-get install -y --no-install-recommends hello && hello\n";

/// The hosts that apt of the base image fetches from, by its own configuration.
fn hosts_in(log: &str) -> BTreeSet<String> {
    let urls = log.lines().filter_map(|line| line.strip_prefix("'http://"));
    urls.map(|url| url.split(['/', ':']).next().unwrap().to_owned()).collect()
}

/// They may lie in ranges that the proxy refuses otherwise, where the machine has a mirror of its own.
fn permits(hosts: &BTreeSet<String>) -> Vec<String> {
    let addresses = hosts.iter().flat_map(|host| {
        let found = Command::new("getent").args(["ahosts", host]).output().unwrap();
        let lines = text(found.stdout);
        lines
            .lines()
            .filter_map(|line| line.split(' ').next().map(str::to_owned))
            .collect::<Vec<_>>()
    });
    let permit = |address: String| {
        let bits = if address.contains(':') { 128 } else { 32 };
        ["--egress-permit".to_owned(), format!("{address}/{bits}")]
    };
    addresses.collect::<BTreeSet<_>>().into_iter().flat_map(permit).collect()
}

fn events(server: &Server, id: &str) -> Vec<Value> {
    let url = format!("http://{}/builds/{id}/events", server.address);
    let token = format!("Authorization: Bearer {}", server.token);
    let out = Command::new("curl").args(["-sS", "-H", &token, &url]).output().unwrap();
    let stream = text(out.stdout);
    let data = stream.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

fn egress(server: &Server, id: &str) -> Vec<(u64, String, bool)> {
    let mut all: Vec<_> = events(server, id)
        .iter()
        .filter(|event| event["type"] == "egress")
        .map(|event| {
            let host = event["host"].as_str().unwrap().to_owned();
            (event["step"].as_u64().unwrap(), host, event["allowed"].as_bool().unwrap())
        })
        .collect();
    all.sort();
    all
}

#[test]
fn vm_apt_works_through_the_allow_list_and_is_denied_without_it() {
    let dockerfile = format!("FROM {BASE}\n{APT}");
    let files = [("Dockerfile", dockerfile.as_bytes())];
    let server = Server::start();
    let id = server.submit(&files, &["--allow", "*.nowhere.example"]);
    let build = server.wait(&id);
    let log = text(server.run(&["logs", &id]).stdout);
    let hosts = hosts_in(&log);
    assert!(!hosts.is_empty(), "{log}");
    let failure = &build["failure"];
    assert_eq!(
        (&failure["kind"], &failure["step"], &failure["exit_code"]),
        (&json!("egress_denied"), &json!(2), &json!(100)),
        "{build}\n{log}"
    );
    let message = failure["message"].as_str().unwrap();
    let denied: Vec<_> = hosts.iter().map(|host| (2, host.clone(), false)).collect();
    assert!(hosts.iter().all(|host| message.contains(&format!("--allow {host}"))), "{message}");
    assert_eq!(egress(&server, &id), denied);
    assert_eq!(build["reached"], json!([]));
    let last = events(&server, &id).pop().unwrap();
    assert_eq!((&last["type"], &last["status"]), (&json!("status"), &json!("failed")));
    server.stop();

    let permits = permits(&hosts);
    let server = Server::start_with(&permits.iter().map(String::as_str).collect::<Vec<_>>());
    let allow: Vec<_> = hosts.iter().flat_map(|host| ["--allow", host]).collect();
    let id = server.submit(&files, &allow);
    let build = server.wait(&id);
    let log = text(server.run(&["logs", &id]).stdout);
    assert_eq!(build["status"], "ready", "{build}\n{log}");
    assert!(log.contains("Hello, world!"), "{log}");
    let reached: Vec<_> = hosts.iter().map(|host| json!({"host": host, "port": 80})).collect();
    assert_eq!(build["reached"], json!(reached));
    let allowed: Vec<_> = hosts.iter().map(|host| (2, host.clone(), true)).collect();
    assert_eq!(egress(&server, &id), allowed);
    let shown = text(server.run(&["show", &id]).stdout);
    assert!(shown.contains(&format!("reached   {}:80", hosts.first().unwrap())), "{shown}");
    server.stop();
}

/// What listens in a step, by the kernel: `sockets:` and the lines of both lists.
const SOCKETS: &str =
    "echo sockets: $(cat /proc/net/tcp /proc/net/udp | grep -o '0100007F:[0-9A-F]*' | sort)";

#[test]
fn vm_a_guest_has_a_loopback_and_names_that_are_asked_for_are_told() {
    let server = Server::start();
    // The step's own text is in the log too.
    let wait = "mkfifo /go && echo w''aiting && cat /go";
    let dockerfile = format!(
        "FROM {BASE}\nRUN --network=none {SOCKETS}; ls /sys/class/net; getent hosts unseen.example || true\n\
         RUN echo \"resolv: $(cat /etc/resolv.conf)\"; {SOCKETS}; ls /sys/class/net; {wait}; \
         getent hosts Wanted.Example. || getent hosts listed.example || exit 9\n"
    );
    let flags = ["--network", "allowlist", "--allow", "listed.example"];
    let id = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &flags);
    let mut follow = server.follow(&id);
    assert!(follow.until("waiting"), "{}", follow.seen);
    let vm = server.run(&["exec", "--vm", &id, "--", "ls", "/sys/class/net"]);
    assert_eq!(text(vm.stdout), "lo\n", "{}", text(vm.stderr));
    let go = server.run(&["exec", &id, "--", "sh", "-c", "echo > /go"]);
    assert!(go.status.success(), "{}", text(go.stderr));
    follow.drain();
    let (log, build) = (follow.seen.clone(), server.show(&id));
    let lines: Vec<_> = log.lines().filter(|line| !line.starts_with("STEP")).collect();
    let sockets: Vec<_> = lines.iter().filter(|line| line.starts_with("sockets:")).collect();
    // 53 twice, and 3128.
    assert_eq!(
        sockets,
        [&"sockets:", &"sockets: 0100007F:0035 0100007F:0035 0100007F:0C38"],
        "{log}"
    );
    assert!(log.contains("resolv: nameserver 127.0.0.1\n"), "{log}");
    assert_eq!(lines.iter().filter(|line| **line == "lo").count(), 2, "{log}");

    let failure = &build["failure"];
    assert_eq!(
        (&failure["kind"], &failure["step"], &failure["exit_code"]),
        (&json!("egress_denied"), &json!(2), &json!(9)),
        "{build}\n{log}"
    );
    let message = failure["message"].as_str().unwrap();
    assert!(message.contains("--allow wanted.example)"), "{message}");
    assert!(message.contains("listed.example: it asked for the address itself"), "{message}");
    let asked = |host: &str| (2, host.to_owned(), false);
    assert_eq!(egress(&server, &id), [asked("listed.example"), asked("wanted.example")]);

    // Without a network nothing listens, and nothing is told.
    let dockerfile = format!(
        "FROM {BASE}\nRUN {SOCKETS}; ls /sys/class/net; getent hosts unseen.example || exit 9\n"
    );
    let id = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &["--network", "none"]);
    let build = server.wait(&id);
    let log = text(server.run(&["logs", &id]).stdout);
    assert_eq!(build["failure"]["kind"], "step_failed", "{build}\n{log}");
    assert!(log.lines().any(|line| line == "sockets:"), "{log}");
    assert_eq!(egress(&server, &id), []);
    server.stop();
}
