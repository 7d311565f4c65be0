//! What a real `kiln serve` does once it is told to stop. Its VMs are a program that waits, and their agents are this test: a build
//! ends when it says so.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/bundle.rs"]
mod bundle;
#[allow(dead_code)]
#[path = "queue/guest.rs"]
mod guest;
mod support;

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guest::Agent;
use kiln_protocol::event::{Failure, FailureKind, Outcome};
use serde_json::{Value, json};
use support::{Server, text};
use tokio::net::UnixStream;

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// As the vsock device it listens as that does, and joins who comes to `agent` with the host's control port, which only the VM's
/// own user may dial. QEMU cannot listen, and waits.
const STANDS_IN: &str = r#"
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int at(const char *name, int (*how)(int, const struct sockaddr *, socklen_t)) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  strcpy(address.sun_path, name);
  return how(fd, (struct sockaddr *)&address, sizeof address) ? -1 : fd;
}

int main(int argc, char **argv) {
  (void)argv;
  if (argc == 2) return 0; /* --version */
  int agent = at("agent", bind);
  if (agent < 0) for (;;) pause();
  listen(agent, 1);
  listen(at("vu", bind), 1);
  struct pollfd ends[2] = {{.events = POLLIN}, {.events = POLLIN}};
  ends[0].fd = accept(agent, 0, 0);
  ends[1].fd = at("v_5001", connect);
  for (;;) {
    poll(ends, 2, -1);
    for (int i = 0; i < 2; i++) {
      char bytes[65536];
      if (!ends[i].revents) continue;
      ssize_t n = read(ends[i].fd, bytes, sizeof bytes);
      if (n <= 0) {
        close(ends[0].fd);
        close(ends[1].fd);
        for (;;) pause();
      }
      for (ssize_t sent = 0; sent < n;) sent += write(ends[1 - i].fd, bytes + sent, n - sent);
    }
  }
}
"#;

/// What servers need that are not to boot anything.
struct Host {
    dir: tempfile::TempDir,
    program: PathBuf,
    http: reqwest::Client,
}

impl Host {
    fn new() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        bundle::whole(dir.path());
        let program = dir.path().join("stands-in");
        let mut cc = Command::new("cc");
        cc.args(["-x", "c", "-", "-o"]).arg(&program).stdin(Stdio::piped());
        let mut cc = cc.spawn().unwrap();
        cc.stdin.take().unwrap().write_all(STANDS_IN.as_bytes()).unwrap();
        assert!(cc.wait().unwrap().success());
        Self { dir, program, http: reqwest::Client::builder().no_proxy().build().unwrap() }
    }

    /// A server with one VM at one time.
    fn serve(&self, dir: tempfile::TempDir, drain_seconds: &str) -> Server {
        self.serve_with(&[], dir, drain_seconds)
    }

    fn serve_with(
        &self,
        variables: &[(&str, &str)],
        dir: tempfile::TempDir,
        drain_seconds: &str,
    ) -> Server {
        let flags = ["--max-vms", "1", "--drain-seconds", drain_seconds];
        Server::start_with_program_on(dir, self.dir.path(), &self.program, variables, &flags)
    }

    async fn get(&self, server: &Server, path: &str) -> Answer {
        Self::answer(server, self.http.get(format!("http://{}{path}", server.address))).await
    }

    async fn post(&self, server: &Server, path: &str, body: Value) -> Answer {
        let request = self.http.post(format!("http://{}{path}", server.address));
        Self::answer(server, request.json(&body)).await
    }

    async fn answer(server: &Server, request: reqwest::RequestBuilder) -> Answer {
        let response = request.bearer_auth(&server.token).send().await.unwrap();
        Answer {
            status: response.status().as_u16(),
            retry_after: response.headers().contains_key("retry-after"),
            body: response.json().await.unwrap_or_default(),
        }
    }

    /// Tells a server to stop, and waits until it does so.
    async fn drains(&self, server: &Server) {
        assert_eq!(self.get(server, "/ready").await.status, 200, "{}", server.log());
        server.ask_to_stop();
        let begun = Instant::now();
        loop {
            let ready = self.get(server, "/ready").await;
            if ready.status == 503 {
                let said = ready.body["detail"].as_str().unwrap();
                assert!(said.contains("drains"), "{said}");
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{}", server.log());
        }
    }
}

struct Answer {
    status: u16,
    retry_after: bool,
    body: Value,
}

impl Answer {
    fn is_stopping(&self) {
        assert_eq!((self.status, &self.body["code"]), (503, &json!("stopping")), "{}", self.body);
        assert!(self.retry_after);
    }
}

fn submit(server: &Server) -> String {
    server.submit(&[("Dockerfile", b"FROM scratch\n")], &[])
}

