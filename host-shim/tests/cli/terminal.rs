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
