//! PID 1: from the kernel's first process to an agent that can dial, and to power-off.
//!
//! ```text
//! kernel ─▶ PID 1 ─▶ fork ─┬─▶ PID 1: reaps, and powers off when the agent ends in whatever way
//!                          │
//!                          └─▶ agent ─┬─▶ drivers of disks and vsock ─┬─▶ Hello
//!                                     └─▶ a thread: root, networks  ──┘
//! ```
//! Most of a boot is the loading of modules, which two processors do in half the time. Root and
//! mounts are the whole agent's; PID 1 stays in the initrd's root, which holds nothing but this
//! program.
//!
//! Nothing here knows a job, a name or the time: those come with Welcome. No shell and no other
//! program is needed.
//!
//! # What the agent and its engine find
//! | path | what |
//! |---|---|
//! | `/` | overlay: `/dev/vda` (EROFS, read-only) below, scratch above |
//! | `/var/lib/containers`, `/var/tmp`, `/var/lib/kiln` | scratch itself (`/dev/vdb`, ext4) |
//! | `/run`, `/tmp`, `/dev/shm` | memory |
//! | `/sys/fs/cgroup` | cgroup v2, the controllers that steps need enabled for children |
//! | `/run/kiln/agent`, `/run/kiln/kiln-oci-runtime` | this program, twice |
//! | `/run/netns/steps` | the steps' network: a loopback that is up |

mod cgroups;
pub mod clock;
mod devices;
pub mod heap;
mod modules;
pub mod net;
mod root;
mod supervise;
mod sys;

use std::fs;
use std::process::ExitCode;
use std::thread::JoinHandle;

use anyhow::Context;

pub use self::devices::wait_for;
use self::modules::{Module, Modules};
use self::net::Networks;
pub use self::root::mount_new;

/// What boot leaves for the agent.
#[derive(Debug)]
pub struct Booted {
    /// Identity of the builder image, as its initrd states it; empty when it does not.
    pub image: String,
    root: JoinHandle<anyhow::Result<Networks>>,
}

impl Booted {
    /// Waits until root and networks are whole. It blocks.
    pub fn wait(self) -> anyhow::Result<Networks> {
        self.root.join().unwrap_or_else(|_| anyhow::bail!("the thread that boots broke down"))
    }
}

/// Where the initrd states the builder image's identity.
const IMAGE: &str = "/etc/kiln/image";

/// Boots the VM and runs the agent in it. Does not return in PID 1, but powers off.
pub fn run(agent: impl FnOnce(Booted) -> ExitCode) -> ExitCode {
    if let Err(error) = reach_console() {
        eprintln!("kiln-agent: boot failed: {error:#}");
        supervise::power_off()
    }
    supervise::run(|| match boot() {
        Ok(booted) => agent(booted),
        Err(error) => {
            // The console is all there is.
            eprintln!("kiln-agent: boot failed: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn reach_console() -> anyhow::Result<()> {
    root::mount_kernel_file_systems()?;
    root::open_console().context("/dev/console cannot be opened")
}

/// Loads the drivers, and meanwhile puts the root together in a thread, which goes on. From then on no
/// path is certain: the thread changes the root.
fn boot() -> anyhow::Result<Booted> {
    sys::set_environment();
    let image = fs::read_to_string(IMAGE).unwrap_or_default().trim().to_owned();
    let Modules { drivers, file_systems } = modules::open()?;
    let root = std::thread::spawn(|| boot_root(file_systems));
    modules::load(drivers)?;
    Ok(Booted { image, root })
}

fn boot_root(file_systems: Vec<Module>) -> anyhow::Result<Networks> {
    modules::load(file_systems)?;
    cgroups::mount()?;
    for device in [root::LOWER_DEVICE, root::SCRATCH_DEVICE] {
        devices::wait_for(device)?;
    }
    root::build_and_switch()?;
    net::prepare()
}
