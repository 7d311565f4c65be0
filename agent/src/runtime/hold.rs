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
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use oci_spec::runtime::{Mount, Spec};

use super::bounded;
use super::config::StepPolicy;
use super::create::CONFIG;
use super::secrets;
use super::wire::FromWrapper;

/// Where the container has this program, and the name that makes it the first process.
const HOLDER: &str = "/dev/kiln-holder";

/// Where the VM has it.
const AGENT: &str = "/run/kiln/agent";

/// How long the container runtime may take to make the container. Generous, as a VM under software emulation may be
/// busy; with the removal of what it leaves, and what [`bounded`] waits, less than the minute that the host gives an entry.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How long it may take to remove what is left of one that was not made.
const REMOVAL: Duration = Duration::from_secs(10);

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
    /// How long the runtime may take, usually [`DEADLINE`].
    pub deadline: Duration,
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
            let mut delete = Command::new(&self.program);
            let _ = bounded::run(delete.args(["delete", "--force"]).arg(id), REMOVAL);
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
        let mut run = Command::new(&self.program);
        run.arg("--cgroup-manager=cgroupfs")
            .arg("--log")
            .arg(&log)
            .args(["run", "--detach", "--no-new-keyring", "--bundle"])
            .arg(bundle)
            .arg(id)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let Some(status) = bounded::run(&mut run, self.deadline)? else {
            return Err(io::Error::other(format!(
                "the container runtime did not make the failed step's container again within {} s and was ended; \
                 enter again to have it made",
                self.deadline.as_secs()
            )));
        };
        if status.success() {
            return Ok(step);
        }
        let words: String = fs::read_to_string(&log).unwrap_or_default();
        let words: String = words.trim().chars().take(MAX_WORDS).collect();
        Err(io::Error::other(format!(
            "the container runtime could not make the failed step's container again: {words}"
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
    use std::os::unix::fs::PermissionsExt as _;

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

    /// Plays a runtime that hangs the first time, and says how it was called.
    const HANGS_ONCE: &str = r#"#!/bin/sh
echo "$*" >> "$0.calls"
if [ "$1" = delete ]; then exit 0; fi
if [ ! -e "$0.hung" ]; then touch "$0.hung"; exec sleep 1000; fi
"#;

    #[test]
    fn a_runtime_that_hangs_is_ended_and_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("runtime");
        fs::write(&program, HANGS_ONCE).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let hold = Hold {
            program,
            spec: Spec::default(),
            policy: serde_json::from_value(json!({
                "secrets": [], "mounted_secrets": "/s", "network": "Proxy", "netns": "/n", "cgroup": "/kiln/steps/1",
                "processes": 9, "memory": null,
            }))
            .unwrap(),
            id: "step".into(),
            bundles: dir.path().join("held"),
            // Long enough that it has begun to hang, where it is killed for nothing else.
            deadline: Duration::from_secs(1),
        };
        let FromWrapper::NotHeld { why } = hold.make(false) else { panic!("it hangs") };
        assert!(why.contains("within 1 s and was ended"), "{why}");
        assert!(!hold.bundles.join("step-held").exists());
        let made = hold.make(false);
        assert!(matches!(&made, FromWrapper::Held { id, .. } if id == "step-held"), "{made:?}");
        let calls = fs::read_to_string(dir.path().join("runtime.calls")).unwrap();
        let verbs: Vec<_> = calls.lines().map(|call| call.starts_with("delete --force")).collect();
        assert_eq!(verbs, [false, true, false], "{calls}");
    }

    #[test]
    fn the_whole_name_decides() {
        assert!(is_holder_call(OsStr::new("/dev/kiln-holder")));
        assert!(!is_holder_call(OsStr::new("kiln-holder")));
    }
}
