//! What a VM's processes may use of the host together, in the words of cgroups. Pure.
//!
//! The guest's memory and CPUs are QEMU's to give; these bounds are for a QEMU that no longer does what it was told to.

use super::qemu_args::Engine;

/// Beside the guest's memory, in MiB: QEMU, the vsock device, page tables, and the cache of the VM's disks, which the kernel
/// gives back before it ends anybody.
const BESIDE_MB: u64 = 512;

/// What emulation has besides: its translated code (QEMU's `tb-size`, 1 GiB by default).
const TRANSLATED_MB: u64 = 1024;

/// Most tasks: vCPUs, QEMU's disk workers (64 each) and the device's threads.
pub(crate) const MAX_TASKS: u64 = 512;

/// One CPU beside the guest's, for QEMU's loop and the vsock device.
const CPUS_BESIDE: u64 = 1;

/// In microseconds; the kernel's default.
const PERIOD: u64 = 100_000;

/// A controller that limits something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Controller {
    Memory,
    Pids,
    Cpu,
}

impl Controller {
    pub(crate) const ALL: [Self; 3] = [Self::Memory, Self::Pids, Self::Cpu];

    /// As the kernel has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
        }
    }
}

/// Which cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    One,
    Two,
}

/// A file of a cgroup, and what is written there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub file: &'static str,
    pub value: String,
    /// Not every kernel has it, as without swap.
    pub optional: bool,
}

/// Of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// In MiB.
    pub memory_mb: u64,
    pub cpus: u32,
}

impl Limits {
    /// `disk_mb`: what of its disks is in memory, on a tmpfs.
    pub(crate) fn of(engine: Engine, memory_mb: u32, cpus: u32, disk_mb: u64) -> Self {
        let translated = if engine == Engine::Tcg { TRANSLATED_MB } else { 0 };
        Self { memory_mb: u64::from(memory_mb) + BESIDE_MB + translated + disk_mb, cpus }
    }

    pub(crate) fn settings(&self, version: Version, controller: Controller) -> Vec<Setting> {
        let memory = (self.memory_mb << 20).to_string();
        let quota = (u64::from(self.cpus) + CPUS_BESIDE) * PERIOD;
        let tasks = always("pids.max", MAX_TASKS.to_string());
        match (version, controller) {
            (_, Controller::Pids) => vec![tasks],
            (Version::Two, Controller::Memory) => vec![
                always("memory.max", memory),
                // A guest's memory, with the secrets in it, is not written to the host's swap.
                sometimes("memory.swap.max", "0".to_owned()),
                // QEMU without its device is no VM, and neither is the device.
                sometimes("memory.oom.group", "1".to_owned()),
            ],
            (Version::One, Controller::Memory) => vec![
                always("memory.limit_in_bytes", memory.clone()),
                // Memory and swap together.
                sometimes("memory.memsw.limit_in_bytes", memory),
                sometimes("memory.swappiness", "0".to_owned()),
            ],
            (Version::Two, Controller::Cpu) => {
                vec![always("cpu.max", format!("{quota} {PERIOD}")), weight(version, self.cpus)]
            }
            (Version::One, Controller::Cpu) => vec![
                always("cpu.cfs_period_us", PERIOD.to_string()),
                always("cpu.cfs_quota_us", quota.to_string()),
                weight(version, self.cpus),
            ],
        }
    }
}

/// As much as so many busy tasks of the host.
pub(crate) fn weight(version: Version, cpus: u32) -> Setting {
    match version {
        Version::Two => sometimes("cpu.weight", (u64::from(cpus) * 100).min(10_000).to_string()),
        Version::One => sometimes("cpu.shares", (u64::from(cpus) * 1024).min(262_144).to_string()),
    }
}

fn always(file: &'static str, value: String) -> Setting {
    Setting { file, value, optional: false }
}

fn sometimes(file: &'static str, value: String) -> Setting {
    Setting { file, value, optional: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(version: Version, limits: Limits) -> String {
        let settings = Controller::ALL.into_iter().flat_map(|c| limits.settings(version, c));
        settings.map(|Setting { file, value, .. }| format!("{file} = {value}\n")).collect()
    }

    #[test]
    fn what_is_written_in_version_2() {
        let limits = Limits::of(Engine::Kvm, 2048, 2, 0);
        insta::assert_snapshot!("limits_v2", shown(Version::Two, limits));
    }

    #[test]
    fn what_is_written_in_version_1() {
        let limits = Limits::of(Engine::Tcg, 2048, 2, 0);
        insta::assert_snapshot!("limits_v1", shown(Version::One, limits));
    }

    #[test]
    fn a_disk_in_memory_counts_and_weights_have_bounds() {
        let limits = Limits::of(Engine::Kvm, 1 << 20, 255, 16 << 20);
        assert_eq!(limits.memory_mb, (1 << 20) + 512 + (16 << 20));
        assert_eq!(weight(Version::Two, 255).value, "10000");
        assert_eq!(weight(Version::One, 255).value, "261120");
        assert_eq!(weight(Version::One, 300).value, "262144");
    }
}
