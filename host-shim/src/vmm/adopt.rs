//! Going on with a VM that an earlier server started, and that has outlived it.
//!
//! Everything of it is found by its record: the processes, exactly these; its user, which is no other VM's; the directory
//! of its sockets. The guest's dials found nobody meanwhile; they do once its ports are bound again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::jail::Output;
use super::process::Process;
use super::qmp::Qmp;
use super::record::Record;
use super::start::{PORTS, SOCKETS, give, listen, monitor, to_tokio};
use super::vm::{Remains, Vm};
use super::{Vmm, VmmError, is_name, vsock};

impl Vmm {
    /// Where a VM's own directory is, whether it is there or not.
    pub fn dir_of(&self, id: &str) -> PathBuf {
        self.config.run_dir.join(id)
    }

    /// The VM with that id, if it runs as its server left it. Otherwise what is left of it is the sweep's, or is removed
    /// here. To be called before [`Vmm::sweep`].
    pub async fn adopt(&self, id: &str) -> Result<Option<Vm>, VmmError> {
        let dir = self.config.run_dir.join(id);
        if !is_name(id, false) {
            return Ok(None);
        }
        let Ok(record) = Record::read(&dir) else { return Ok(None) };
        let is_ours = self.identity(record.slot).map_or_else(
            || record.uid == rustix::process::geteuid().as_raw(),
            |who| who.uid == record.uid,
        );
        let [device, qemu] = record.processes[..] else { return Ok(None) };
        if record.boot != self.boot || !is_ours {
            return Ok(None);
        }
        let took_over = VmmError::io("take over a process of", &dir);
        let processes = Process::of_another(device)
            .and_then(|device| Ok(device.zip(Process::of_another(qemu)?)))
            .map_err(took_over)?;
        let Some((device, qemu)) = processes else { return Ok(None) };
        let Some(slot) = self.slots.take_again(id, record.slot) else { return Ok(None) };
        // From here on it goes with this where something fails.
        let mut remains = Remains::new(dir.clone(), slot);
        remains.processes = vec![device, qemu];
        remains.cgroup = record.cgroups();

        let sock = dir.join(SOCKETS);
        let [control, registry, egress] = bound_again(&sock, record.uid)?;
        let monitor = monitor(&dir).and_then(to_tokio);
        let qmp = Qmp::new(monitor.map_err(VmmError::io("reach the monitor in", &dir))?);
        let running = match qmp.negotiate().await {
            Ok(()) => qmp.is_running().await,
            Err(error) => Err(error),
        };
        if !matches!(running, Ok(true)) {
            tracing::info!(vm = id, ?running, "a VM of an earlier server has ended");
            return Ok(None);
        }
        let age = u64::try_from(crate::clock::now() - record.started_at).unwrap_or(0);
        let now = Instant::now();
        let output = |name| Output::new(name).map_err(VmmError::io("make memory for", &dir));
        Ok(Some(Vm {
            control: Arc::new(control),
            registry: Arc::new(registry),
            egress: Arc::new(egress),
            id: id.to_owned(),
            started: now.checked_sub(Duration::from_millis(age)).unwrap_or(now),
            qmp,
            // What they say goes to the memory of a server that is gone.
            qemu_output: output("kiln-qemu")?,
            device_output: output("kiln-vsock")?,
            console: std::sync::Mutex::default(),
            remains,
        }))
    }
}

/// Binds the guest's ports where the sockets of an earlier server are. The device may write there and serves a hostile
/// guest, so for that moment the directory is taken from it: nothing can be put where we are about to write.
fn bound_again(sock: &Path, uid: u32) -> Result<[super::GuestListener; 3], VmmError> {
    give(sock, rustix::process::geteuid().as_raw())?;
    for port in PORTS {
        let path = sock.join(format!("{}_{port}", vsock::UDS));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(VmmError::io("remove", &path)(error));
            }
            _ => {}
        }
    }
    let bound = listen(sock, uid)?;
    give(sock, uid)?;
    Ok(bound)
}
