//! A queue of the test's own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln::api::{CancelOutcome, Scheduler};
use kiln::build::{Build, BuildId, NetworkMode, Request, Status, Tenant};
use kiln::events::{Batch, EventLog, payload};
use kiln::gateway::Backing;
use kiln::gateway::upstream::Upstreams;
use kiln::kept::Kept;
use kiln::queue::{Capacity, Dispatcher, Egress, Reserve, Scheduling, Workshop};
use kiln::secrets::Vault;
use kiln::store::Store;
use kiln::store::sqlite::SqliteStore;
use kiln::vmm::{Accel, Vmm, VmmConfig};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::faulty::Faulty;
use super::guest::{Agent, programs};

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// For all VMs.
pub const MEMORY_MB: u32 = 1024;

pub struct House {
    dir: tempfile::TempDir,
    pub store: Arc<Faulty>,
    pub workshop: Arc<Workshop>,
    scheduling: Scheduling,
    pub stop: CancellationToken,
    pub abandon: CancellationToken,
    pub dispatcher: JoinHandle<()>,
}

impl House {
    /// With so many VMs at one time.
    pub async fn new(max_vms: usize) -> Self {
        Self::that(max_vms, Duration::from_secs(3600)).await
    }

    /// The same, in which no build waits longer than that.
    pub async fn that(max_vms: usize, longest: Duration) -> Self {
        Self::of(max_vms, longest, 0).await
    }

    /// The same, in which so many VMs of builds that failed may stay.
    pub async fn keeping(max_vms: usize, most: usize) -> Self {
        Self::of(max_vms, Duration::from_secs(3600), most).await
    }

    async fn of(max_vms: usize, longest: Duration, most_kept: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let [qemu, vsock_device] = programs(dir.path());
        for name in ["kernel", "initrd", "root"] {
            std::fs::write(at(name), name).unwrap();
        }
        let store = Faulty::new(SqliteStore::open(&at("data")).await.unwrap());
        let config = VmmConfig {
            // Its own: cgroups are the host's.
            instance: format!("test-{}", hex::encode(kiln::random::bytes::<8>())),
            run_dir: at("run"),
            disk_dir: at("disks"),
            qemu,
            vsock_device,
            kernel: at("kernel"),
            initrd: at("initrd"),
            root: at("root"),
            accel: Accel::Tcg,
            require_isolation: false,
            default_disk_gb: 1,
            uid_base: None,
        };
        let events = EventLog::new(store.clone());
        let workshop = Arc::new(Workshop {
            store: store.clone(),
            events,
            vmm: Vmm::new(config).await.unwrap(),
            kept: Kept::new(most_kept),
            capacity: Capacity::new(MEMORY_MB, dir.path().into()),
            reserve: Reserve::new(&at("data")),
            // Nobody is there.
            backing: Backing::external("http://127.0.0.1:1", None).unwrap(),
            vault: Arc::new(Vault::new(&[1; 32]).unwrap()),
            builds_dir: at("builds"),
            builder_digest: "sha256:00".into(),
            kernel_digest: "sha256:11".into(),
            log_limit: 1 << 20,
            egress: Egress { permitted: vec![], ca: vec![] },
            upstreams: Upstreams::none(),
            beat: Duration::from_millis(50),
        });
        let scheduling = Scheduling::new(store.clone());
        let (stop, abandon) = (CancellationToken::new(), CancellationToken::new());
        let dispatcher = tokio::spawn(async {});
        let house = Self { dir, store, workshop, scheduling, stop, abandon, dispatcher };
        house.opened(max_vms, longest)
    }

    fn opened(mut self, max_vms: usize, longest: Duration) -> Self {
        let room = Arc::new(Semaphore::new(max_vms));
        let (workshop, scheduling) = (self.workshop.clone(), self.scheduling.clone());
        let dispatcher = Dispatcher::new(workshop, scheduling, room, "test".into(), longest);
        self.dispatcher = tokio::spawn(dispatcher.run(self.stop.clone(), self.abandon.clone()));
        self
    }

    /// Ends as a server does, and another one starts.
    pub async fn restarted(mut self, max_vms: usize, longest: Duration) -> Self {
        self.stop.cancel();
        self.dispatcher.await.unwrap();
        self.stop = CancellationToken::new();
        self.abandon = CancellationToken::new();
        self.dispatcher = tokio::spawn(async {});
        self.opened(max_vms, longest)
    }

