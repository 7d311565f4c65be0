//! The HTTP API: one file per verb.
//!
//! ```text
//! request ─▶ trace (id, span) ─▶ route ─▶ auth (Caller), rate ─▶ verb ─▶ store, events, scheduler
//! response ◀─ security headers ◀─ error (problem+json, whatever made it)
//! ```
//!
//! Nothing about a caller is believed because of its address or of a forwarding header: a caller
//! is the token that it shows. The shapes of JSON are in [`types`]; what a build is, is in
//! [`crate::build`].

mod auth;
mod body;
mod build_events;
mod cancel_build;
mod create_build;
pub mod error;
mod exec;
mod fields;
mod files;
mod gc;
mod get_build;
mod health;
pub mod instances;
mod kept;
mod layers;
mod limits;
mod list_builds;
mod metrics;
mod multipart;
pub(crate) mod openapi;
mod own_secrets;
mod query;
mod rates;
mod secrets;
mod sessions;
mod source;
mod tokens;
pub mod types;
mod uploads;
mod whole;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use bytes::Bytes;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;

pub use self::limits::{Limits, Maxima};
use self::rates::Rates;
pub use self::source::SOURCE_FILE;
use self::uploads::Uploads;
use crate::build::{BuildId, Millis, Tenant};
use crate::events::EventLog;
use crate::exec::{Entrance, Sessions};
use crate::gateway::Backing;
use crate::instances::Instances;
use crate::kept::Kept;
use crate::retention::Retention;
use crate::secrets::Vault;
use crate::sources::Sources;
use crate::store::Store;
use crate::token::Uses;

/// The API's routes, with a fallback for all others. A router without a fallback (the registry
/// gateway's) can be merged into it and is left alone by the API's layers.
pub fn router(state: ApiState) -> Router {
    let (routes, document) = routes().split_for_parts();
    let document = openapi::complete(document, &state.limits, &state.public_host);
    let uploads = Uploads::new(state.limits.max_uploads);
    let rates = Rates::new(state.limits.max_requests_per_second);
    let shared: Shared =
        Arc::new(Api { state, uploads, rates, keys_in_flight: Mutex::default(), document });
    let metrics = shared.state.events.metrics().clone();
    let routes = routes
        .fallback(error::no_such_route)
        .method_not_allowed_fallback(error::no_such_method)
        .with_state(shared)
        .layer(DefaultBodyLimit::max(MAX_BODY));
    layers::add(routes, metrics)
}

/// The document of a server with default settings, which is checked in.
pub fn document() -> String {
    let document = openapi::complete(routes().into_openapi(), &Limits::default(), openapi::HOST);
    String::from_utf8_lossy(&document).into_owned()
}

/// Every route, with its description.
fn routes() -> OpenApiRouter<Shared> {
    let unbounded = DefaultBodyLimit::disable;
    let create_instance =
        routes!(instances::create::create_instance).layer(DefaultBodyLimit::max(MAX_INSTANCE_BODY));
    let put_secret = routes!(secrets::put_secret).layer(DefaultBodyLimit::max(secrets::MAX_BODY));
    OpenApiRouter::with_openapi(openapi::base())
        .routes(routes!(health::health))
        .routes(routes!(health::ready))
        .routes(routes!(openapi::openapi))
        .routes(routes!(metrics::metrics))
        .routes(routes!(gc::collect_garbage))
        .routes(routes!(create_build::create_build).layer(unbounded()))
        .routes(routes!(list_builds::list_builds))
        .routes(routes!(get_build::get_build, cancel_build::cancel_build))
        .routes(routes!(build_events::build_events))
        .routes(routes!(exec::build_exec))
        .routes(routes!(exec::instance_exec))
        .routes(routes!(files::get_of_build))
        .routes(routes!(files::put_to_build).layer(unbounded()))
        .routes(routes!(files::get_of_instance))
        .routes(routes!(files::put_to_instance).layer(unbounded()))
        .routes(routes!(sessions::list_sessions))
        .routes(routes!(kept::list_kept))
        .routes(routes!(kept::extend_kept, kept::release_kept))
        .routes(create_instance)
        .routes(routes!(instances::list::list_instances))
        .routes(routes!(instances::get::get_instance))
        .routes(routes!(instances::delete::delete_instance))
        .routes(routes!(instances::logs::instance_logs))
        .routes(routes!(secrets::list_secrets))
        .routes(put_secret)
        .routes(routes!(secrets::delete_secret))
        .routes(routes!(tokens::create_token, tokens::list_tokens))
        .routes(routes!(tokens::revoke_token))
}

