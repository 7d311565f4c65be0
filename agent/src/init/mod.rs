//! PID 1: from the kernel's first process to an agent that can dial, and to power-off.
//!
//! ```text
//! kernel ─▶ boot (one process, one thread) ─▶ fork ─┬─▶ PID 1: reaps, and powers off when the
//!                                                   │          agent ends in whatever way
//!                                                   └─▶ the agent: threads, session, engine
//! ```
//! Nothing here knows a job, a name or the time: those come with Welcome. No shell and no other
//! program is needed.
//!
//! # What the agent and its engine find
//! | path | what |
//! |---|---|
//! | `/` | overlay: `/dev/vda` (EROFS, read-only) below, scratch above |
//! | `/var/lib/containers`, `/var/tmp`, `/var/lib/kiln` | scratch itself (`/dev/vdb`, ext4) |
//! | `/run`, `/tmp`, `/dev/shm` | memory |
//! | `/sys/fs/cgroup` | cgroup v2, every controller enabled for children |
//! | `/run/kiln/agent`, `/run/kiln/kiln-oci-runtime` | this program, twice |
//! | `/run/netns/steps` | the steps' network: a loopback that is up |

pub mod clock;
mod devices;
mod modules;
pub mod net;
mod root;
mod supervise;
mod sys;

use std::fs;
use std::process::ExitCode;

use anyhow::Context;

/// What boot leaves for the agent.
#[derive(Debug)]
pub struct Booted {
    /// Identity of the builder image, as its initrd states it; empty when it does not.
    pub image: String,
}

/// Where the initrd states the builder image's identity.
const IMAGE: &str = "/etc/kiln/image";

/// Boots the VM and runs the agent in it. Does not return in PID 1, but powers off.
pub fn run(agent: impl FnOnce(Booted) -> ExitCode) -> ExitCode {
    match boot() {
        Ok(booted) => supervise::run(|| agent(booted)),
        Err(error) => {
            // The console is all there is.
            eprintln!("kiln-agent: boot failed: {error:#}");
            supervise::power_off()
        }
    }
}

fn boot() -> anyhow::Result<Booted> {
    root::mount_kernel_file_systems()?;
    root::open_console().context("/dev/console cannot be opened")?;
    modules::load_all()?;
    let image = fs::read_to_string(IMAGE).unwrap_or_default().trim().to_owned();
    for device in [root::LOWER_DEVICE, root::SCRATCH_DEVICE, "/dev/vsock"] {
        devices::wait_for(device)?;
    }
    root::build_and_switch()?;
    net::prepare()?;
    sys::set_environment();
    Ok(Booted { image })
}
