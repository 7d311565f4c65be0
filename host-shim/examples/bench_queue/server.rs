//! Kiln's API as `kiln serve` has it, over its store and its events, with nobody who runs builds.
//!
//! Orders, a line each: `token TENANT` is answered with a token; `append ID COUNT WIDTH` stores so many log lines at one
//! time, as the driver of a build does; `end ID` ends a build.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use async_trait::async_trait;
use kiln::api::{
    ApiState, CancelOutcome, Check, Limits, Readiness, Scheduler, router, system_clock,
};
use kiln::build::{BuildId, Status, Tenant};
use kiln::clock::now;
use kiln::config::LogFormat;
use kiln::events::{EventLog, payload};
use kiln::exec::{Entrance, Sessions};
use kiln::gateway::Backing;
use kiln::instances::quota::Quota;
use kiln::instances::{End, Instances, Owner, Runner, Work};
use kiln::kept::Kept;
use kiln::retention::{Keep, Retention, Room};
use kiln::serve::Connections;
use kiln::sources::Sources;
use kiln::store::sqlite::SqliteStore;
use kiln::store::{NewEvent, Role, Store};
use kiln::token::Uses;
use kiln_protocol::event::LogStream;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Serves until there are no more orders.
pub async fn serve(dir: &Path) -> anyhow::Result<()> {
    kiln::serve::log::start(LogFormat::Text);
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(dir).await?);
    let events = EventLog::new(Arc::clone(&store));
    let app = api(dir, &store, &events)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    say(&listener.local_addr()?.to_string())?;
    tokio::spawn(Connections::default().serve(listener, app, CancellationToken::new()));

    let (given, mut orders) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || std::io::stdin().lines().try_for_each(|order| given.send(order)));
    let mut agent_seq = 0;
    while let Some(order) = orders.recv().await.transpose()? {
        let words: Vec<_> = order.split(' ').collect();
        match words.as_slice() {
            ["token", tenant] => {
                let tenant = Tenant::new(*tenant)?;
                let (token, _) =
                    kiln::token::create(&*store, tenant, Role::Tenant, None, None, now()).await?;
                say(&token)?;
            }
            ["append", id, count, width] => {
                let (count, width): (u64, usize) = (count.parse()?, width.parse()?);
                let lines = (agent_seq + 1..=agent_seq + count).map(|seq| line(seq, width));
                let lines: Vec<_> = lines.collect();
                agent_seq += count;
                events.append(&BuildId::new(*id)?, &lines).await?;
            }
            ["end", id] => {
                let told = payload::of_host(now(), payload::status(Status::Cancelled, None));
                events.cancel_queued(&BuildId::new(*id)?, now(), &[told]).await?;
            }
            _ => bail!("no such order: {order}"),
        }
    }
    Ok(())
}

fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    out.flush()
}

fn line(seq: u64, width: usize) -> NewEvent {
    let content = format!("{seq:0>width$}");
    let payload = payload::log(LogStream::Stdout, Some(1), false, content.as_bytes());
    NewEvent { at: now(), agent_seq: Some(seq), payload }
}

fn api(dir: &Path, store: &Arc<dyn Store>, events: &EventLog) -> anyhow::Result<axum::Router> {
    let (store, events) = (Arc::clone(store), events.clone());
    let sources = Sources::new(dir.join("builds"));
    let (kept, keep) = (Kept::new(1), Keep::default());
    let metrics = events.metrics().clone();
    let retention = Retention::new(
        Arc::clone(&store),
        kept.clone(),
        sources.clone(),
        metrics,
        keep,
        Room::default(),
    );
    let instances_dir = dir.join("instances");
    let quota = Quota::new(1 << 30);
    let instances = Instances::new(
        Arc::clone(&store),
        Arc::new(Nobody),
        instances_dir,
        quota,
        kiln::metrics::Metrics::default(),
    );
    Ok(router(ApiState {
        sessions: Sessions::new(Arc::clone(&store)),
        vault: Arc::new(kiln::secrets::load_or_make(dir).context("no key")?),
        backing: Backing::external("http://127.0.0.1:9", None)?,
        store,
        events,
        scheduler: Arc::new(Nobody),
        sources,
        limits: Limits::default(),
        tenants: [].into(),
        public_host: "127.0.0.1:9".into(),
        ready: Arc::new(Nobody),
        clock: system_clock(),
        instances,
        kept,
        retention,
        uses: Uses::default(),
        metrics_open: false,
    }))
}

/// Runs nothing.
struct Nobody;

#[async_trait]
impl Scheduler for Nobody {
    fn wake(&self) {}

    fn entrance(&self, _: &BuildId) -> Option<Entrance> {
        None
    }

    async fn cancel(&self, _: &BuildId) -> CancelOutcome {
        CancelOutcome::Unknown
    }
}

#[async_trait]
impl Readiness for Nobody {
    async fn checks(&self) -> Vec<Check> {
        vec![]
    }
}

#[async_trait]
impl Runner for Nobody {
    async fn run(&self, _: &mut Owner, _: Work) -> End {
        End::failed("nothing runs here")
    }
}
