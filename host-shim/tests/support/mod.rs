//! A real `kiln serve` of the test's own: its own data, registry, port and VMs; gone at the end.
//!
//! The builder and base images are those of `scripts/test` (`KILN_TEST_STATE`, or `.kiln` of the
//! checkout).

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::assigning_clones,
    clippy::needless_pass_by_value,
    missing_docs
)]

pub mod holders;
pub mod image;
pub mod registry;

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

pub const BASE: &str = "registry.kiln/base/debian:trixie";

/// How long a build may take before a test gives up: two VMs share two cores under emulation.
const PATIENCE: Duration = Duration::from_mins(4);

/// Of a test's VMs: two of them share two cores, where emulated processors that wait for each other cost a
/// third of the time. `scripts/quickstart` and `scripts/e2e` have the default.
pub const CPUS: &str = "1";

pub struct Server {
    child: Child,
    dir: tempfile::TempDir,
    pub address: String,
    pub token: String,
}

impl Server {
    /// Starts a server that runs at most two VMs, with the base image published.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(flags: &[&str]) -> Self {
        Self::start_in(&std::env::temp_dir(), flags)
    }

    /// Keeps everything of the server's in a directory below this one.
    pub fn start_in(dir: &Path, flags: &[&str]) -> Self {
        Self::start_on_with(tempfile::tempdir_in(dir).unwrap(), flags)
    }

    /// Keeps everything of the server's in this directory.
    pub fn start_on(dir: tempfile::TempDir) -> Self {
        Self::start_on_with(dir, &[])
    }

    fn start_on_with(dir: tempfile::TempDir, flags: &[&str]) -> Self {
        let mut server = Self::serve(dir, &state().join("builder"), flags);
        server.token = server.new_token("dev", "admin");
        server.publish_base(&state());
        server
    }

    /// Starts a server whose VMs boot another bundle. It has no images.
    pub fn start_of(builder: &Path) -> Self {
        let mut server = Self::serve(tempfile::tempdir().unwrap(), builder, &[]);
        server.token = server.new_token("dev", "admin");
        server
    }

    /// Starts a server whose builds fail before their VMs start. It needs no images.
    pub fn start_without_vms(builder: &Path) -> Self {
        Self::start_without_vms_with(builder, &[])
    }

    pub fn start_without_vms_with(builder: &Path, more: &[&str]) -> Self {
        Self::start_without_vms_in(builder, &[], more)
    }

    pub fn start_without_vms_in(builder: &Path, variables: &[(&str, &str)], more: &[&str]) -> Self {
        Self::start_without_vms_on(tempfile::tempdir().unwrap(), builder, variables, more)
    }

    /// On a directory in whose `data` there is something already.
    pub fn start_without_vms_on(
        dir: tempfile::TempDir,
        builder: &Path,
        variables: &[(&str, &str)],
        more: &[&str],
    ) -> Self {
        let programs =
            ["--accel", "tcg", "--qemu", "/bin/false", "--vhost-device-vsock", "/bin/false"];
        let flags = [&programs[..], &["--max-queued", "100000"], more].concat();
        let mut server = Self::serve_in(variables, dir, builder, &flags);
        server.token = server.new_token("dev", "admin");
        server
    }

    /// Starts a server that runs this program where it would run QEMU. It has no images.
    pub fn start_with_qemu(builder: &Path, qemu: &Path) -> Self {
        let flags = ["--accel", "tcg", "--qemu", qemu.to_str().unwrap()];
        let mut server = Self::serve(tempfile::tempdir().unwrap(), builder, &flags);
        server.token = server.new_token("dev", "admin");
        server
    }

    /// Starts a server that runs this program where it would run QEMU, and where it would run the vsock device. It has no
    /// images.
    pub fn start_with_program_on(
        dir: tempfile::TempDir,
        builder: &Path,
        program: &Path,
        variables: &[(&str, &str)],
        more: &[&str],
    ) -> Self {
        let program = program.to_str().unwrap();
        let programs = ["--accel", "tcg", "--qemu", program, "--vhost-device-vsock", program];
        let mut server = Self::serve_in(variables, dir, builder, &[&programs, more].concat());
        server.token = server.new_token("dev", "admin");
        server
    }

    /// Kills the server with all that a SIGKILL of it kills, and starts another one in its place.
    pub fn kill_and_restart(mut self) -> Self {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        let token = std::mem::take(&mut self.token);
        let mut server = Self::serve(dir, &state().join("builder"), &[]);
        server.token = token;
        server
    }

    fn serve(dir: tempfile::TempDir, builder: &Path, flags: &[&str]) -> Self {
        Self::serve_in(&[], dir, builder, flags)
    }

    /// With these variables.
    fn serve_in(
        variables: &[(&str, &str)],
        dir: tempfile::TempDir,
        builder: &Path,
        flags: &[&str],
    ) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let fd = writer.as_raw_fd();
        clear_close_on_exec(&writer);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(dir.path().join("serve.log"))
            .unwrap();
        // Tests that look for what is left find that there, too.
        let temporary = dir.path().join("tmp");
        std::fs::create_dir_all(&temporary).unwrap();
        let child = Command::new(kiln())
            .env("KILN_MAX_VMS", "2")
            // However full the disk is that tests run on.
            .env("KILN_GC_DISK_PERCENT", "0")
            .envs(variables.iter().copied())
            .env("TMPDIR", temporary)
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(dir.path().join("data"))
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .arg("--builder")
            .arg(builder)
            .args(["--notify-fd", &fd.to_string()])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        drop(writer);
        let mut line = String::new();
        BufReader::new(reader).read_line(&mut line).unwrap();
        let mut server = Self { child, dir, address: String::new(), token: String::new() };
        let Some(address) = line.trim().strip_prefix("ready ") else {
            panic!("kiln serve did not start: {line:?}\n{}", server.log());
        };
        server.address = address.to_owned();
        server
    }

    pub fn new_token(&self, tenant: &str, role: &str) -> String {
        let data = self.dir.path().join("data");
        let made = Command::new(kiln())
            .args(["token", "create", "--tenant", tenant, "--role", role, "--data-dir"])
            .arg(data)
            .output()
            .unwrap();
        text(made.stdout).trim().to_owned()
    }

    fn publish_base(&self, state: &Path) {
        let published = Command::new(program("kiln-image"))
            .arg("publish")
            .arg(state.join("debian"))
            .arg(format!("{}/base/debian:trixie", self.address))
            .args(["--plain-http", "--creds", &format!("any:{}", self.token)])
            .output()
            .unwrap();
        assert!(published.status.success(), "{}\n{}", text(published.stderr), self.log());
    }

    /// `kiln ARGS…` as a user of this server.
    pub fn kiln(&self, args: &[&str]) -> Command {
        let mut command = Command::new(kiln());
        command
            .args(args)
            .env("KILN_URL", format!("http://{}", self.address))
            .env("KILN_TOKEN", &self.token)
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.kiln(args).output().unwrap()
    }

    /// Submits a source of these files and returns the build's id.
    pub fn submit(&self, files: &[(&str, &[u8])], flags: &[&str]) -> String {
        let source = source(files);
        let path = source.path().to_str().unwrap();
        let out = self.run(&[&["build", path, "--detach", "--cpus", CPUS], flags].concat());
        assert!(out.status.success(), "{}", text(out.stderr));
        text(out.stdout).trim().to_owned()
    }

    /// Submits a Dockerfile alone with fields of the API that `kiln build` has no flags for; returns the
    /// build's id.
    pub fn post(&self, dockerfile: &str, fields: &[(&str, &str)]) -> String {
        let source = source(&[("Dockerfile", dockerfile.as_bytes())]);
        let tar = source.path().join("source.tar");
        let mut made = Command::new("tar");
        made.arg("-C").arg(source.path()).arg("-cf").arg(&tar).arg("Dockerfile");
        assert!(made.status().unwrap().success());
        let mut curl = Command::new("curl");
        curl.args([
            "-sS",
            "--fail-with-body",
            "-H",
            &format!("Authorization: Bearer {}", self.token),
        ])
        .args(["-F", &format!("source=@{}", tar.display())]);
        for (name, value) in fields {
            curl.args(["--form-string", &format!("{name}={value}")]);
        }
        let out = curl.arg(format!("http://{}/builds", self.address)).output().unwrap();
        assert!(out.status.success(), "{}{}", text(out.stdout), text(out.stderr));
        let build: Value = serde_json::from_slice(&out.stdout).unwrap();
        build["id"].as_str().unwrap().to_owned()
    }

    /// Builds a source of these files and waits.
    pub fn build(&self, files: &[(&str, &[u8])], flags: &[&str]) -> Output {
        let source = source(files);
        let path = source.path().to_str().unwrap();
        self.run(&[&["build", path, "--progress", "plain", "--cpus", CPUS], flags].concat())
    }

    pub fn show(&self, id: &str) -> Value {
        let out = self.run(&["show", id, "--format", "json"]);
        assert!(out.status.success(), "{}", text(out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Waits until the build is final, by its event stream; returns the build.
    pub fn wait(&self, id: &str) -> Value {
        let mut follow = self.follow(id);
        follow.drain();
        self.show(id)
    }

    /// Follows the build's log.
    pub fn follow(&self, id: &str) -> Follow {
        let mut child = self
            .kiln(&["logs", "-f", id])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Follow { child, lines, seen: String::new() }
    }

    /// The pids of this server's VM processes of a kind.
    pub fn processes(&self, program: &str) -> Vec<i32> {
        children_of(self.child.id())
            .into_iter()
            .filter(|pid| name_of(*pid).is_some_and(|name| program.starts_with(&name)))
            .collect()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("serve.log")).unwrap_or_default()
    }

    /// The directory of a build's VM.
    pub fn vm(&self, id: &str) -> PathBuf {
        // There is one server.
        let mut of_server = std::fs::read_dir(self.dir.path().join("run")).unwrap();
        of_server.next().unwrap().unwrap().path().join(id)
    }

    /// Asks the server to stop, and does not wait.
    pub fn ask_to_stop(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    }

    /// Waits for its end, and leaves its directory to the next one.
    pub fn ended(mut self) -> tempfile::TempDir {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
        assert_no_files(&self.dir.path().join("run"));
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }

    /// Stops the server as an operator does, and checks that it leaves nothing.
    pub fn stop(mut self) {
        let started = children_of(self.child.id());
        let unfinished = self.unfinished();
        self.ask_to_stop();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
        let left: Vec<_> = started.into_iter().filter_map(name_of).collect();
        assert!(left.is_empty(), "processes are left: {left:?}");
        assert_no_files(&self.dir.path().join("run"));
        // What it did not wait for is in the queue again, with its source.
        for id in unfinished {
            let _ = std::fs::remove_file(self.data().join("builds").join(id).join("source"));
        }
        assert_no_files(&self.data().join("builds"));
    }

    /// Builds that wait or run.
    fn unfinished(&self) -> Vec<String> {
        let listed = ["queued", "building", "pushing"].map(|status| {
            let out = self.run(&["ls", "--limit", "200", "--status", status, "--format", "json"]);
            serde_json::from_slice::<Vec<Value>>(&out.stdout).unwrap_or_default()
        });
        let ids = listed.iter().flatten().map(|build| build["id"].as_str().unwrap().to_owned());
        ids.collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the log of kiln serve ---\n{}", self.log());
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            self.ask_to_stop();
            let _ = self.child.wait();
        }
    }
}

