//! A program that may hang: it runs to its end, or to its deadline. For processes without a runtime of futures.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// How long the end of what was killed is waited for. One that the kernel does not let go is left to it.
const GRACE: Duration = Duration::from_secs(5);

/// Runs the program to its end. `None` when it took longer: it is killed, with what it started, but for what has begun
/// a session of its own.
pub fn run(command: &mut Command, within: Duration) -> io::Result<Option<ExitStatus>> {
    let mut child = command.process_group(0).spawn()?;
    let pid = Pid::from_child(&child);
    let watched = pidfd_open(pid, PidfdFlags::empty());
    let ended = watched.as_ref().map_err(|errno| *errno).and_then(|end| is_over(end, within));
    if matches!(ended, Ok(true)) {
        return child.wait().map(Some);
    }
    // It has not been waited for, so that the number is still its own.
    kill_process_group(pid, Signal::KILL)?;
    if let Ok(end) = &watched {
        is_over(end, GRACE)?;
    }
    child.try_wait()?;
    ended.map(|_| None).map_err(io::Error::from)
}

/// Waits for the process behind the descriptor: whether it ended in time.
fn is_over(process: &impl AsFd, within: Duration) -> Result<bool, Errno> {
    let until = Instant::now() + within;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        let mut ready = [PollFd::new(process, PollFlags::IN)];
        match rustix::event::poll(&mut ready, Some(&left)) {
            Err(Errno::INTR) => {}
            polled => return polled.map(|count| count > 0),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read as _, pipe};

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn an_end_in_time_is_the_program_s_own() {
        let ended = run(&mut shell("exit 7"), Duration::from_mins(1)).unwrap();
        assert_eq!(ended.and_then(|status| status.code()), Some(7));
        assert!(run(&mut Command::new("/nowhere"), Duration::ZERO).is_err());
    }

    #[test]
    fn what_hangs_is_killed_with_what_it_started() {
        let (mut read, write) = pipe().unwrap();
        let mut command = shell("sleep 1000 & sleep 1000");
        command.stdout(write);
        assert_eq!(run(&mut command, Duration::from_millis(50)).unwrap(), None);
        drop(command);
        // Nobody has the other end any more.
        assert_eq!(read.read(&mut [0]).unwrap(), 0);
    }
}
