//! A `kiln serve` that is killed and started again on the same directories. Not the released program: only the one of the
//! tests can end at named points.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where everything of it is.
pub struct Home {
    pub dir: tempfile::TempDir,
    programs: [PathBuf; 2],
}

/// While it runs.
pub struct Server {
    child: Child,
    /// Where it listens; `None` when it ended before.
    pub address: Option<String>,
}

impl Home {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let programs = super::machine::programs(dir.path());
        std::fs::create_dir(dir.path().join("tmp")).unwrap();
        Self { dir, programs }
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The directories of its VMs.
    pub fn run_dir(&self) -> Option<PathBuf> {
        let mut all = std::fs::read_dir(self.dir.path().join("run")).ok()?;
        all.next()?.ok().map(|entry| entry.path())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("serve.log")).unwrap_or_default()
    }

    pub fn token(&self) -> String {
        let made = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["token", "create", "--tenant", "dev", "--role", "admin", "--data-dir"])
            .arg(self.dir.path().join("data"))
            .output()
            .unwrap();
        String::from_utf8(made.stdout).unwrap().trim().to_owned()
    }

    /// Starts a server, which ends at this point if it comes there.
    pub fn serve(&self, point: Option<&str>) -> Server {
        let variables: Vec<_> =
            point.map(|point| ("KILN_TEST_KILL_AT", point)).into_iter().collect();
        self.serve_with(&variables, &[])
    }

    /// Starts a server with these variables and these settings more.
    pub fn serve_with(&self, variables: &[(&str, &str)], flags: &[&str]) -> Server {
        let (reader, writer) = std::io::pipe().unwrap();
        let fd = writer.as_raw_fd();
        rustix::io::fcntl_setfd(&writer, rustix::io::FdFlags::empty()).unwrap();
        let at = |name: &str| self.dir.path().join(name);
        let log = std::fs::File::options().create(true).append(true).open(at("serve.log")).unwrap();
        let [qemu, device] = &self.programs;
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command
            .env("TMPDIR", at("tmp"))
            .args(["serve", "--listen", "127.0.0.1:0", "--accel", "tcg", "--max-vms", "3"])
            .args(["--max-queued", "1000", "--max-requests-per-second", "100000"])
            .arg("--data-dir")
            .arg(at("data"))
            .arg("--run-dir")
            .arg(at("run"))
            .arg("--builder")
            .arg(builder())
            .arg("--qemu")
            .arg(qemu)
            .arg("--vhost-device-vsock")
            .arg(device)
            .args(["--notify-fd", &fd.to_string()])
            .args(flags)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let child = command.spawn().unwrap();
        drop(writer);
        let mut line = String::new();
        BufReader::new(reader).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("ready ").map(str::to_owned);
        Server { child, address }
    }

    /// Processes whose program is of this home, by name.
    pub fn processes(&self) -> Vec<PathBuf> {
        self.running().into_values().collect()
    }

    pub fn running(&self) -> BTreeMap<i32, PathBuf> {
        let all = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|one| {
            let pid = one.file_name().to_str()?.parse().ok()?;
            Some((pid, std::fs::read_link(one.path().join("exe")).ok()?))
        });
        all.filter(|(_, program)| program.starts_with(self.dir.path())).collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the log of kiln serve ---\n{}", self.log());
            // Fake VMs outlive their server, which is what is tested; they are not to outlive a test that failed.
            for pid in self.running().into_keys() {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}

impl Server {
    /// Kills it then, if it has not ended before.
    pub fn kill_within(mut self, most: Duration) {
        let begun = Instant::now();
        while self.child.try_wait().unwrap().is_none() && begun.elapsed() < most {
            // Nobody tells of a child's end while time passes.
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Stops it as its operator does.
    pub fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

/// The real one: its files are opened, and nothing boots them.
fn builder() -> PathBuf {
    let state = std::env::var_os("KILN_TEST_STATE").map(PathBuf::from);
    let checkout = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.kiln");
    state.unwrap_or_else(checkout).join("builder")
}

impl Drop for Server {
    fn drop(&mut self) {
        // After a failure; otherwise it has ended.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
