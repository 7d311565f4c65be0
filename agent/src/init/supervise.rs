//! What PID 1 does once the VM is up: it reaps, and it ends the VM when the agent has ended.
//!
//! The agent is another process so that nothing gets between it and its own children: whatever a
//! dead container leaves behind falls to PID 1, and never into the agent's waits.

use std::process::{ExitCode, exit};

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{ForkResult, Pid};

use super::sys;

/// Forks the agent. In the agent's process this returns its exit code; PID 1 never returns.
pub fn run(agent: impl FnOnce() -> ExitCode) -> ExitCode {
    match sys::fork() {
        Ok(ForkResult::Child) => return agent(),
        Ok(ForkResult::Parent { child }) => {
            let ended = reap_until(child);
            if !matches!(ended, Some(WaitStatus::Exited(_, 0))) {
                eprintln!("kiln-agent: the agent ended badly: {ended:?}");
            }
        }
        Err(error) => eprintln!("kiln-agent: the agent cannot be forked: {error}"),
    }
    power_off()
}

/// Reaps whatever ends until it is `child`. `None` if it cannot be waited for.
fn reap_until(child: Pid) -> Option<WaitStatus> {
    loop {
        match wait() {
            Ok(status) if status.pid() == Some(child) => return Some(status),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}

/// Ends the VM. Without a sync: all that was written goes with the VM, and writing it first would
/// only make everybody wait.
pub fn power_off() -> ! {
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("kiln-agent: the VM cannot be powered off: {error}");
    // The kernel panics when PID 1 ends, and `panic=-1` ends the VM.
    exit(1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::zombie_processes)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn other_children_are_reaped_on_the_way() {
        // Every test is a process of its own under nextest; these are all its children.
        for _ in 0..3 {
            Command::new("true").spawn().unwrap();
        }
        let agent = Command::new("sh").args(["-c", "exit 3"]).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(agent.id()).unwrap());
        assert_eq!(reap_until(pid), Some(WaitStatus::Exited(pid, 3)));
    }

    #[test]
    fn a_child_that_is_not_there_is_no_reason_to_hang() {
        assert_eq!(reap_until(Pid::from_raw(i32::MAX)), None);
    }
}
