//! What is written down of a VM, so that a server that comes after a killed one finds all of it:
//! `<run>/<id>/record.json`, in a directory that the VM's user cannot write.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cgroup::Cgroup;
use super::process::ProcessId;
use crate::build::Millis;

/// Its name in the VM's directory.
pub(crate) const FILE: &str = "record.json";

/// Ours are a few hundred bytes.
const MAX_BYTES: u64 = 64 * 1024;

/// All that has to go when the VM goes, beside its directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// A pid means nothing after a reboot.
    pub boot: String,
    /// The user of its processes.
    pub uid: u32,
    /// Its place among the VMs of its server.
    #[serde(default)]
    pub slot: u32,
    /// When QEMU was started, by the host's clock, in milliseconds.
    #[serde(default)]
    pub started_at: Millis,
    /// Its cgroup, in the hierarchy that ends its processes.
    pub cgroup: Option<PathBuf>,
    /// The same in those that only limit them.
    #[serde(default)]
    pub limits: Vec<PathBuf>,
    /// Its processes, as far as they were started.
    pub processes: Vec<ProcessId>,
}

impl Record {
    /// Replaces the record, whole or not at all. A crash of the host takes the processes too, so nothing is synced.
    pub(crate) fn write(&self, vm_dir: &Path) -> io::Result<()> {
        let mut new = tempfile::NamedTempFile::new_in(vm_dir)?;
        new.write_all(&serde_json::to_vec(self)?)?;
        new.persist(vm_dir.join(FILE))?;
        Ok(())
    }

    /// Its cgroup in every hierarchy, if it has one.
    pub(crate) fn cgroups(&self) -> Option<Cgroup> {
        let dirs = self.cgroup.iter().chain(&self.limits).cloned();
        self.cgroup.as_ref().map(|_| Cgroup::recorded(dirs.collect()))
    }

    pub(crate) fn read(vm_dir: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        fs::File::open(vm_dir.join(FILE))?.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }
}

/// The host's boot, by the kernel's random id for it.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