    /// Queues a build with this much of a source.
    pub async fn submit(&self, name: &str, tenant: &str, source: usize) -> BuildId {
        self.submitted(name, tenant, source, kiln::clock::now()).await
    }

    /// The same, at that time.
    pub async fn submitted(&self, name: &str, tenant: &str, source: usize, now: i64) -> BuildId {
        self.insert(name, tenant, source, now, request()).await
    }

    /// One that wants so much memory.
    pub async fn sized(&self, name: &str, tenant: &str, memory_mb: u32) -> BuildId {
        let request = Request { memory_mb, ..request() };
        self.insert(name, tenant, 10, kiln::clock::now(), request).await
    }

    /// One that wants so much memory and whose VM stays when a step fails.
    pub async fn kept(&self, name: &str, tenant: &str, memory_mb: u32) -> BuildId {
        let request = Request { memory_mb, keep_failed_seconds: 600, ..request() };
        self.insert(name, tenant, 10, kiln::clock::now(), request).await
    }

    async fn insert(
        &self,
        name: &str,
        tenant: &str,
        source: usize,
        now: i64,
        request: Request,
    ) -> BuildId {
        let id = BuildId::new(name).unwrap();
        let dir = self.workshop.builds_dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("source"), vec![0; source]).unwrap();
        let build = Build::queued(id.clone(), Tenant::new(tenant).unwrap(), request, now);
        let told = payload::of_host(now, payload::status(Status::Queued, None));
        self.store.insert_build(&build, &[told], None, &[]).await.unwrap();
        self.scheduling.wake();
        id
    }

    pub async fn cancel(&self, id: &BuildId) -> CancelOutcome {
        self.scheduling.cancel(id).await
    }

    pub async fn build(&self, id: &BuildId) -> Build {
        self.store.build(id).await.unwrap().unwrap()
    }

    /// Waits for the build's end, as a follower of its events.
    pub async fn end(&self, id: &BuildId) -> Build {
        let mut follower = self.workshop.events.read(id, 0, true);
        while tokio::time::timeout(PATIENCE, follower.next()).await.unwrap().unwrap() != Batch::End
        {
        }
        self.build(id).await
    }

    /// The agent of the build's VM, as it boots.
    pub async fn agent(&self, id: &BuildId) -> Agent {
        let vm = self.vm(id);
        // The device's socket comes after the listeners.
        let booted = until(|| vm.join("sock/vu").exists());
        tokio::select! {
            biased;
            () = booted => Agent::boot(&vm).await.0,
            ended = self.end(id) => panic!("it has no VM: {:?}", ended.failure),
        }
    }

    pub fn vm(&self, id: &BuildId) -> PathBuf {
        self.dir.path().join("run").join(id.as_str())
    }

    /// Whether anything of the build's is left: its VM's directory, its processes, its source.
    pub fn is_gone(&self, id: &BuildId) -> bool {
        !self.vm(id).exists()
            && !self.workshop.builds_dir.join(id.as_str()).exists()
            && self.processes().is_empty()
    }

    /// Processes of VMs: those that run this house's programs.
    pub fn processes(&self) -> Vec<PathBuf> {
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let programs =
            all.filter_map(|process| std::fs::read_link(process.path().join("exe")).ok());
        programs.filter(|program| program.starts_with(self.dir.path())).collect()
    }

    /// Ends as a server does.
    pub async fn close(self) {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.dispatcher).await.unwrap().unwrap();
    }
}

/// Waits for what nobody tells.
pub async fn until(mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "it is never so");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn request() -> Request {
    Request {
        dockerfile: None,
        target: None,
        image_name: None,
        build_args: BTreeMap::new(),
        tags: BTreeMap::new(),
        base_image_digest: None,
        network: NetworkMode::None,
        allowed_domains: vec![],
        secrets: vec![],
        timeout_seconds: 600,
        memory_mb: 256,
        cpus: 1,
        disk_gb: 1,
        keep_failed_seconds: 0,
        priority: 50,
        source_digest: "sha256:00".into(),
        source_bytes: 1,
    }
}
