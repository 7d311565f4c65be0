//! A running VM: where its guest's dials arrive, how it ends, and how all of it is removed.
//!
//! ```text
//! Vmm::start ─▶ Vm ──exited()──▶ VmExit         the guest is over, or a process died; nothing is removed yet
//!                │
//!                └──destroy()──▶ nothing left    processes, cgroup, directory, scratch disk, user
//! ```

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::process::Signal;

use super::cgroup::Cgroup;
use super::dial::{DialError, Dialer};
use super::jail::{Output, printable};
use super::listener::GuestListener;
use super::process::{Process, ProcessId};
use super::qmp::{GuestEnd, Monitor, Qmp};
use super::slots::Slot;
use super::{REMOVAL_DEADLINE, VmmError};

/// One VM. It serves one build and is never used again. Dropping it kills and removes it, too.
#[derive(Debug)]
pub struct Vm {
    /// Port 5001: the agent.
    pub control: Arc<GuestListener>,
    /// Port 5003: the engine's pulls and pushes.
    pub registry: Arc<GuestListener>,
    /// Port 5004: the steps' egress.
    pub egress: Arc<GuestListener>,
    pub(super) id: String,
    pub(super) started: Instant,
    pub(super) qmp: Qmp,
    pub(super) qemu_output: Output,
    pub(super) device_output: Output,
    pub(super) console: Mutex<String>,
    pub(super) remains: Remains,
}

/// Why a VM is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VmExit {
    /// The guest powered off, as it does when it is told to finish.
    #[error("the VM powered off")]
    PowerOff,
    /// The guest's kernel panicked, or the guest reset itself.
    #[error("the VM's kernel panicked or reset")]
    Reset,
    /// The guest stopped in some other way.
    #[error("the VM stopped")]
    Stopped,
    /// QEMU ended.
    #[error("QEMU {0}")]
    Qemu(String),
    /// The host's kernel ended QEMU or the vsock device: together they wanted more memory than their cgroup has.
    #[error(
        "the host's kernel ended {who}: the VM's processes wanted more than the {limit_mb} MiB that their cgroup has, which is more \
         than a VM of its size needs"
    )]
    Memory {
        /// Which of them.
        who: &'static str,
        /// What they may have together, in MiB.
        limit_mb: u64,
    },
    /// The vsock device ended: the guest cannot be talked to any more.
    #[error("the VM's vsock device {0}")]
    VsockDevice(String),
    /// QEMU runs, and does not behave as QEMU.
    #[error("QEMU's monitor was lost: {0}")]
    MonitorLost(String),
}

/// The processes of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pids {
    /// QEMU.
    pub qemu: ProcessId,
    /// vhost-device-vsock.
    pub vsock_device: ProcessId,
}

impl Vm {
    /// Its id, which is its build's.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// When QEMU had been executed: boot times count from here.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Its directory, where only the server can look.
    pub fn dir(&self) -> &std::path::Path {
        &self.remains.dir
    }

    /// Its processes.
    pub fn pids(&self) -> Pids {
        Pids { qemu: self.remains.qemu().id(), vsock_device: self.remains.device().id() }
    }

    /// Dials into it, from wherever and for as long as it is there.
    pub fn dialer(&self) -> std::io::Result<Dialer> {
        Dialer::open(&self.remains.dir.join(super::start::SOCKETS), self.control.uid())
    }

    /// Connects to a port of the guest.
    pub async fn dial(&self, port: u32) -> Result<tokio::net::UnixStream, DialError> {
        self.dialer().map_err(DialError::Device)?.dial(port).await
    }

    /// Resolves when the VM is over, with why. Any number of callers may wait; cancel-safe.
    pub async fn exited(&self) -> VmExit {
        tokio::select! {
            biased;
            how = self.remains.qemu().exited() => self.qemu_ended(how),
            monitor = self.qmp.ended() => match monitor {
                Monitor::Ended(GuestEnd::PowerOff) => VmExit::PowerOff,
                Monitor::Ended(GuestEnd::Reset) => VmExit::Reset,
                Monitor::Ended(GuestEnd::Other) | Monitor::Running => VmExit::Stopped,
                // Its end of the connection closes a moment before QEMU has ended.
                Monitor::Lost(why) => {
                    let ended = tokio::time::timeout(REMOVAL_DEADLINE / 2, self.remains.qemu().exited()).await;
                    ended.map_or(VmExit::MonitorLost(why), |how| self.qemu_ended(how))
                }
            },
            how = self.remains.device().exited() => {
                self.ended_for_memory("its vsock device").unwrap_or(VmExit::VsockDevice(how))
            }
        }
    }

    fn qemu_ended(&self, how: String) -> VmExit {
        self.ended_for_memory("QEMU").unwrap_or(VmExit::Qemu(how))
    }

    fn ended_for_memory(&self, who: &'static str) -> Option<VmExit> {
        let limit_mb = self.remains.cgroup.as_ref()?.ended_for_memory()?;
        Some(VmExit::Memory { who, limit_mb })
    }

