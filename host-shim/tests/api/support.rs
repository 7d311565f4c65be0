//! A server for one test, and what its clients need.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use kiln::api::{
    ApiState, CancelOutcome, Check, Limits, Maxima, Readiness, Scheduler, router, system_clock,
};
use kiln::build::{BuildId, Change, Failure, FailureKind, Status, Tenant};
use kiln::events::{EventLog, payload};
use kiln::exec::{Door, Entrance, Sessions};
use kiln::instances::quota::Quota;
use kiln::instances::{End, Instances, Owner, Runner, Work};
use kiln::kept::Kept;
use kiln::retention::{Keep, Retention, Room};
use kiln::sources::Sources;
use kiln::store::sqlite::SqliteStore;
use kiln::store::{Claimed, Fence, Role, Store};
use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;

/// Of disks and logs of all instances.
pub const QUOTA: u64 = 64 * 1024;

/// For how long finished things stay.
pub const KEEP: Keep =
    Keep { sessions_days: 30, logs_days: 10, logs_bytes: 0, builds_days: 20, images_bytes: 0 };

pub const HOST: &str = "kiln.example:4973";

pub struct Server {
    pub url: String,
    pub store: Arc<dyn Store>,
    /// The same: once it is closed, the store fails.
    pub database: Arc<SqliteStore>,
    pub events: EventLog,
    pub scheduler: Arc<Small>,
    pub sources: PathBuf,
    pub http: reqwest::Client,
    pub runner: Arc<Puppet>,
    pub vault: Arc<kiln::secrets::Vault>,
    /// Where the database is.
    pub data: PathBuf,
    pub instances: Instances,
    pub quota: Quota,
    pub instances_dir: PathBuf,
    pub sessions: Sessions,
    pub kept: Kept,
    pub uses: kiln::token::Uses,
    /// To be served once more, in another way.
    pub app: axum::Router,
    task: tokio::task::JoinHandle<()>,
    undocumented: Arc<Mutex<Vec<String>>>,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        if !std::thread::panicking() {
            let undocumented = self.undocumented.lock().unwrap();
            assert!(undocumented.is_empty(), "not in the document: {undocumented:?}");
        }
    }
}

/// The document, and answers that are not in it.
#[derive(Clone)]
struct Watched(Arc<Value>, Arc<Mutex<Vec<String>>>);

/// Whatever a test provokes is to be in the document.
async fn documented(
    State(Watched(document, undocumented)): State<Watched>,
    request: Request,
    next: Next,
) -> axum::response::Response {
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let method = request.method().as_str().to_lowercase();
    let request_has_host = request.headers().get_all("host").iter().count() == 1;
    let response = next.run(request).await;
    let status = response.status();
    if let Some(path) = path
        && status != StatusCode::METHOD_NOT_ALLOWED
        // Refused before it is looked at.
        && request_has_host
    {
        let answers = &document["paths"][&path][&method]["responses"];
        if method != "head" && answers.get(status.as_str()).is_none() {
            undocumented.lock().unwrap().push(format!("{method} {path} {status}"));
        }
    }
    response
}

pub async fn server() -> Server {
    server_with(Limits::default(), Duration::from_mins(10)).await
}

/// A tenant that may ask for less than others.
pub const LIMITED: &str = "limited";

fn limited() -> Maxima {
    Maxima {
        max_source_mb: Some(1),
        max_timeout_seconds: Some(60),
        max_memory_mb: Some(512),
        max_cpus: Some(1),
        max_disk_gb: Some(2),
        max_queued: Some(2),
    }
}

pub async fn server_with(limits: Limits, quiet: Duration) -> Server {
    server_that(limits, quiet, false).await
}

