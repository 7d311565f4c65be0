//! On a terminal: a live view, and nothing that a guest could do to the terminal.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use nix::pty::{Winsize, openpty};
use serde_json::json;

use super::server::Server;
use super::*;

/// A terminal's two ends. What is written to the second is read from the first.
fn terminal() -> (File, OwnedFd) {
    let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    (pty.master.into(), pty.slave)
}

/// All that was written, once nobody holds the other end. Its end is an error (EIO) by Linux's rules.
async fn all(mut master: File) -> String {
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![];
        let error = master.read_to_end(&mut bytes).err().and_then(|e| e.raw_os_error());
        assert!(matches!(error, None | Some(nix::libc::EIO)), "{error:?}");
        String::from_utf8_lossy(&bytes).into_owned()
    });
    read.await.unwrap()
}

fn events() -> [serde_json::Value; 5] {
    let step = |state: &str| json!({"type": "step", "index": 1, "name": "make\u{1b}]0;owned\u{7}", "state": state, "exit_code": 0, "duration_ms": 65000});
    let evil = log("\u{1b}]52;c;ZXZpbA==\u{7}\u{9b}6n\u{202e}end");
    [status("building"), step("started"), log("plain"), evil, step("done")]
}

#[tokio::test]
async fn the_live_view_shows_steps_and_lines_and_lets_nothing_through() {
    let server = Server::start(script(&events(), ready())).await;
    let dir = source();
    let (master, slave) = terminal();
    let mut command = kiln(&server, &["build", text(dir.path())]);
    command.env("TERM", "xterm-256color").stderr(Stdio::from(slave));
    let child = command.spawn().unwrap();
    // The command's copy of the terminal's end goes, so that its end can be seen.
    drop(command);
    let (output, shown) = tokio::join!(child.wait_with_output(), all(master));
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(0), "{shown}");
    assert_eq!(stdout(&output), format!("{REFERENCE}\n"));
    let lines = [
        "#1 | plain",
        "✓ #1 make\\x1b]0;owned\\x07  done in 1m05s",
        "#1 | \\x1b]52;c;ZXZpbA==\\x07\\x9b6n\\u{202e}end",
    ];
    for line in lines {
        assert!(shown.contains(line), "{line:?} is not in {shown:?}");
    }
    assert!(
        !shown.contains("\u{1b}]") && !shown.contains(['\u{7}', '\u{9b}', '\u{202e}']),
        "{shown:?}"
    );
}

#[tokio::test]
async fn logs_on_a_terminal_are_escaped() {
    let server = Server::start(script(&events(), ready())).await;
    let (master, slave) = terminal();
    let mut command = kiln(&server, &["logs", "b1"]);
    command.stdout(Stdio::from(slave));
    let child = command.spawn().unwrap();
    drop(command);
    let (output, shown) = tokio::join!(child.wait_with_output(), all(master));
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(shown, "#1 | plain\r\n#1 | \\x1b]52;c;ZXZpbA==\\x07\\x9b6n\\u{202e}end\r\n");
    assert!(!stderr(&output).contains('\u{1b}'));
}

fn line(stream: &str, content: &str) -> Value {
    json!({"type": "log", "stream": stream, "content": content})
}

/// What an instance prints to do something to a terminal, and how Kiln says that it ended.
async fn instance() -> Server {
    let mut exact = line("stdout", "\u{1b}]0;x\u{7}");
    // The same bytes, for a pipe.
    exact["content_b64"] = "G10wO3gH".into();
    let mut part = line("stdout", "part\u{9b}6n");
    part["partial"] = true.into();
    let events = [
        exact,
        part,
        line("stdout", "\u{202e}end\r"),
        line("stderr", "\u{1b}[2Jerr"),
        line("system", "\u{1b}(0"),
        json!({"type": "status", "status": "Stopped", "exit_code": 0, "exit_message": "end\u{7}"}),
    ];
    let streams = [(sse(1, &events), None)].into();
    Server::start(Script { streams, ..Script::default() }).await
}

const SHOWN_OUT: &str = "\\x1b]0;x\\x07\r\npart\\x9b6n\\u{202e}end\r\n";
const SHOWN_ERR: &str = "\\x1b[2Jerr\r\nkiln: \\x1b(0\r\n";

/// Runs a command whose stderr is a terminal, and stdout the same one if it is to be.
async fn on_terminal(mut command: Command, with_stdout: bool) -> (Output, String) {
    let (master, slave) = terminal();
    if with_stdout {
        command.stdout(Stdio::from(slave.try_clone().unwrap()));
    }
    command.stderr(Stdio::from(slave));
    let child = command.spawn().unwrap();
    drop(command);
    let (output, shown) = tokio::join!(child.wait_with_output(), all(master));
    (output.unwrap(), shown)
}

#[tokio::test]
async fn an_instances_log_on_a_terminal_is_escaped() {
    let server = instance().await;
    for args in [&["instances", "logs", "i1"][..], &["instances", "logs", "-f", "i1"]] {
        let (output, shown) = on_terminal(kiln(&server, args), true).await;
        assert_eq!(output.status.code(), Some(0), "{shown:?}");
        assert_eq!(shown, format!("{SHOWN_OUT}{SHOWN_ERR}"), "{args:?}");
    }
}

#[tokio::test]
async fn what_runs_on_a_terminal_is_escaped_and_a_pipe_beside_it_gets_the_bytes() {
    let server = instance().await;
    let args = ["run", "--rm", "app"];
    let (output, shown) = on_terminal(kiln(&server, &args), true).await;
    assert_eq!(output.status.code(), Some(0), "{shown:?}");
    assert_eq!(shown, format!("{SHOWN_OUT}{SHOWN_ERR}kiln: end\\x07\r\n"));

    // Each stream by what it is itself.
    let (output, shown) = on_terminal(kiln(&server, &args), false).await;
    assert_eq!(output.status.code(), Some(0), "{shown:?}");
    assert_eq!(stdout(&output), "\u{1b}]0;x\u{7}\npart\u{9b}6n\u{202e}end\r\n");
    assert_eq!(shown, format!("{SHOWN_ERR}kiln: end\\x07\r\n"));
}
