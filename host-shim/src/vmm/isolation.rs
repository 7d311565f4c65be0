//! What keeps VMs' processes apart from the host: what of it this host cannot do is told when the server starts, and refused where
//! isolation is required.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use seccompiler::BpfProgram;
use tokio::time::timeout;

use super::jail::{self, Launch, Output, Program};
use super::limits::Controller;
use super::qemu_args::Engine;
use super::root::{Root, System};
use super::{QEMU_MAX_FILES, Vmm, VmmError};

/// A program that only says its version has long said it by then.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was found out.
#[derive(Clone, Debug)]
struct Facts {
    /// VMs have users of their own.
    users: bool,
    /// VMs have cgroups of their own.
    cgroups: bool,
    /// What their cgroups cannot limit.
    unlimited: Vec<Controller>,
    /// Why they have no root directory and namespaces of their own.
    roots: Result<(), String>,
    /// Guests run under KVM.
    kvm: bool,
}

/// What is missing, one sentence each. Emulation is told elsewhere, with its reason.
fn missing(facts: &Facts) -> Vec<String> {
    let mut missing = vec![];
    if !facts.users {
        missing.push(
            "VMs run as the server's own user, because it is not root or has no users for them: what breaks out of \
             one has all that the server has"
                .to_owned(),
        );
    } else if let Err(why) = &facts.roots {
        missing.push(format!(
            "VMs' processes see the host's files and network, because they cannot be given their own: {why}"
        ));
    }
    if !facts.cgroups {
        missing.push(
            "no cgroup hierarchy can be written: VMs' processes are ended one by one, and nothing limits what they use of the \
             host together"
                .to_owned(),
        );
    } else if !facts.unlimited.is_empty() {
        let names: Vec<_> = facts.unlimited.iter().map(|controller| controller.name()).collect();
        missing.push(format!(
            "what VMs' processes use of the host together is not limited by the cgroup controllers {}, because there are none \
             that the server can use: mount cgroup version 2 with them, where no process but the server's manager is in its root",
            names.join(", ")
        ));
    }
    missing
}

impl Vmm {
    /// Finds out whether both programs start in roots of their own; from then on they do.
    pub(super) async fn try_roots(&mut self) {
        let Some(identity) = self.identity(0) else { return };
        let system = System::find();
        for (program, filters) in [
            (&self.programs.vsock_device, &self.filters.vsock_device),
            (&self.programs.qemu, &self.filters.qemu),
        ] {
            let tried = self.says_its_version(&system, program, filters, &identity).await;
            if let Err(why) = tried {
                self.roots = Err(format!("{} {why}", program.path.display()));
                return;
            }
        }
        self.roots = Ok(system);
    }

    async fn says_its_version(
        &self,
        system: &System,
        program: &Program,
        filters: &[BpfProgram],
        identity: &jail::Identity,
    ) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("was not started: {error}");
        let output = Output::new("kiln-version").map_err(failed)?;
        let root = Root::new(system, &self.config.run_dir, &program.path, &[], false);
        let process = jail::launch(Launch {
            name: "version",
            program,
            args: vec![OsString::from("--version")],
            dir: Path::new("/"),
            keep: &[],
            output: &output,
            cgroup_procs: &[],
            identity: Some(identity),
            root: Some(root.map_err(failed)?),
            filters,
            max_files: QEMU_MAX_FILES,
        })
        .map_err(failed)?;
        let ended = timeout(PATIENCE, process.exited()).await;
        process.kill();
        process.reap(std::time::Instant::now() + PATIENCE);
        match ended {
            Err(_) => Err(format!("did not say its version within {PATIENCE:?}")),
            Ok(how) if how == "exited with status 0" => Ok(()),
            Ok(how) => Err(format!("{how}: {}", output.text().trim())),
        }
    }

    /// Tells what is missing, and refuses it where isolation is required.
    pub(super) fn judge_isolation(&mut self) -> Result<(), VmmError> {
        let facts = Facts {
            users: self.isolates_users(),
            cgroups: self.cgroups.is_some(),
            unlimited: self.cgroups.as_ref().map(|root| root.missing()).unwrap_or_default(),
            roots: self.roots.as_ref().map(|_| ()).map_err(Clone::clone),
            kvm: self.engine == Engine::Kvm,
        };
        let mut missing = missing(&facts);
        for sentence in &missing {
            self.warn(sentence.clone());
        }
        if !facts.kvm {
            missing.push("guests do not run under KVM".to_owned());
        }
        if self.config.require_isolation && !missing.is_empty() {
            return Err(VmmError::NotIsolated(missing.join("; and ")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_that_is_missing_is_named() {
        let whole =
            Facts { users: true, cgroups: true, unlimited: vec![], roots: Ok(()), kvm: true };
        assert!(missing(&whole).is_empty());
        let without = |facts: Facts, word: &str| {
            let missing = missing(&facts);
            assert!(missing.len() == 1 && missing[0].contains(word), "{word}: {missing:?}");
        };
        // Without users there are no roots either: one sentence says it.
        let roots = Err("no mounts here".to_owned());
        without(Facts { users: false, roots: roots.clone(), ..whole.clone() }, "own user");
        without(Facts { cgroups: false, ..whole.clone() }, "cgroup");
        let unlimited = vec![Controller::Memory, Controller::Cpu];
        without(Facts { unlimited, ..whole.clone() }, "memory, cpu");
        without(Facts { roots, ..whole }, "no mounts here");
    }
}