/// The lines of a build that is being followed.
pub struct Follow {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
    pub seen: String,
}

impl Follow {
    /// Reads until a line that holds `what`; returns false when the log ends before.
    pub fn until(&mut self, what: &str) -> bool {
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < PATIENCE, "no {what:?} in:\n{}", self.seen);
            let mut line = Vec::new();
            if self.lines.read_until(b'\n', &mut line).unwrap() == 0 {
                return false;
            }
            let line = text(line);
            self.seen.push_str(&line);
            if line.contains(what) {
                return true;
            }
        }
    }

    /// Reads to the end of the log, which is the end of the build.
    pub fn drain(&mut self) {
        let mut rest = Vec::new();
        self.lines.read_to_end(&mut rest).unwrap();
        self.seen.push_str(&text(rest));
        let _ = self.child.wait();
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A source directory of these files.
pub fn source(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    dir
}

pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(<sha2::Sha256 as sha2::Digest>::digest(bytes))
}

pub fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Every process below one.
pub fn children_of(pid: u32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut look = vec![i32::try_from(pid).unwrap()];
    while let Some(pid) = look.pop() {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for task in tasks {
            let list = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            for child in list.split_whitespace().map(|p| p.parse::<i32>().unwrap()) {
                found.push(child);
                look.push(child);
            }
        }
    }
    found
}

