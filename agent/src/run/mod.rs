//! The role of an instance: the program of an image, in a container of the VM's one container runtime.
//!
//! ```text
//! /dev/vdc (the image, read-only) ─┐
//! scratch disk ────────────────────┴─ overlay ─▶ crun ─▶ kiln-init (process 1) ─▶ the program
//!                                                 ▲          │ reaps, passes signals on
//!  session ─ RunJob, cancel ─▶ agent ─────────────┘          │
//!     ▲────── log, Running, Exited ── stdout, stderr, ◀──────┘ "started", "not found"
//! ```
//! The VM boots as for a build, and knows nothing of the image before the job says so. An image is as hostile
//! as a step: nothing of it is looked up by a path that could lead out of its root, and its program gets the steps'
//! seccomp profile, so that it does not reach the host as if it were the agent.
//!
//! [`user`] and [`config`] are pure.

mod config;
mod container;
pub mod inside;
mod root;
mod user;

use std::path::PathBuf;
use std::time::Duration;

use kiln_protocol::event::{Event, Failure, FailureKind, Log, LogStream, Outcome, cut_text};
use kiln_protocol::run::RunJob;
use tokio_util::sync::CancellationToken;

use self::container::{Container, Ended};
pub use self::root::Root;
pub use self::user::User;
use crate::events::{Report, Reporter};
use crate::exec::Enterable;

/// How long the program has between its stop signal and SIGKILL, as with other container tools.
pub const STOP_GRACE: Duration = Duration::from_secs(10);

/// What a container runtime or shell says of a program that cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// And of one that is not there.
pub const NOT_FOUND: u8 = 127;

/// Where things are. The default is how they are in the VM.
#[derive(Clone, Debug)]
pub struct Places {
    /// The disk with the image.
    pub device: PathBuf,
    /// A directory of the scratch disk: image, layers and root are mounted below.
    pub scratch: PathBuf,
    /// In memory: the container's config and small files.
    pub files: PathBuf,
    /// The container runtime.
    pub program: PathBuf,
    /// This program, to be the container's first process.
    pub agent: PathBuf,
    /// The network with nothing but a loopback.
    pub netns: PathBuf,
    /// Where the cgroup hierarchy (version 2) is mounted.
    pub cgroup_mount: PathBuf,
    /// What sessions enter: the container while it runs.
    pub enterable: Enterable,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            device: "/dev/vdc".into(),
            scratch: "/var/lib/kiln/instance".into(),
            files: "/run/kiln/instance".into(),
            program: crate::runtime::DEFAULT_PROGRAM.into(),
            agent: "/run/kiln/agent".into(),
            netns: crate::init::net::STEPS.into(),
            cgroup_mount: "/sys/fs/cgroup".into(),
            enterable: Enterable::default(),
        }
    }
}

/// Runs the program to its end, or to the end of its grace after `cancel`.
pub async fn run(
    places: Places,
    job: RunJob,
    processes: u32,
    reporter: Reporter,
    cancel: CancellationToken,
) -> Outcome {
    let signal = job.stop_signal;
    let prepared = {
        let places = places.clone();
        tokio::task::spawn_blocking(move || prepare(&places, &job, processes))
    };
    match prepared.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return failed(&format!("{error:#}")),
        Err(error) => return failed(&format!("the agent's own work broke down: {error}")),
    }
    if cancel.is_cancelled() {
        return Outcome::Cancelled;
    }
    let ended = Container::new(&places, signal).run(&reporter, &cancel).await;
    let (code, said) = match ended {
        Ok(Ended::Exited { code, oom_kills: 0 }) => (code, None),
        Ok(Ended::Exited { code, oom_kills }) => {
            let said = format!(
                "the instance ran out of memory, and {oom_kills} of its processes were killed; give it more"
            );
            (code, Some(said))
        }
        Ok(Ended::NotStarted { code, why }) => (code, Some(why)),
        Ok(Ended::Stopped) => return Outcome::Cancelled,
        Err(error) => return failed(&format!("{error:#}")),
    };
    if let Some(said) = said {
        let content = cut_text(&said).into_bytes();
        let log = Log { stream: LogStream::Kiln, step: None, partial: false, content };
        reporter.report(Report::Event(Event::Log(log))).await;
    }
    Outcome::Exited(kiln_protocol::event::Exited { code })
}

/// The root and the container's config. It blocks.
fn prepare(places: &Places, job: &RunJob, processes: u32) -> anyhow::Result<()> {
    let root = root::mount(places)?;
    let user = root.user(&job.user)?;
    root.make_directory(&job.working_dir)?;
    let memory = std::fs::read_to_string("/proc/meminfo").ok();
    let memory = memory.and_then(|meminfo| crate::engine::step_memory(&meminfo));
    let limits = config::Limits { processes, memory };
    let config = config::config(places, job, &user, &limits)?;
    container::write_files(places, job, &config)
}

fn failed(message: &str) -> Outcome {
    let message = cut_text(&format!("the instance could not be started: {message}"));
    let kind = FailureKind::Internal;
    Outcome::Failed(Failure { kind, message, step: None, exit_code: None, detail: None })
}
