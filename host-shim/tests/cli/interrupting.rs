//! Ctrl-C: the first cancels, the second leaves.

use axum::http::StatusCode;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr};

use super::server::{Delete, Ending, Script, Server, problem, sse};
use super::*;

struct Running {
    child: Child,
    stderr: Lines<BufReader<ChildStderr>>,
    _dir: tempfile::TempDir,
}

impl Running {
    /// Starts a build whose events stop after `building`.
    async fn start(server: &Server) -> Self {
        let dir = source();
        let mut child = kiln(server, &["build", text(dir.path())]).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut running = Self { child, stderr, _dir: dir };
        running.says("kiln | building").await;
        running
    }

    async fn says(&mut self, wanted: &str) {
        while let Some(line) = self.stderr.next_line().await.unwrap() {
            if line.contains(wanted) {
                return;
            }
        }
        panic!("it never said {wanted:?}");
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    async fn ends(mut self, code: i32, stdout_is: &str) {
        let output = self.child.wait_with_output().await.unwrap();
        let mut left = String::new();
        while let Ok(Some(line)) = self.stderr.next_line().await {
            left += &line;
        }
        assert_eq!(output.status.code(), Some(code), "{left}");
        assert_eq!(stdout(&output), stdout_is);
    }
}

fn hanging() -> Script {
    let streams = [(sse(1, &[status("building")]), Some(Ending::Hang))].into();
    Script { streams, build: ready(), ..Script::default() }
}

#[tokio::test]
async fn the_first_one_cancels_the_build() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let server = Server::start(hanging()).await;
        let mut running = Running::start(&server).await;
        running.signal(signal);
        running.says("build b1 was cancelled").await;
        running.ends(4, "").await;
        assert_eq!(server.script().deleted, ["b1"]);
    }
}

#[tokio::test]
async fn the_second_one_leaves_at_once() {
    let server = Server::start(Script { refuse_delete: Delete::Hang, ..hanging() }).await;
    let mut running = Running::start(&server).await;
    running.signal(Signal::SIGINT);
    server.until(|script| !script.deleted.is_empty()).await;
    running.signal(Signal::SIGINT);
    running.says("kiln cancel b1").await;
    running.ends(4, "").await;
}

#[tokio::test]
async fn a_build_that_is_being_published_is_awaited() {
    let refusal = problem(StatusCode::CONFLICT, "it is being published");
    let mut script = Script { refuse_delete: Delete::Refuse(refusal), ..hanging() };
    script.streams.push_back((sse(2, &[status("pushing"), status("ready")]), None));
    let server = Server::start(script).await;
    let mut running = Running::start(&server).await;
    running.signal(Signal::SIGINT);
    running.says("cannot be cancelled: it is being published").await;
    running.ends(0, &format!("{REFERENCE}\n")).await;
    assert_eq!(server.script().connections[1].0.as_deref(), Some("1"), "it goes on where it was");
}

#[tokio::test]
async fn one_while_the_source_is_sent_leaves_no_build() {
    let server = Server::start(Script::default()).await;
    server.script().watch = Some(std::process::id());
    let mut command = kiln(&server, &["build", "-"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, &vec![0; 256 * 1024]).await.unwrap();
    server.until(|script| script.source_bytes > 0).await;
    kill(Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()), Signal::SIGINT).unwrap();
    let output = child.wait_with_output().await.unwrap();
    ended(&output, 4, "", &["interrupted while sending the source; there is no build"]);
    assert!(server.script().deleted.is_empty());
    drop(stdin);
}
