//! `kiln serve`: puts the parts together, serves, and takes them apart again.
//!
//! Order matters at the start: the data directory is locked, what an earlier process left is swept,
//! its builds are ended, and only then is anything claimed or answered.

mod connections;
mod drain;
pub mod log;
mod manager;
mod parts;
mod ready;
mod signals;
mod tls;

use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::middleware::from_fn_with_state;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::connections::Connections;
use self::drain::Drained;
use self::signals::Asked;
pub use self::tls::{Tls, TlsError};
use crate::api::{self, ApiState};
use crate::config::{ConfigError, ServeArgs, ServeConfig};
use crate::events::{EventLog, QUIET};
use crate::exec::Sessions;
use crate::gateway::BackingError;
use crate::gateway::clients::{self, GatewayState};
use crate::gateway::token::TokenKeys;
use crate::instances::quota::Quota;
use crate::instances::{Instances, Machines, Places};
use crate::kept::Kept;
use crate::metrics;
use crate::queue::{BEAT, Capacity, Dispatcher, Reserve, Scheduling, Workshop, adopt, recover};
use crate::retention::Retention;
use crate::sources::Sources;
use crate::token::Uses;
use crate::traces::Traces;
use crate::traces::otlp::{BadVariable, Sender};
use crate::vmm::{Swept, Vmm};

/// How long open requests may go on at the end. Followers of builds have all seen the end by then.
const HANG_UP: Duration = Duration::from_secs(2);

/// `kiln serve`, and how it tells that it serves.
#[derive(Debug, clap::Args)]
pub struct ServeCommand {
    #[command(flatten)]
    settings: ServeArgs,
    /// Write "ready ADDRESS:PORT" to this open descriptor once it serves, and close it
    #[arg(long, value_name = "FD")]
    notify_fd: Option<RawFd>,
}

impl ServeCommand {
    /// Serves until it is told to stop.
    pub async fn run(self) -> anyhow::Result<()> {
        let notify = self.notify_fd.map(take_descriptor).transpose()?;
        // First of all: a signal during the start stops it, and is not lost.
        let asked = signals::asked().context("cannot listen for signals")?;
        let config = self.settings.resolve()?;
        log::start(config.log_format);
        serve(config, notify, asked).await
    }
}

/// Removes what a server on this data directory left when it was killed. Refused while one runs.
pub async fn sweep(settings: ServeArgs) -> anyhow::Result<Swept> {
    let config = settings.resolve()?;
    let _lock = parts::lock(&config.data_dir)?;
    let swept = Vmm::sweep_leftovers(&parts::instance(&config), &parts::run_dir(&config)).await;
    swept.context("cannot remove what an earlier server left")
}

/// Whether the command ended because of a setting that cannot be as it was given.
pub fn is_usage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<ConfigError>()
            || cause.is::<TlsError>()
            || cause.is::<BadVariable>()
            || matches!(
                cause.downcast_ref(),
                Some(BackingError::Url { .. } | BackingError::Config { .. })
            )
    })
}

