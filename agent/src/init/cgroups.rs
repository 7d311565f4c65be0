//! The control groups of the VM: version 2, with the controllers that a step's limits and usage need.

use std::fs;

use anyhow::{Context, bail};
use nix::mount::MsFlags;

use super::root::mount_new;

/// On `/sys`, which moves with all that is mounted in it.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Every other controller would make each step's cgroup slower to make.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Without these a step has no limits.
const REQUIRED: [&str; 2] = ["memory", "pids"];

/// Mounts the hierarchy and enables the controllers for its children.
pub fn mount() -> anyhow::Result<()> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // A step that makes namespaces of its own must not get at its own limits.
    mount_new("cgroup2", CGROUPS, "cgroup2", plain, "nsdelegate")?;
    let available = fs::read_to_string(format!("{CGROUPS}/cgroup.controllers"))
        .context("the cgroup controllers cannot be listed")?;
    let enabled = enabled(&available)?;
    fs::write(format!("{CGROUPS}/cgroup.subtree_control"), &enabled)
        .with_context(|| format!("the cgroup controllers cannot be enabled ({enabled})"))
}

/// Those of ours that the kernel has, as `cgroup.subtree_control` takes them.
fn enabled(available: &str) -> anyhow::Result<String> {
    let has = |controller: &str| available.split_whitespace().any(|name| name == controller);
    if let Some(missing) = REQUIRED.into_iter().find(|controller| !has(controller)) {
        bail!("the kernel has no cgroup controller {missing}");
    }
    let ours: Vec<_> =
        CONTROLLERS.into_iter().filter(|c| has(c)).map(|c| format!("+{c}")).collect();
    Ok(ours.join(" "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_must_have_what_limits_need_and_may_lack_the_rest() {
        assert_eq!(enabled("cpuset cpu io memory pids\n").unwrap(), "+cpu +io +memory +pids");
        assert_eq!(enabled("pids memory").unwrap(), "+memory +pids");
        for without in ["cpu memory", "pids io", "", "memory2 pids"] {
            assert!(enabled(without).is_err(), "{without}");
        }
    }
}