    /// Stops QEMU: it takes no more time of the host's, and keeps its memory.
    ///
    /// By a signal and not by QMP's `stop`, which stops the vsock device's queues as well: with QEMU 7.2 and
    /// vhost-device-vsock 0.3 a VM that went on from that was sometimes never reached again.
    pub fn pause(&self) -> Result<(), VmmError> {
        self.signal(Signal::STOP)
    }

    /// Lets QEMU run on.
    pub fn resume(&self) -> Result<(), VmmError> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<(), VmmError> {
        self.remains
            .qemu()
            .signal(signal)
            .map_err(|error| VmmError::Unmoved { id: self.id.clone(), why: error.to_string() })
    }

    /// The last of what the guest's console said, as plain text: hostile all the same. `None` when it said
    /// nothing, or QEMU was gone before anybody asked.
    pub async fn console_tail(&self) -> Option<String> {
        let new = self.qmp.take_console().await;
        let mut console = self.console.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Ok(new) = new {
            console.push_str(&printable(&new));
            let surplus = console.len().saturating_sub(super::qemu_args::CONSOLE_BYTES as usize);
            let cut =
                (surplus..=console.len()).find(|at| console.is_char_boundary(*at)).unwrap_or(0);
            console.drain(..cut);
        }
        (!console.is_empty()).then(|| console.clone())
    }

    /// What QEMU and the vsock device said themselves, for the host's log.
    pub fn complaints(&self) -> Option<String> {
        let said =
            [("qemu", self.qemu_output.text()), ("vhost-device-vsock", self.device_output.text())];
        let lines: Vec<_> = said
            .iter()
            .flat_map(|(who, text)| text.lines().map(move |line| format!("{who}: {line}")))
            .collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }

    /// Kills its processes, waits for their end, and removes all that was made for it.
    pub async fn destroy(self) -> Result<(), VmmError> {
        let Self { id, remains, .. } = self;
        let cleared = tokio::task::spawn_blocking(move || {
            let mut remains = remains;
            remains.clear()
        });
        match cleared.await {
            Ok(failures) if failures.is_empty() => Ok(()),
            Ok(failures) => Err(VmmError::Left { id, what: failures.join("; ") }),
            Err(error) => Err(VmmError::Left { id, what: error.to_string() }),
        }
    }
}

/// All that has to go when a VM goes, as it comes into being. Whatever way a start or a VM ends, dropping this
/// removes it.
#[derive(Debug)]
pub(crate) struct Remains {
    /// The device first, then QEMU.
    pub processes: Vec<Process>,
    pub cgroup: Option<Cgroup>,
    pub dir: PathBuf,
    /// Given back last, so that no other VM has the user before its processes are gone.
    pub slot: Option<Slot>,
    pub cleared: bool,
}

impl Remains {
    pub(crate) fn new(dir: PathBuf, slot: Slot) -> Self {
        Self { processes: vec![], cgroup: None, dir, slot: Some(slot), cleared: false }
    }

    fn device(&self) -> &Process {
        &self.processes[0]
    }

    fn qemu(&self) -> &Process {
        &self.processes[1]
    }

    /// Removes everything, in the order that lets each go. Blocks for [`REMOVAL_DEADLINE`] at most.
    pub(crate) fn clear(&mut self) -> Vec<String> {
        let deadline = Instant::now() + REMOVAL_DEADLINE;
        let mut failures = vec![];
        self.cleared = true;
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
        for process in &self.processes {
            process.kill();
        }
        for process in &self.processes {
            if !process.reap(deadline) {
                failures.push(format!("process {} does not end", process.id().pid));
            }
        }
        if let Some(Err(error)) = self.cgroup.as_ref().map(|cgroup| cgroup.remove(deadline)) {
            failures.push(format!("its cgroup stays: {error}"));
        }
        // While something runs its record stays, and its user is not given to another VM.
        if failures.is_empty() {
            match std::fs::remove_dir_all(&self.dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    failures.push(format!("{} stays: {error}", self.dir.display()));
                }
                Ok(()) | Err(_) => {}
            }
            drop(self.slot.take());
        } else if let Some(slot) = self.slot.take() {
            slot.keep();
        }
        failures
    }
}

impl Drop for Remains {
    fn drop(&mut self) {
        if self.cleared {
            return;
        }
        let mut rest = Self {
            processes: std::mem::take(&mut self.processes),
            cgroup: self.cgroup.take(),
            dir: std::mem::take(&mut self.dir),
            slot: self.slot.take(),
            cleared: true,
        };
        // Killed at once; waited for where no task is held up by it.
        for process in &rest.processes {
            process.kill();
        }
        let removal = rest.slot.as_ref().map(Slot::removal);
        let clear = move || {
            for failure in rest.clear() {
                tracing::error!(dir = %rest.dir.display(), failure, "a dropped VM was not removed");
            }
            drop(rest);
            drop(removal);
        };
        if let Err(error) = std::thread::Builder::new().name("vm-removal".to_owned()).spawn(clear) {
            tracing::error!(%error, "a dropped VM is left to the next sweep");
        }
    }
}
