//! The first process of an instance's container, as the agent starts it: by its name, with a socket for its input.

#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

struct Init {
    child: Child,
    agent: UnixStream,
}

impl Init {
    fn start(args: &[&str]) -> Self {
        let (agent, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_kiln-agent"))
            .arg0("/dev/kiln-init")
            .args(args)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, agent }
    }

    fn told(&mut self) -> [u8; 5] {
        let mut told = [0; 5];
        self.agent.read_exact(&mut told).unwrap();
        told
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    /// The exit code, and what was printed.
    fn end(mut self) -> (Option<i32>, String) {
        let mut out = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        (self.child.wait().unwrap().code(), out)
    }
}

#[test]
fn it_ends_as_the_program_ends_and_leaves_it_no_input() {
    let mut init = Init::start(&["sh", "-c", "cat; echo $1; exit 7", "sh", "two words"]);
    assert_eq!(init.told(), *b"S\0\0\0\0");
    assert_eq!(init.end(), (Some(7), "two words\n".into()));
    let mut init = Init::start(&["sh", "-c", "kill -9 $$"]);
    init.told();
    assert_eq!(init.end().0, Some(137));
}

#[test]
fn a_program_that_cannot_be_executed_is_told_with_its_error() {
    for (program, errno) in [("kiln-has-no-such-program", 2), ("/etc/passwd", 13), ("/", 13)] {
        let mut init = Init::start(&[program]);
        assert_eq!(init.told(), [b'N', 0, 0, 0, errno], "{program}");
        assert_eq!(init.end().0, Some(127));
    }
}

#[test]
fn signals_reach_the_program() {
    let script = "trap 'echo quit; exit 3' QUIT; echo up; while :; do sleep 0.01; done";
    let mut init = Init::start(&["sh", "-c", script]);
    init.told();
    let mut out = BufReader::new(init.child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    init.signal(Signal::SIGQUIT);
    out.read_to_string(&mut line).unwrap();
    assert_eq!((line.as_str(), init.child.wait().unwrap().code()), ("up\nquit\n", Some(3)));
    // A program without a handler ends by the signal, and says so.
    let mut init = Init::start(&["sleep", "1000"]);
    init.told();
    init.signal(Signal::SIGTERM);
    assert_eq!(init.end().0, Some(143));
}

#[test]
fn the_program_has_the_signals_of_a_fresh_process() {
    let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status";
    let mut init = Init::start(&["sh", "-c", script]);
    init.told();
    let (_, out) = init.end();
    for line in out.lines() {
        let mask = line.split_whitespace().last().unwrap();
        // The last two of what a harness may have are the C library's own.
        assert_eq!(u64::from_str_radix(mask, 16).unwrap() & 0x7fff_ffff, 0, "{out}");
    }
    assert_eq!(out.lines().count(), 2);
}
