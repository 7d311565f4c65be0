//! The runtime wrapper as the engine calls it: the real binary, between a test that plays engine
//! and agent, and a small program that plays crun.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, IoSliceMut, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::cmsg_space;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, mkfifo};
use serde_json::{Value, json};

const CONFIG: &str = include_str!("../src/runtime/testdata/config.buildah-1.39.3.json");

/// Plays crun: `create` leaves a process behind that runs the bundle's `script` once it is started,
/// as crun leaves the container's init behind. Other verbs say how they were called.
const FAKE_CRUN: &str = r#"#!/bin/sh
if [ "$2" = --log ]; then
  case "$9" in *-secrets) echo no such thing > "$3"; exit 1;; esac
  cp "$8/config.json" "${KILN_RUNTIME_SOCKET%/*}/held.json"; exit 0
fi
if [ "$1" != --cgroup-manager=cgroupfs ]; then echo "called: $*;" $(ls "${KILN_RUNTIME_SOCKET%/*}/steps" 2>&1); exit 3; fi
shift 3; bundle=$1; pid_file=$3
if [ -e "$bundle/refuse" ]; then cat "$bundle/refuse" >&2; exit 1; fi
(read go < "$bundle/start"; exec sh "$bundle/script") &
echo $! > "$pid_file"
"#;

struct Bench {
    directory: tempfile::TempDir,
    listener: UnixListener,
}

