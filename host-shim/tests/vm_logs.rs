//! What steps print, in real VMs: much of it, and bytes that are no text.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/archive.rs"]
mod archive;
#[path = "support/inputs.rs"]
mod inputs;
mod support;

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use inputs::{MEMORY_ROOM, Memory, agent_peak, over};
use nix::pty::{Winsize, openpty};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use support::{Server, source, text};

/// Longest part of a line, by the interface.
const PART: usize = 16 * 1024;

/// Length of the line that has no end.
const LONG_LINE: usize = 10_000_000;

/// A step that prints so many numbered lines; or, without a number, all that a terminal must not be shown.
const TALK: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv) {
  if (argc > 1) {
    char fill[2039];
    memset(fill, '.', 2038);
    fill[2038] = 0;
    for (long i = 0, lines = atol(argv[1]); i < lines; i++) printf("%08lx %s\n", i, fill);
    return 0;
  }
  for (int i = 0; i < 10000000; i++) putchar('a' + i % 26);
  putchar('\n');
  fwrite("nul\0nul\n", 1, 8, stdout);
  fwrite("\xff\xfe latin1 caf\xe9\n", 1, 15, stdout);
  fputs("\x1b[2J\x1b]0;owned\x07\r\x1b[31mred\xc2\x9b" "6n\xe2\x80\xae" "end\n", stdout);
  fputs("no newline", stdout);
  return 0;
}
"#;

/// Length of a numbered line with its newline.
const NUMBERED: usize = 2048;

/// The step's output without a number.
fn odd_output() -> Vec<u8> {
    let long: Vec<u8> = (0..LONG_LINE).map(|i| b'a' + u8::try_from(i % 26).unwrap()).collect();
    [
        &long[..],
        b"\nnul\0nul\n\xff\xfe latin1 caf\xe9\n",
        b"\x1b[2J\x1b]0;owned\x07\r\x1b[31mred\xc2\x9b6n\xe2\x80\xaeend\nno newline",
    ]
    .concat()
}

fn numbered(lines: usize) -> impl Iterator<Item = String> {
    let fill = ".".repeat(NUMBERED - 10);
    (0..lines).map(move |i| format!("{i:08x} {fill}\n"))
}

/// The program, static.
fn talk() -> Vec<u8> {
    let dir = source(&[("talk.c", TALK.as_bytes())]);
    let program = dir.path().join("talk");
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-static", "-s", "-o"]).arg(&program).arg(dir.path().join("talk.c"));
    assert!(compiler.status().unwrap().success());
    std::fs::read(program).unwrap()
}

fn dockerfile(argument: &str) -> Vec<u8> {
    format!("FROM scratch\nCOPY --chmod=755 talk /talk\nRUN [\"/talk\"{argument}]\n").into_bytes()
}

fn submit(server: &Server, talk: &[u8], lines: usize) -> String {
    let dockerfile = dockerfile(&format!(", \"{lines}\""));
    server.submit(&[("Dockerfile", &dockerfile), ("talk", talk)], &["--timeout", "3600"])
}

