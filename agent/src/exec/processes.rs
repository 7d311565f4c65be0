//! The processes of a session: those in its cgroup, and those in the kernel's session that its command began, for
//! the command may not be in the cgroup yet.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::runtime::Cgroup;

/// How often what is left is looked for again: a process that forks faster than it is seen is caught by then, or
/// the limit on processes of its container has it.
const ROUNDS: usize = 16;

/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// Ends every process of a session. It blocks.
pub fn end(leader: Option<Pid>, cgroup: &Cgroup) {
    if let Some(leader) = leader {
        end_session_of(leader);
    }
    if let Err(error) = cgroup.end(GONE) {
        tracing::warn!(%error, "the cgroup of a session stays");
    }
}

/// Ends every process of the session that `leader` began.
fn end_session_of(leader: Pid) {
    for _ in 0..ROUNDS {
        let found = of_session(leader);
        if found.is_empty() {
            return;
        }
        for pid in found {
            // It may have ended since.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Gives the command and its children a signal.
pub fn signal(leader: Pid, signal: Signal) {
    // They may have ended since.
    let _ = killpg(leader, signal);
}

/// Those that are not over. A zombie waits for its parent, and nothing can be done to it.
pub fn of_session(leader: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        // A program's name may be any bytes.
        let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
        session_of(&String::from_utf8_lossy(&stat)) == Some(leader.as_raw())
    })
    .map(Pid::from_raw)
    .collect()
}

/// The session in a line of `/proc/PID/stat`, unless the process is a zombie. A program's name may hold anything.
fn session_of(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let session = fields.nth(2)?.parse().ok()?;
    (state != "Z" && state != "X").then_some(session)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_session_is_found_behind_any_name() {
        assert_eq!(session_of("7 (a) S 1 (b) R 1 5 9 0 -1 4194560"), Some(9));
        assert_eq!(session_of("7 (sh) Z 1 5 9 0 -1 4194560"), None);
        assert_eq!(session_of(""), None);
    }

    #[test]
    fn all_of_a_session_end_and_nobody_else() {
        // A group of its own inside the session, as a shell's jobs have.
        let script = "import os,time\nif os.fork()==0:\n os.setpgid(0,0);print('x',flush=True)\ntime.sleep(1000)";
        let mut child = Command::new("setsid")
            .args(["python3", "-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let leader = Pid::from_raw(i32::try_from(child.id()).unwrap());
        assert_eq!(of_session(leader).len(), 2);
        end_session_of(leader);
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        // Its output ends, for nobody is left that holds it.
        line.clear();
        assert_eq!(output.read_line(&mut line).unwrap(), 0);
        assert_eq!(bystander.try_wait().unwrap(), None);
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }
}