/// A process's name (its first 15 bytes), while it runs. One that has ended but that its parent has
/// not collected yet runs no more.
pub fn name_of(pid: i32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once('(')?;
    (!tail.starts_with('Z')).then(|| name.to_owned())
}

fn assert_no_files(dir: &Path) {
    let mut look = vec![dir.to_owned()];
    while let Some(dir) = look.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().unwrap().is_dir() {
                look.push(entry.path());
            } else {
                panic!("{} is left", entry.path().display());
            }
        }
    }
}

fn clear_close_on_exec(fd: &impl std::os::fd::AsFd) {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
}

/// The one that cargo has built for the tests, or that of `KILN_TEST_PROGRAM`: scripts/test has VMs served by the program
/// that users run.
fn kiln() -> PathBuf {
    std::env::var_os("KILN_TEST_PROGRAM")
        .map_or_else(|| env!("CARGO_BIN_EXE_kiln").into(), PathBuf::from)
}

/// A program that scripts/test has built.
fn program(name: &str) -> PathBuf {
    let path = workspace().join("target/release").join(name);
    assert!(
        path.exists(),
        "{} is missing: run scripts/test, or scripts/quickstart --prepare",
        path.display()
    );
    path
}

/// What scripts/test has installed.
pub fn tools() -> PathBuf {
    state_dir().join("tools")
}

/// The bundle that VMs boot.
pub fn builder() -> PathBuf {
    state().join("builder")
}

fn state_dir() -> PathBuf {
    std::env::var_os("KILN_TEST_STATE").map_or_else(|| workspace().join(".kiln"), PathBuf::from)
}

fn state() -> PathBuf {
    let state = state_dir();
    let bundle = state.join("builder/bundle.json");
    assert!(
        bundle.exists(),
        "{} is missing: run scripts/test, or scripts/quickstart --prepare",
        bundle.display()
    );
    state
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}