async fn serve(config: ServeConfig, notify: Option<OwnedFd>, asked: Asked) -> anyhow::Result<()> {
    parts::raise_descriptor_limit();
    let traces = traces()?;
    let tls = config.tls.clone().map(Tls::load).transpose()?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let _lock = parts::lock(&config.data_dir)?;
    let bundle = parts::bundle(&config).await?;
    let store = parts::store(&config).await?;
    let vault = Arc::new(crate::secrets::load_or_make(&config.data_dir)?);
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let vmm = parts::vmm(&config, &bundle).await?;
    let (registry, backing) = parts::registry(&config).await?;
    let draining = asked.stop.clone();
    let facilities = parts::facilities(&config, &bundle, &vmm, backing.clone(), draining);
    let sources = Sources::new(config.data_dir.join("builds"));
    let events = EventLog::traced(Arc::clone(&store), QUIET, traces);
    let kept = Kept::new(config.max_kept);
    let reserve = Reserve::new(&config.data_dir);
    let capacity = Capacity::new(config.max_vm_memory_mb, config.data_dir.clone());
    let workshop = Arc::new(Workshop {
        store: Arc::clone(&store),
        events: events.clone(),
        vmm,
        kept: kept.clone(),
        capacity: capacity.clone(),
        reserve: reserve.clone(),
        backing: backing.clone(),
        upstreams: parts::upstreams(&config)?,
        vault: Arc::clone(&vault),
        builds_dir: sources.root().to_owned(),
        builder_digest: bundle.digest.to_string(),
        kernel_digest: bundle.manifest.files.kernel.digest.to_string(),
        log_limit: config.log_limit_bytes,
        egress: parts::egress(&config)?,
        beat: BEAT,
    });
    let owner = format!("{}-{}", std::process::id(), hex::encode(crate::random::bytes::<8>()));
    let max_vms = config.max_vms as usize;
    let room = Arc::new(Semaphore::new(max_vms));
    let claimed = store.reclaim(&owner, crate::clock::now()).await;
    let claimed = claimed.context("cannot take over the builds of an earlier server")?;
    let (adopted, left) = adopt(&workshop, claimed, &room).await;
    let swept = workshop.vmm.sweep().await?;
    if !swept.vms.is_empty() {
        tracing::warn!(vms = ?swept.vms, "removed the VMs of an earlier server");
    }
    recover(&workshop, left).await.context("cannot end the builds of an earlier server")?;
    let swept = sources.sweep(store.as_ref()).await;
    swept.context("cannot remove sources that nobody owns")?;

    let (give_up, stop, abandon) =
        (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
    let quota = Quota::new(config.instance_disks_bytes);
    let places = Places::new(Arc::clone(&room), max_vms, capacity);
    let machines = Machines::new(Arc::clone(&workshop), places, quota.clone(), abandon.clone());
    let instances_dir = config.data_dir.join("instances");
    let metrics = events.metrics().clone();
    let instances = Instances::new(
        Arc::clone(&store),
        Arc::new(machines),
        instances_dir,
        quota,
        metrics.clone(),
    );
    instances.recover().await.context("cannot end the instances of an earlier server")?;

    let left = store.end_open_sessions(crate::clock::now()).await;
    let left = left.context("cannot end the sessions of an earlier server")?;
    if left > 0 {
        tracing::warn!(sessions = left, "sessions ended with an earlier server");
    }
    let sessions = Sessions::new(Arc::clone(&store));

    let public_host = parts::public_host(&config, address);
    let scheduling = Scheduling::new(Arc::clone(&store));
    let uses = Uses::default();
    let retention = Retention::new(
        Arc::clone(&store),
        kept.clone(),
        sources.clone(),
        metrics.clone(),
        config.keep,
        parts::room(&config, registry.as_ref(), workshop.upstreams.clone()),
    );
    let router = api::router(ApiState {
        store: Arc::clone(&store),
        events,
        scheduler: Arc::new(scheduling.clone()),
        sources,
        limits: config.limits,
        tenants: config.tenants,
        public_host: public_host.clone(),
        ready: Arc::new(facilities),
        clock: api::system_clock(),
        instances: instances.clone(),
        sessions: sessions.clone(),
        kept: kept.clone(),
        retention: retention.clone(),
        backing: backing.clone(),
        vault,
        uses: uses.clone(),
        metrics_open: config.metrics_open,
    });
    let gateway = clients::router(GatewayState {
        backing,
        authorizer: Arc::new(parts::StoreAuthorizer(Arc::clone(&store), uses.clone())),
        keys: Arc::new(TokenKeys::load_or_create(&config.data_dir.join("registry-token.key"))?),
        public_url: format!("{scheme}://{public_host}").parse().context("--public-host")?,
    });
    let router =
        router.merge(gateway.route_layer(from_fn_with_state(metrics, metrics::http::count)));

    let longest = Duration::from_secs(config.max_queue_seconds.into());
    let dispatcher = Dispatcher::new(workshop, scheduling.clone(), room, owner, longest);
    let dispatcher = dispatcher.going_on(adopted);
    let builds = TaskTracker::new();
    builds.spawn(dispatcher.run(asked.stop.clone(), give_up.clone()));
    builds.close();
    let built = builds.clone();
    let running = instances.clone().run(stop.clone());
    let inside = sessions.clone().run(stop.clone());
    let noting = uses.run(store, stop.clone());
    let collecting = retention.run(stop.clone());
    let reserving = reserve.keep(stop.clone());
    let all = tokio::spawn(async move {
        tokio::join!(built.wait(), running, inside, collecting, noting, reserving);
        // After the builds, whose VMs it takes.
        kept.close().await;
    });
    let hang_up = CancellationToken::new();
    let serving = Connections::default().over(tls.clone()).serve(listener, router, hang_up.clone());
    let mut server = tokio::spawn(serving);
    if let Some(tls) = tls {
        signals::on_hang_up(move || reload(&tls), stop.clone())
            .context("cannot listen for SIGHUP")?;
    }
    tracing::info!(%address, scheme, max_vms = config.max_vms, max_vm_memory_mb = config.max_vm_memory_mb, data = %config.data_dir.display(), "kiln serves");
    if let Some(notify) = notify {
        // Nobody may be listening any more.
        let _ = writeln!(std::fs::File::from(notify), "ready {address}");
    }
    manager::ready(address);

    tokio::select! {
        () = asked.stop.cancelled() => {}
        ended = &mut server => {
            asked.stop.cancel();
            // Nobody can be told of a build's end any more.
            asked.hurry.cancel();
            tracing::error!(?ended, "the listener ended");
        }
    }
    instances.close();
    sessions.close();
    let seconds = config.drain_seconds;
    tracing::info!(
        builds = scheduling.running(),
        seconds,
        "draining; at the next signal the builds that run are given up"
    );
    let limit = Duration::from_secs(seconds.into());
    manager::draining(limit);
    match (drain::drain(&builds, limit, &asked.hurry).await, scheduling.running()) {
        (Drained::Done, _) | (_, 0) => tracing::info!("stopping"),
        (why, builds) => tracing::warn!(builds, ?why, "stopping; builds that run are given up"),
    }
    manager::stopping();
    give_up.cancel();
    stop.cancel();
    let finished = drain::finish(all, &abandon).await;
    hang_up.cancel();
    if tokio::time::timeout(HANG_UP, &mut server).await.is_err() {
        server.abort();
    }
    if let Some(registry) = registry {
        registry.stop().await;
    }
    finished
}

/// Traces, where the environment says whereto.
fn traces() -> anyhow::Result<Traces> {
    let Some(sender) = Sender::configured(|name| std::env::var(name).ok())? else {
        return Ok(Traces::default());
    };
    let (traces, ended) = Traces::collected();
    tokio::spawn(sender.run(ended));
    Ok(traces)
}

/// Certificates may have been renewed.
fn reload(tls: &Tls) {
    match tls.reload() {
        Ok(()) => tracing::info!("read certificate and key again"),
        Err(error) => {
            let error = crate::causes::chain(&error);
            tracing::error!(error, "certificate and key stay as they were");
        }
    }
}

#[allow(unsafe_code)]
fn take_descriptor(fd: RawFd) -> Result<OwnedFd, ConfigError> {
    let refused = || ConfigError::refused("notify-fd", fd, "an open descriptor from 3 on");
    if fd < 3 {
        return Err(refused());
    }
    if nix::fcntl::fcntl(
        // SAFETY: only asked whether it is open; nothing is kept.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .is_err()
    {
        return Err(refused());
    }
    // SAFETY: it is open, and the caller of the program gave it to us: nothing else in here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