/// Most body bytes of a request that uploads no source.
const MAX_BODY: usize = 64 * 1024;

/// Of a request for an instance: a command and variables at their bounds, escaped.
const MAX_INSTANCE_BODY: usize = 4 * 1024 * 1024;

/// What the API stands on.
#[derive(Clone)]
pub struct ApiState {
    /// What survives.
    pub store: Arc<dyn Store>,
    /// The same store's events.
    pub events: EventLog,
    /// Who runs builds.
    pub scheduler: Arc<dyn Scheduler>,
    /// Where sources go.
    pub sources: Sources,
    /// What a request may ask for.
    pub limits: Limits,
    /// What some tenants may ask for, where that is less.
    pub tenants: BTreeMap<Tenant, Maxima>,
    /// `HOST:PORT` of the registry gateway as clients of this host reach it, for `image_ref`.
    pub public_host: String,
    /// Asked by `/ready`, after the store.
    pub ready: Arc<dyn Readiness>,
    /// The host's clock.
    pub clock: Clock,
    /// Who runs images.
    pub instances: Instances,
    /// Those who are in VMs.
    pub sessions: Sessions,
    /// Failed builds that can still be entered.
    pub kept: Kept,
    /// What removes what is old.
    pub retention: Retention,
    /// Where images are.
    pub backing: Backing,
    /// Seals secrets.
    pub vault: Arc<Vault>,
    /// When tokens were used.
    pub uses: Uses,
    /// Whether `/metrics` needs no token.
    pub metrics_open: bool,
}

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> Millis + Send + Sync>;

/// The clock of the system.
pub fn system_clock() -> Clock {
    Arc::new(|| jiff::Timestamp::now().as_millisecond())
}

/// Who runs builds: the queue.
#[async_trait]
pub trait Scheduler: Send + Sync + 'static {
    /// There is a new queued build.
    fn wake(&self);
    /// The way into a build's VM, while it has one that can be entered.
    fn entrance(&self, id: &BuildId) -> Option<Entrance>;
    /// Cancels a build that is claimed. Returns once the build is `cancelled`, or cannot be.
    async fn cancel(&self, id: &BuildId) -> CancelOutcome;
}

/// What became of a cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelOutcome {
    /// The build is `cancelled`, in the store.
    Cancelled,
    /// It was finished already.
    Finished,
    /// It is being published and will be finished soon.
    Publishing,
    /// No driver of this process has it.
    Unknown,
}

/// Whether builds can be taken and run now.
#[async_trait]
pub trait Readiness: Send + Sync + 'static {
    /// What there has to be, beside the store.
    async fn checks(&self) -> Vec<Check>;
}

/// Something that a server needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// In a word.
    pub name: &'static str,
    /// Why it is not there, for people; nothing that only operators may know.
    pub missing: Option<String>,
}

struct Api {
    state: ApiState,
    uploads: Arc<Uploads>,
    rates: Rates,
    /// Idempotency keys of submits that are being received now.
    keys_in_flight: Mutex<HashSet<(Tenant, String)>>,
    /// What GET `/openapi.json` answers.
    document: Bytes,
}

type Shared = Arc<Api>;

impl Api {
    /// What a tenant may ask for.
    fn limits_of(&self, tenant: &Tenant) -> Limits {
        let maxima = self.state.tenants.get(tenant);
        maxima.map_or(self.state.limits, |maxima| self.state.limits.within(maxima))
    }

    fn now(&self) -> Millis {
        (self.state.clock)()
    }
}