pub async fn server_that(limits: Limits, quiet: Duration, metrics_open: bool) -> Server {
    // An error says that another test of this process has done so.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let database = Arc::new(SqliteStore::open(dir.path()).await.unwrap());
    let store: Arc<dyn Store> = database.clone();
    let events = EventLog::with_quiet(store.clone(), quiet);
    let scheduler = Arc::new(Small {
        events: events.clone(),
        claims: Mutex::default(),
        wakes: AtomicUsize::new(0),
        doors: Mutex::default(),
        checks: Mutex::new(vec![]),
    });
    let sources = dir.path().join("builds");
    let of_builds = Sources::new(sources.clone());
    let runner = Arc::new(Puppet::default());
    let instances_dir = dir.path().join("instances");
    let quota = Quota::new(QUOTA);
    let instances = Instances::new(
        store.clone(),
        runner.clone(),
        instances_dir.clone(),
        quota.clone(),
        events.metrics().clone(),
    );
    let registry = crate::registry::start().await;
    let vault = Arc::new(kiln::secrets::load_or_make(dir.path()).unwrap());
    let sessions = Sessions::with_ping(store.clone(), Duration::from_millis(100));
    // Two of each tenant.
    let kept = Kept::new(4);
    let uses = kiln::token::Uses::default();
    let app = router(ApiState {
        store: store.clone(),
        events: events.clone(),
        scheduler: scheduler.clone(),
        sources: of_builds.clone(),
        limits,
        tenants: [(Tenant::new(LIMITED).unwrap(), limited())].into(),
        public_host: HOST.into(),
        ready: scheduler.clone(),
        clock: system_clock(),
        instances: instances.clone(),
        sessions: sessions.clone(),
        kept: kept.clone(),
        retention: Retention::new(
            store.clone(),
            kept.clone(),
            of_builds,
            events.metrics().clone(),
            KEEP,
            Room::default(),
        ),
        backing: kiln::gateway::Backing::external(&registry, None).unwrap(),
        vault: vault.clone(),
        uses: uses.clone(),
        metrics_open,
    });
    let undocumented = Arc::<Mutex<Vec<String>>>::default();
    let document = serde_json::from_str(&kiln::api::document()).unwrap();
    let watched = Watched(Arc::new(document), undocumented.clone());
    let app = app.layer(from_fn_with_state(watched, documented));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let served = app.clone();
    let task = tokio::spawn(async move { axum::serve(listener, served).await.unwrap() });
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    Server {
        url,
        store,
        database,
        events,
        scheduler,
        sources,
        http,
        runner,
        vault,
        data: dir.path().to_owned(),
        instances,
        quota,
        instances_dir,
        sessions,
        kept,
        uses,
        app,
        task,
        undocumented,
        _dir: dir,
    }
}

/// A scheduler that runs nothing: tests claim and change builds by hand.
pub struct Small {
    events: EventLog,
    claims: Mutex<HashMap<BuildId, Fence>>,
    pub wakes: AtomicUsize,
    pub checks: Mutex<Vec<Check>>,
    doors: Mutex<HashMap<BuildId, Door>>,
}

#[async_trait]
impl Scheduler for Small {
    fn wake(&self) {
        self.wakes.fetch_add(1, Ordering::SeqCst);
    }

    fn entrance(&self, id: &BuildId) -> Option<Entrance> {
        self.door(id).entrance()
    }

    async fn cancel(&self, id: &BuildId) -> CancelOutcome {
        let fence = self.claims.lock().unwrap().get(id).copied();
        let Some(fence) = fence else { return CancelOutcome::Unknown };
        match self.change(id, fence, Change::Cancel, Some(Status::Cancelled)).await {
            Ok(_) => CancelOutcome::Cancelled,
            Err(kiln::store::StoreError::Refused(kiln::build::Refused::Publishing)) => {
                CancelOutcome::Publishing
            }
            Err(_) => CancelOutcome::Finished,
        }
    }
}

#[async_trait]
impl Readiness for Small {
    async fn checks(&self) -> Vec<Check> {
        self.checks.lock().unwrap().clone()
    }
}

impl Small {
    /// Into a build's VM.
    pub fn door(&self, id: &BuildId) -> Door {
        self.doors.lock().unwrap().entry(id.clone()).or_default().clone()
    }

    pub async fn claim(&self) -> Claimed {
        let event = payload::of_host(1, payload::status(Status::Building, None));
        let claimed = self.events.claim("test", 1_000, &[event]).await.unwrap().unwrap();
        self.claims.lock().unwrap().insert(claimed.build.id.clone(), claimed.fence);
        claimed
    }

    pub async fn change(
        &self,
        id: &BuildId,
        fence: Fence,
        change: Change,
        status: Option<Status>,
    ) -> Result<kiln::build::Build, kiln::store::StoreError> {
        let event = status.map(|s| payload::of_host(2_500, payload::status(s, None)));
        self.events.change(id, fence, change, 3_500, event.as_slice()).await
    }

    /// To `ready`, as a driver would.
    pub async fn publish(&self, claimed: &Claimed, digest: &str) {
        let (id, fence) = (&claimed.build.id, claimed.fence);
        self.change(id, fence, Change::Push, Some(Status::Pushing)).await.unwrap();
        self.change(id, fence, Change::Publish(digest.into()), None).await.unwrap();
        self.change(id, fence, Change::Finish, Some(Status::Ready)).await.unwrap();
    }

    pub async fn fail(&self, claimed: &Claimed) {
        let failure = Failure {
            step: Some(2),
            exit_code: Some(7),
            ..Failure::new(FailureKind::StepFailed, "make test failed")
        };
        let change = Change::Fail(failure);
        self.change(&claimed.build.id, claimed.fence, change, Some(Status::Failed)).await.unwrap();
    }
}

/// Runs instances as tests tell it to.
#[derive(Default)]
pub struct Puppet {
    strings: Mutex<HashMap<String, tokio::sync::mpsc::UnboundedSender<Pull>>>,
    begun: tokio::sync::Notify,
    /// What it was given, by the instance's name.
    pub work: Mutex<HashMap<String, Work>>,
}

