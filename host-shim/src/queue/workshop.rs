//! What every driver works with, and whoever starts VMs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::capacity::Capacity;
use super::driver::Egress;
use super::reserve::Reserve;
use crate::build::Build;
use crate::events::EventLog;
use crate::gateway::{Backing, Upstreams};
use crate::kept::Kept;
use crate::secrets::Vault;
use crate::store::Store;
use crate::vmm::{Vm, VmSpec, Vmm, VmmError};

/// What every driver works with.
pub struct Workshop {
    /// Builds and events.
    pub store: Arc<dyn Store>,
    /// The store's events, and who waits for them.
    pub events: EventLog,
    /// Starts VMs.
    pub vmm: Vmm,
    /// Takes those of builds that failed.
    pub kept: Kept,
    /// The host's memory and disk for VMs.
    pub capacity: Capacity,
    /// Room for what has to be stored.
    pub reserve: Reserve,
    /// The registry behind the gateway.
    pub backing: Backing,
    /// The other registries that builds pull from.
    pub upstreams: Upstreams,
    /// Opens secrets.
    pub vault: Arc<Vault>,
    /// One directory for each build: its source and its staging.
    pub builds_dir: PathBuf,
    /// What VMs run: the digest of the builder bundle.
    pub builder_digest: String,
    /// Of the bundle's kernel.
    pub kernel_digest: String,
    /// Of one build's log content, in bytes.
    pub log_limit: u64,
    /// What steps may reach.
    pub egress: Egress,
    /// How often a driver renews its claim: [`BEAT`](super::BEAT).
    pub beat: Duration,
}

impl Workshop {
    /// Starts a VM. Kept ones give way where its memory would not be there.
    pub async fn start(&self, spec: VmSpec) -> Result<Vm, VmmError> {
        // Until it is started: nobody else counts on it meanwhile.
        let _starting = self.kept.make_room(spec.memory_mb, self.capacity.beside_mb()).await;
        self.vmm.start(spec).await
    }

    /// Where a build's source and staging are.
    pub fn build_dir(&self, build: &Build) -> PathBuf {
        self.builds_dir.join(build.id.as_str())
    }
}