impl Bench {
    fn new(script: &str) -> Self {
        // As buildah does before it calls a runtime.
        set_child_subreaper(true).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let bench = Self { directory, listener };
        fs::create_dir(bench.bundle()).unwrap();
        fs::write(bench.bundle().join("config.json"), CONFIG).unwrap();
        fs::write(bench.bundle().join("script"), script).unwrap();
        mkfifo(&bench.bundle().join("start"), Mode::S_IRWXU).unwrap();
        fs::write(bench.path("crun"), FAKE_CRUN).unwrap();
        fs::set_permissions(bench.path("crun"), fs::Permissions::from_mode(0o755)).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn bundle(&self) -> PathBuf {
        self.path("bundle")
    }

    fn wrapper(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln-agent"));
        command
            .arg0("/run/kiln/kiln-oci-runtime")
            .env("KILN_RUNTIME_SOCKET", self.path("socket"))
            .env("KILN_RUNTIME_PROGRAM", self.path("crun"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn create(&self) -> Child {
        let mut command = self.wrapper();
        command.arg("create").arg("--bundle").arg(self.bundle());
        command.arg("--pid-file").arg(self.path("pid")).arg("step").spawn().unwrap()
    }

    /// Plays the verb `start`.
    fn start(&self) {
        fs::write(self.bundle().join("start"), "go\n").unwrap();
    }

    fn monitor(&self) -> Pid {
        Pid::from_raw(fs::read_to_string(self.path("pid")).unwrap().parse().unwrap())
    }
}

/// The agent's end of one step.
struct Agent {
    stream: BufReader<UnixStream>,
    stdout: File,
    stderr: File,
}

impl Agent {
    fn accept(bench: &Bench) -> Self {
        let (stream, _) = bench.listener.accept().unwrap();
        let mut byte = [0];
        let raw = {
            let mut data = [IoSliceMut::new(&mut byte)];
            let mut space = cmsg_space!([i32; 2]);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<()>(stream.as_raw_fd(), &mut data, Some(&mut space), flags).unwrap();
            let mut rights = message.cmsgs().unwrap();
            let Some(ControlMessageOwned::ScmRights(raw)) = rights.next() else { panic!() };
            raw
        };
        assert_eq!((byte, raw.len()), (*b"K", 2));
        let mut ends = raw.into_iter().map(|raw| {
            // Opened again, because only that is possible without unsafe code.
            let end = File::open(Path::new("/proc/self/fd").join(raw.to_string())).unwrap();
            nix::unistd::close(raw).unwrap();
            end
        });
        let (stdout, stderr) = (ends.next().unwrap(), ends.next().unwrap());
        Self { stream: BufReader::new(stream), stdout, stderr }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn give_policy(&mut self) {
        let policy = json!({
            "secrets": [], "mounted_secrets": "/run/kiln/secrets/mounted", "network": "Proxy", "netns": "/run/netns/steps", "cgroup": "/kiln/steps/4",
            "processes": 99, "memory": 1_000_000,
        });
        writeln!(self.stream.get_ref(), "{policy}").unwrap();
    }

    fn read_pipes(&mut self) -> (String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        self.stdout.read_to_string(&mut out).unwrap();
        self.stderr.read_to_string(&mut err).unwrap();
        (out, err)
    }

    fn order(&mut self, order: u8) {
        self.stream.get_ref().write_all(&[order]).unwrap();
    }

    fn acknowledge(self) {
        self.stream.get_ref().write_all(b"A").unwrap();
    }
}

fn text(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8(output.stderr.clone()).unwrap())
}

#[test]
fn output_and_exit_code_reach_the_agent_and_then_the_engine() {
    let bench = Bench::new("echo out; echo err >&2; exit 7");
    let wrapper = bench.create();
    let mut agent = Agent::accept(&bench);
    assert_eq!(agent.line(), json!({"Create": {"name": "echo one && echo two"}}));
    agent.give_policy();
    // The engine's pipes end although the monitor lives on.
    assert_eq!(text(&wrapper.wait_with_output().unwrap()), (Some(0), String::new()));
    bench.start();
    assert_eq!(agent.read_pipes(), ("out\n".into(), "err\n".into()));
    let created = agent.line();
    assert_eq!(created["Created"]["id"], "step", "{created}");
    assert_eq!(created["Created"]["secrets"], false);
    assert!(std::path::Path::new(created["Created"]["config"].as_str().unwrap()).is_file());
    assert_eq!(agent.line(), json!({"Ended": {"code": 7}}));

    let monitor = bench.monitor();
    let flags = nix::sys::wait::WaitPidFlag::WNOHANG;
    assert_eq!(waitpid(monitor, Some(flags)).unwrap(), WaitStatus::StillAlive);
    agent.acknowledge();
    assert_eq!(waitpid(monitor, None).unwrap(), WaitStatus::Exited(monitor, 7));

    let config = fs::read_to_string(bench.bundle().join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["linux"]["cgroupsPath"], "/kiln/steps/4");
    assert_eq!(config["linux"]["resources"]["pids"]["limit"], 99);
}

#[test]
fn a_failed_step_s_container_is_made_again_as_often_as_the_agent_wants() {
    let bench = Bench::new("exit 7");
    let wrapper = bench.create();
    let mut agent = Agent::accept(&bench);
    agent.line();
    agent.give_policy();
    assert!(wrapper.wait_with_output().unwrap().status.success());
    bench.start();
    assert!(agent.line()["Created"].is_object());
    assert_eq!(agent.line(), json!({"Ended": {"code": 7}}));
    agent.order(b'H');
    let held = agent.line();
    assert_eq!(held["Held"]["id"], "step-held", "{held}");
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let step = read(Path::new(held["Held"]["config"].as_str().unwrap()));
    assert_eq!(step["process"]["args"][2], "echo one && echo two", "sessions are like the step");
    let container = read(&bench.path("held.json"));
    assert_eq!(container["process"]["args"], json!(["/dev/kiln-holder"]));
    assert_eq!(container["process"]["env"], step["process"]["env"]);
    assert_eq!(container["root"], step["root"]);
    agent.order(b'S');
    let refused = agent.line();
    let why = refused["NotHeld"]["why"].as_str().unwrap();
    assert!(why.contains("no such thing"), "{why}");

    let monitor = bench.monitor();
    agent.acknowledge();
    assert_eq!(waitpid(monitor, None).unwrap(), WaitStatus::Exited(monitor, 7));
}

#[test]
fn a_signal_reaches_the_engine_as_a_signal() {
    let bench = Bench::new("kill -KILL $$");
    let wrapper = bench.create();
    let mut agent = Agent::accept(&bench);
    agent.line();
    agent.give_policy();
    assert!(wrapper.wait_with_output().unwrap().status.success());
    bench.start();
    assert!(agent.line()["Created"].is_object());
    assert_eq!(agent.line(), json!({"Ended": {"code": 137}}));
    agent.acknowledge();
    let monitor = bench.monitor();
    let killed = WaitStatus::Signaled(monitor, Signal::SIGKILL, false);
    assert_eq!(waitpid(monitor, None).unwrap(), killed);
}

#[test]
fn the_end_comes_also_without_the_agent() {
    let bench = Bench::new("exit 5");
    let wrapper = bench.create();
    let mut agent = Agent::accept(&bench);
    agent.line();
    agent.give_policy();
    assert!(wrapper.wait_with_output().unwrap().status.success());
    drop(agent);
    bench.start();
    let monitor = bench.monitor();
    assert_eq!(waitpid(monitor, None).unwrap(), WaitStatus::Exited(monitor, 5));
}

#[test]
fn what_does_not_start_is_reported_with_the_runtimes_words() {
    let bench = Bench::new("");
    fs::write(bench.bundle().join("refuse"), "executable file `nosuch` not found\n").unwrap();
    let wrapper = bench.create();
    let mut agent = Agent::accept(&bench);
    agent.line();
    agent.give_policy();
    let words = "executable file `nosuch` not found\n".to_owned();
    assert_eq!(agent.read_pipes(), (String::new(), words));
    assert_eq!(agent.line(), json!({"NotStarted": {"message": null}}));
    agent.acknowledge();
    assert_eq!(wrapper.wait_with_output().unwrap().status.code(), Some(1));
}

#[test]
fn a_config_that_cannot_be_made_safe_does_not_run() {
    let bench = Bench::new("touch $0.ran");
    let mut config: Value = serde_json::from_str(CONFIG).unwrap();
    config["linux"].as_object_mut().unwrap().remove("seccomp");
    fs::write(bench.bundle().join("config.json"), config.to_string()).unwrap();
    let wrapper = bench.create();
    let mut agent = Agent::accept(&bench);
    agent.line();
    agent.give_policy();
    let why = "the engine gave the step no seccomp profile";
    assert_eq!(agent.line(), json!({"NotStarted": {"message": why}}));
    assert_eq!(agent.read_pipes(), (String::new(), String::new()));
    agent.acknowledge();
    let (code, stderr) = text(&wrapper.wait_with_output().unwrap());
    assert_eq!(code, Some(1));
    assert_eq!(stderr, format!("kiln-oci-runtime: Kiln refuses the step: {why}\n"));
    assert!(!bench.bundle().join("script.ran").exists() && !bench.path("pid").exists());
}

#[test]
fn without_an_agent_nothing_runs() {
    let bench = Bench::new("touch $0.ran");
    fs::remove_file(bench.path("socket")).unwrap();
    let (code, stderr) = text(&bench.create().wait_with_output().unwrap());
    assert_eq!(code, Some(1));
    assert!(stderr.contains("the agent could not be reached"), "{stderr}");
    assert!(!bench.bundle().join("script.ran").exists());
}

#[test]
fn other_verbs_are_the_runtimes() {
    let bench = Bench::new("");
    let output = bench.wrapper().args(["state", "step"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(output.stdout.starts_with(b"called: state step;"));
}

#[test]
fn who_asks_for_the_state_is_answered_when_the_step_is_over() {
    let bench = Bench::new("exit 0");
    let wrapper = bench.create();
    let mut agent = Agent::accept(&bench);
    agent.line();
    agent.give_policy();
    assert!(wrapper.wait_with_output().unwrap().status.success());
    assert!(bench.path("steps/step").exists());
    let asking = bench.wrapper().args(["state", "step"]).spawn().unwrap();
    bench.start();
    agent.line();
    agent.acknowledge();
    let monitor = bench.monitor();
    assert_eq!(waitpid(monitor, None).unwrap(), WaitStatus::Exited(monitor, 0));
    // No lock was there any more when crun was asked.
    assert_eq!(asking.wait_with_output().unwrap().stdout, b"called: state step;\n");
}