/// What an instance does next.
pub enum Pull {
    Change(kiln::instances::Change),
    Print(Value),
    /// Opens its door, and tells.
    Open(Entrance, tokio::sync::oneshot::Sender<()>),
    End(End),
}

#[async_trait]
impl Runner for Puppet {
    async fn run(&self, owner: &mut Owner, work: Work) -> End {
        let (string, mut pulls) = tokio::sync::mpsc::unbounded_channel();
        let name = owner.instance().name.clone();
        std::fs::write(owner.dir().join("disk"), "a disk").unwrap();
        self.work.lock().unwrap().insert(name.clone(), work);
        self.strings.lock().unwrap().insert(name, string);
        self.begun.notify_waiters();
        let cancel = owner.cancel().clone();
        let mut opened = None;
        loop {
            let pull = tokio::select! {
                pull = pulls.recv() => pull.unwrap(),
                () = cancel.cancelled() => return End::exited(143),
            };
            match pull {
                Pull::Change(change) => owner.change(change).await.unwrap(),
                Pull::Open(entrance, told) => {
                    opened = Some(owner.door().open(entrance));
                    told.send(()).unwrap();
                }
                Pull::End(end) => {
                    drop(opened);
                    return end;
                }
                Pull::Print(line) => {
                    if let Err(error) = owner.print(&[line]).await {
                        let why = std::error::Error::source(&error).unwrap();
                        return End::failed(format!("{error}: {why}"));
                    }
                }
            }
        }
    }
}

impl Puppet {
    /// Makes an instance do something, once it has begun.
    pub async fn pull(&self, name: &str, pull: Pull) {
        loop {
            let begun = self.begun.notified();
            tokio::pin!(begun);
            begun.as_mut().enable();
            if let Some(string) = self.strings.lock().unwrap().get(name) {
                string.send(pull).ok().unwrap();
                return;
            }
            begun.await;
        }
    }
}

/// Somebody with a token.
pub struct Client<'a> {
    server: &'a Server,
    pub token: String,
}

impl Server {
    pub async fn client(&self, tenant: &str, role: Role) -> Client<'_> {
        let tenant = Tenant::new(tenant).unwrap();
        let (token, _) =
            kiln::token::create(&*self.store, tenant, role, None, None, 0).await.unwrap();
        Client { server: self, token }
    }

    pub fn anonymous(&self) -> Client<'_> {
        Client { server: self, token: String::new() }
    }

    /// Directories of sources that are there now.
    pub fn source_dirs(&self) -> usize {
        std::fs::read_dir(&self.sources).map_or(0, Iterator::count)
    }
}

impl Client<'_> {
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.server.http.request(method, format!("{}{path}", self.server.url));
        if self.token.is_empty() { request } else { request.bearer_auth(&self.token) }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server.url)
    }

    pub fn authorization(&self) -> Option<String> {
        (!self.token.is_empty()).then(|| format!("Bearer {}", self.token))
    }

    pub async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    pub async fn delete(&self, path: &str) -> Response {
        self.request(Method::DELETE, path).send().await.unwrap()
    }

    pub async fn post(&self, form: Form) -> Response {
        self.request(Method::POST, "/builds").multipart(form).send().await.unwrap()
    }

    /// Submits and returns the accepted build.
    pub async fn submit(&self, form: Form) -> Value {
        let response = self.post(form).await;
        assert_eq!(response.status(), StatusCode::ACCEPTED);
        response.json().await.unwrap()
    }

    pub async fn json(&self, path: &str) -> Value {
        let response = self.get(path).await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.json().await.unwrap()
    }
}

/// Bytes that begin as gzip does.
pub fn gzip(len: usize) -> Vec<u8> {
    let mut bytes = vec![0x1f, 0x8b];
    bytes.resize(len.max(2), 7);
    bytes
}

pub fn source() -> Part {
    Part::bytes(gzip(1000)).file_name("source.tar.gz")
}

pub fn form() -> Form {
    Form::new().part("source", source())
}

pub fn id_of(build: &Value) -> BuildId {
    BuildId::new(build["id"].as_str().unwrap()).unwrap()
}

/// Checks the shape of a refusal and returns its body.
pub async fn refusal(response: Response, status: u16, code: &str) -> Value {
    assert_eq!(response.status().as_u16(), status);
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    assert_eq!(response.headers()["cache-control"], "no-store");
    assert!(response.headers().contains_key("x-request-id"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["code"], code, "{body}");
    assert_eq!(body["type"], format!("urn:kiln:problem:{code}"));
    assert_eq!(body["status"], status);
    assert_eq!(body["detail"], body["message"]);
    assert!(
        !body["title"].as_str().unwrap().is_empty()
            && !body["message"].as_str().unwrap().is_empty()
    );
    body
}