/// The agent of the build's VM, which begins.
async fn begun(server: &Server, id: &str) -> Agent {
    let (sock, asked) = (server.vm(id).join("sock"), Instant::now());
    while !sock.join("vu").exists() {
        assert!(asked.elapsed() < PATIENCE, "{id} has no VM\n{}", server.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let stream = UnixStream::connect(sock.join("agent")).await.unwrap();
    let (mut agent, _) = Agent::over(stream).await;
    agent.begin().await;
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_may_end_and_what_waits_is_the_next_servers() {
    let host = Host::new();
    let server = host.serve(tempfile::tempdir().unwrap(), "600");
    let runs = submit(&server);
    let mut agent = begun(&server, &runs).await;
    let waits = submit(&server);
    let mut log = server.follow(&runs);
    host.drains(&server).await;

    // What is new is refused, but for a build: it waits with the others.
    host.post(&server, "/instances", json!({"image": "app"})).await.is_stopping();
    host.get(&server, &format!("/builds/{runs}/exec")).await.is_stopping();
    host.get(&server, &format!("/builds/{runs}/files?path=/etc")).await.is_stopping();
    let late = submit(&server);
    // All else goes on.
    assert_eq!(host.get(&server, "/v2/").await.status, 401);
    agent.print(2, "to the end").await;
    assert!(log.until("to the end"), "{}", log.seen);
    assert_eq!(server.show(&runs)["status"], "building");
    for id in [&waits, &late] {
        assert_eq!(server.show(id)["status"], "queued");
    }
    let failure = Failure {
        kind: FailureKind::StepFailed,
        message: "step 1 failed".into(),
        step: Some(1),
        exit_code: Some(3),
        detail: None,
    };
    agent.end(Outcome::Failed(failure)).await;
    log.drain();
    let dir = server.ended();

    let server = host.serve(dir, "0");
    assert_eq!(server.show(&runs)["failure"]["kind"], "step_failed");
    let agent = begun(&server, &waits).await;
    assert_eq!(server.show(&waits)["attempt"], 1);
    assert_eq!(server.show(&late)["queue_position"], 1);
    // Without a drain what runs is given up at once: it is built again, and the second time it fails.
    server.ask_to_stop();
    let server = host.serve(server.ended(), "0");
    drop(agent);
    let agent = begun(&server, &waits).await;
    assert_eq!(server.show(&waits)["attempt"], 2);
    server.ask_to_stop();
    let server = host.serve(server.ended(), "0");
    drop(agent);
    assert_eq!(server.show(&waits)["failure"]["kind"], "host_restarted");
    let _agent = begun(&server, &late).await;
    server.ask_to_stop();
    server.ended();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_at_its_limit_and_at_the_second_signal() {
    let host = Host::new();
    let server = host.serve(tempfile::tempdir().unwrap(), "2");
    let [late, waits] = [(); 2].map(|()| submit(&server));
    let mut agent = begun(&server, &late).await;
    let asked = Instant::now();
    host.drains(&server).await;
    // The host hangs up.
    while agent.hear().await.is_some() {}
    assert!(asked.elapsed() >= Duration::from_secs(2));

    let server = host.serve(server.ended(), "600");
    let _agent = begun(&server, &late).await;
    assert_eq!(server.show(&late)["attempt"], 2);
    host.drains(&server).await;
    server.ask_to_stop();

    let server = host.serve(server.ended(), "0");
    assert_eq!(server.show(&late)["failure"]["kind"], "host_restarted");
    let _agent = begun(&server, &waits).await;
    server.ask_to_stop();
    server.ended();
}

/// As systemd's unit of type notify does.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_manager_is_told_and_waits_for_the_drain() {
    let host = Host::new();
    let path = host.dir.path().join("notify");
    let told = UnixDatagram::bind(&path).unwrap();
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = || {
        let mut bytes = [0; 4096];
        let len = told.recv(&mut bytes).unwrap();
        text(bytes[..len].to_vec()).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let variables = [("NOTIFY_SOCKET", path.to_str().unwrap())];
    let server = host.serve_with(&variables, tempfile::tempdir().unwrap(), "100");
    assert_eq!(hear(), ["READY=1", &format!("STATUS=serves on {}", server.address)]);
    let runs = submit(&server);
    let _agent = begun(&server, &runs).await;
    server.ask_to_stop();
    let said = hear();
    assert_eq!(said[..2], ["STOPPING=1", "EXTEND_TIMEOUT_USEC=140000000"]);
    assert!(said[2].starts_with("STATUS=drains"), "{said:?}");
    server.ask_to_stop();
    assert_eq!(hear(), ["STATUS=stops"]);
    server.ended();
}