/// Bytes and hash of the lines of the step, as `kiln logs` gives them to a pipe.
fn logged(server: &Server, id: &str, flags: &[&str]) -> (usize, String) {
    let mut child = server
        .kiln(&[&["logs"], flags, &[id]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap());
    let (mut count, mut hash, mut line) = (0, Sha256::new(), Vec::new());
    while std::io::BufRead::read_until(&mut lines, b'\n', &mut line).unwrap() > 0 {
        // Beside the step's lines there are the engine's.
        if line.len() == NUMBERED {
            count += line.len();
            hash.update(&line);
        }
        line.clear();
    }
    assert!(child.wait().unwrap().success());
    (count, hex::encode(hash.finalize()))
}

/// By `KILN_TEST_LOG_MB`.
fn log_mb() -> usize {
    std::env::var("KILN_TEST_LOG_MB").map_or(64, |mb| mb.parse().unwrap())
}

#[test]
fn vm_a_large_log_is_stored_whole_and_costs_neither_side_memory() {
    let mb = log_mb();
    let lines = (mb << 20) / NUMBERED;
    let server = Server::start_with(&["--log-limit-mb", &(mb + 1).to_string()]);
    let talk = talk();
    let tiny = server.wait(&submit(&server, &talk, 1));
    assert_eq!(tiny["status"], "ready", "{tiny:#}");

    let memory = Memory::watch(server.pid());
    let begun = std::time::Instant::now();
    let id = submit(&server, &talk, lines);
    // Somebody follows it meanwhile.
    let followed = logged(&server, &id, &["-f"]);
    let took = begun.elapsed();
    let build = server.wait(&id);
    assert_eq!(build["status"], "ready", "{build:#}");
    let stored = logged(&server, &id, &[]);
    let rise = memory.rise();
    let (base, peak) = (agent_peak(&tiny), agent_peak(&build));
    eprintln!(
        "{mb} MiB of log in {took:?}; the server's memory rose by {} KiB; the agent's: {}",
        rise >> 10,
        over(peak, base)
    );
    let mut hash = Sha256::new();
    numbered(lines).for_each(|line| hash.update(line));
    let expected = (lines * NUMBERED, hex::encode(hash.finalize()));
    assert_eq!(stored, expected);
    assert_eq!(followed, expected);
    assert!(build["usage"]["log_bytes"].as_u64().unwrap() >= (lines * (NUMBERED - 1)) as u64);
    assert!(rise <= MEMORY_ROOM, "the server's memory rose by {rise} bytes");
    assert!(peak.saturating_sub(base) <= MEMORY_ROOM, "the agent's: {}", over(peak, base));
    server.stop();
}

#[test]
fn vm_a_log_over_its_limit_fails_and_odd_bytes_arrive_as_they_are() {
    let server = Server::start_with(&["--log-limit-mb", "12"]);
    let talk = talk();
    let over_limit = submit(&server, &talk, (13 << 20) / NUMBERED);

    // A person at a terminal watches the other build.
    let dir = source(&[("Dockerfile", &dockerfile("")), ("talk", &talk)]);
    let (shown, out) =
        on_a_terminal(&server, &["build", dir.path().to_str().unwrap(), "-t", "odd"]);
    assert!(out.success(), "{shown}");
    assert_harmless(&without_the_live_view(&shown), 3 * LONG_LINE);
    assert!(
        shown.contains("\\x1b[2J\\x1b]0;owned\\x07\\r\\x1b[31mred\\x9b6n\\u{202e}end"),
        "the tail is missing"
    );

    let builds: Value =
        serde_json::from_slice(&server.run(&["ls", "--format", "json"]).stdout).unwrap();
    let odd = builds.as_array().unwrap().iter().find(|build| build["status"] == "ready").unwrap();
    let id = odd["id"].as_str().unwrap();
    assert_parts(&events(&server, id));
    let (shown, out) = on_a_terminal(&server, &["logs", id]);
    assert!(out.success());
    assert_harmless(&shown, 2 * LONG_LINE);
    // To a pipe it goes byte by byte.
    let raw = server.run(&["logs", id]).stdout;
    let expected = odd_output();
    let found = raw.windows(expected.len()).any(|window| window == expected);
    assert!(found, "{} bytes, which are not the step's", raw.len());

    let build = server.wait(&over_limit);
    assert_eq!(build["failure"]["kind"], "log_limit", "{build:#}");
    assert!(build["failure"]["message"].as_str().unwrap().contains("12582912"), "{build:#}");
    // What fits is there, from its beginning.
    let (count, hash) = logged(&server, &over_limit, &[]);
    let content = count / NUMBERED * (NUMBERED - 1);
    assert!((11 << 20..=12 << 20).contains(&content), "{content}");
    let mut expected = Sha256::new();
    numbered(count / NUMBERED).for_each(|line| expected.update(line));
    assert_eq!(hash, hex::encode(expected.finalize()));
    server.stop();
}

/// The events of a build, as the API gives them.
fn events(server: &Server, id: &str) -> Vec<Value> {
    let out = Command::new("curl")
        .args(["-sSf", "-H", &format!("Authorization: Bearer {}", server.token)])
        .arg(format!("http://{}/builds/{id}/events", server.address))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(out.stderr));
    let stream = String::from_utf8(out.stdout).unwrap();
    let data = stream.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|json| serde_json::from_str(json).unwrap()).collect()
}

/// The step's lines come in parts of at most 16 KiB, and put together they are its bytes.
fn assert_parts(events: &[Value]) {
    let mut bytes = Vec::new();
    let mut without_newline = false;
    for event in
        events.iter().filter(|e| e["type"] == "log" && e["stream"] == "stdout" && e["step"] == 1)
    {
        let content = event["content"].as_str().unwrap();
        let exact = match event["content_b64"].as_str() {
            Some(packed) => {
                let exact = BASE64_STANDARD.decode(packed).unwrap();
                assert_ne!(content.as_bytes(), exact, "base64 only where text does not do");
                assert_eq!(content, String::from_utf8_lossy(&exact));
                exact
            }
            None => content.as_bytes().to_vec(),
        };
        assert!(exact.len() <= PART, "a part of {} bytes", exact.len());
        bytes.extend(exact);
        without_newline = event["partial"] == true;
        if !without_newline {
            bytes.push(b'\n');
        }
    }
    assert!(!without_newline, "the last line is closed");
    // The last line had no newline, and is a line all the same.
    let expected = [odd_output(), b"\n".to_vec()].concat();
    assert!(bytes == expected, "{} bytes, not {}", bytes.len(), expected.len());
}

/// Runs a command with its output on a terminal. What that was shown.
fn on_a_terminal(server: &Server, args: &[&str]) -> (String, std::process::ExitStatus) {
    let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    let mut command = server.kiln(args);
    command.env("TERM", "xterm-256color");
    command.stdout(Stdio::from(pty.slave.try_clone().unwrap())).stderr(Stdio::from(pty.slave));
    let mut child = command.spawn().unwrap();
    // Its copies of the terminal's end go, so that the end can be seen: an error (EIO) by Linux's rules.
    drop(command);
    let mut shown = Vec::new();
    let error = File::from(pty.master).read_to_end(&mut shown).err().and_then(|e| e.raw_os_error());
    assert!(matches!(error, None | Some(nix::libc::EIO)), "{error:?}");
    (text(shown), child.wait().unwrap())
}

/// The live view's own sequences: moves by lines, and clearing lines.
fn without_the_live_view(shown: &str) -> String {
    let own = regex::Regex::new("\x1b\\[(?:[0-9]*[AB]|[0-9]*K|0?m)").unwrap();
    own.replace_all(shown, "").into_owned()
}

fn assert_harmless(shown: &str, at_most: usize) {
    let harmful = |c: &char| (c.is_control() && !"\r\n\t".contains(*c)) || *c == '\u{202e}';
    assert_eq!(shown.chars().find(harmful), None);
    assert!(shown.len() < at_most, "{} bytes", shown.len());
    assert!(shown.contains("abcdefghijklmnopqrstuvwxyz"));
}
