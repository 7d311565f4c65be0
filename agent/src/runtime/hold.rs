//! A failed step again: a container with the step's root as the step left it, its environment, directory, user and
//! limits, whose first process only stays. Sessions enter that.
//!
//! The step's own container is over, and its root with it as soon as the engine learns of that. So the engine does
//! not learn of it, and its monitor, which is where the root is mounted, makes the new container.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use oci_spec::runtime::{Mount, Spec};

use super::config::StepPolicy;
use super::create::CONFIG;
use super::secrets;
use super::wire::FromWrapper;

/// Where the container has this program, and the name that makes it the first process.
const HOLDER: &str = "/dev/kiln-holder";

/// Where the VM has it.
const AGENT: &str = "/run/kiln/agent";

/// As much of the runtime's words as is repeated.
const MAX_WORDS: usize = 1024;

/// What is known of a step's container.
#[derive(Debug)]
pub struct Hold {
    /// The container runtime.
    pub program: PathBuf,
    /// The step's config, without secrets.
    pub spec: Spec,
    /// What the step was given.
    pub policy: StepPolicy,
    /// What its container was called.
    pub id: OsString,
    /// Where bundles go: memory.
    pub bundles: PathBuf,
}

impl Hold {
    /// Makes the container. Gives what the agent is told.
    pub fn make(&self, with_secrets: bool) -> FromWrapper {
        let mut id = self.id.clone();
        id.push(if with_secrets { "-secrets" } else { "-held" });
        match self.try_make(&id, with_secrets) {
            Ok(config) => {
                let cgroup = self.cgroup(&id);
                FromWrapper::Held { id: id.to_string_lossy().into_owned(), config, cgroup }
            }
            Err(error) => FromWrapper::NotHeld { why: error.to_string() },
        }
    }

    fn cgroup(&self, id: &OsStr) -> PathBuf {
        self.policy.cgroup.join("held").join(id)
    }

    fn try_make(&self, id: &OsStr, with_secrets: bool) -> io::Result<PathBuf> {
        let bundle = self.bundles.join(id);
        let made = self.make_in(&bundle, id, with_secrets);
        if made.is_err() {
            // So that it can be tried again, and no copy of a secret stays.
            let _ = Command::new(&self.program).args(["delete", "--force"]).arg(id).status();
            let _ = fs::remove_dir_all(&bundle);
        }
        made
    }

    fn make_in(&self, bundle: &Path, id: &OsStr, with_secrets: bool) -> io::Result<PathBuf> {
        DirBuilder::new().mode(0o700).recursive(true).create(bundle)?;
        let mut spec = self.spec.clone();
        if with_secrets {
            secrets::place(&mut spec, &self.policy.secrets, bundle, id)?;
        }
        // What sessions are like: the step, not the process that stays.
        let step = bundle.join("step.json");
        spec.save(&step).map_err(io::Error::other)?;
        let spec = holding(spec, &self.cgroup(id));
        spec.save(bundle.join(CONFIG)).map_err(io::Error::other)?;
        let log = bundle.join("log");
        let status = Command::new(&self.program)
            .arg("--cgroup-manager=cgroupfs")
            .arg("--log")
            .arg(&log)
            .args(["run", "--detach", "--no-new-keyring", "--bundle"])
            .arg(bundle)
            .arg(id)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if status.success() {
            return Ok(step);
        }
        let words: String = fs::read_to_string(&log).unwrap_or_default();
        let words: String = words.trim().chars().take(MAX_WORDS).collect();
        Err(io::Error::other(format!(
            "the container runtime could not make its container again: {words}"
        )))
    }
}

/// The step's config with a first process that only stays.
fn holding(mut spec: Spec, cgroup: &Path) -> Spec {
    if let Some(process) = spec.process_mut() {
        process.set_args(Some(vec![HOLDER.to_owned()]));
        // The step may have removed its own.
        process.set_cwd("/".into());
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(Some(cgroup.to_owned()));
    }
    spec.mounts_mut().get_or_insert_default().push(program());
    spec
}

fn program() -> Mount {
    let options = ["bind", "ro", "nosuid", "nodev"].map(str::to_owned).to_vec();
    let mut mount = Mount::default();
    mount.set_destination(HOLDER.into());
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(AGENT.into()));
    mount.set_options(Some(options));
    mount
}

/// Whether the process was called as a holder.
pub fn is_holder_call(argv0: &OsStr) -> bool {
    Path::new(argv0) == Path::new(HOLDER)
}

/// Its `main`: stays, and reaps what sessions leave behind.
pub fn holder_main() -> ExitCode {
    match stay() {
        Ok(never) => match never {},
        Err(_) => ExitCode::FAILURE,
    }
}

fn stay() -> nix::Result<Infallible> {
    let signals = SigSet::from(Signal::SIGCHLD);
    signals.thread_block()?;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => {
                // Another signal's number may have no name; it is no reason to go.
                let _ = signals.wait();
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn everything_but_the_first_process_stays_as_it_was() {
        let before = json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["/bin/sh", "-c", "make"], "env": ["A=1"], "cwd": "/src",
                "user": { "uid": 7, "gid": 8 }, "noNewPrivileges": true,
            },
            "root": { "path": "/rootfs" },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": { "cgroupsPath": "/kiln/steps/1" },
        });
        let spec: Spec = serde_json::from_value(before.clone()).unwrap();
        let after = serde_json::to_value(holding(spec, Path::new("/kiln/steps/1/held/x"))).unwrap();
        assert_eq!(after["process"]["args"], json!([HOLDER]));
        assert_eq!(after["process"]["env"], before["process"]["env"]);
        assert_eq!(after["process"]["user"], before["process"]["user"]);
        assert_eq!(after["root"]["path"], before["root"]["path"]);
        assert_eq!(after["linux"]["cgroupsPath"], json!("/kiln/steps/1/held/x"));
        assert_eq!(after["mounts"][0]["destination"], json!("/proc"));
        assert_eq!(after["mounts"][1]["destination"], json!(HOLDER));
    }

    #[test]
    fn the_whole_name_decides() {
        assert!(is_holder_call(OsStr::new("/dev/kiln-holder")));
        assert!(!is_holder_call(OsStr::new("kiln-holder")));
    }
}
