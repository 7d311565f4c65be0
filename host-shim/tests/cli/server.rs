//! A small server that speaks the builds API: what it answers is scripted, what it is asked is kept.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Multipart, Path, Query, State};
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// How a scripted stream ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ending {
    Close,
    Abort,
    Hang,
}

/// What DELETE does.
#[derive(Clone, Debug, Default)]
pub enum Delete {
    /// 204.
    #[default]
    Cancel,
    /// Another answer.
    Refuse((StatusCode, Value)),
    /// No answer.
    Hang,
}

/// What the server says, and what it was told.
#[derive(Debug, Default)]
pub struct Script {
    /// One per connection, in order; after the last one the last is repeated.
    pub streams: VecDeque<(String, Option<Ending>)>,
    /// Answers to GET of a build.
    pub build: Value,
    /// Answer to POST, if not 202.
    pub refuse_post: Option<(StatusCode, Value)>,
    /// What DELETE does.
    pub refuse_delete: Delete,
    /// Parts of the form.
    pub parts: BTreeMap<String, Vec<u8>>,
    /// `Last-Event-ID` and `follow` of every connection.
    pub connections: Vec<(Option<String>, String)>,
    /// Every DELETE.
    pub deleted: Vec<String>,
    /// `Authorization` of the latest request.
    pub authorization: Option<String>,
    /// Bytes of a source that is counted, not kept; by the process whose memory is watched.
    pub watch: Option<u32>,
    /// A file that is written to when the first of the source is here.
    pub meddle: Option<std::path::PathBuf>,
    /// Peak resident memory of the watched process, in kB, when its source was complete.
    pub peak_kb: Option<u64>,
    pub source_bytes: u64,
}

#[derive(Clone, Debug)]
pub struct Server {
    pub url: String,
    script: Arc<Mutex<Script>>,
    /// Something was asked.
    pub asked: Arc<Notify>,
}

impl Server {
    pub async fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server =
            Self { url, script: Arc::new(Mutex::new(script)), asked: Arc::new(Notify::new()) };
        let router = Router::new()
            .route("/builds", get(list).post(create))
            .route("/builds/{id}", get(show).delete(cancel))
            .route("/builds/{id}/events", get(events))
            .route("/instances", get(list_instances).post(create_instance))
            .route("/instances/{id}", axum::routing::delete(delete_instance))
            .route("/instances/{id}/logs", get(events))
            .route("/gc", axum::routing::post(collect))
            .route("/tokens", get(tokens).post(create_token))
            .route("/tokens/{id}", axum::routing::delete(revoke_token))
            .layer(DefaultBodyLimit::disable())
            .layer(axum::middleware::from_fn_with_state(server.clone(), keep_authorization))
            .with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        server
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// Waits until what was asked is as wanted.
    pub async fn until(&self, wanted: impl Fn(&Script) -> bool) {
        loop {
            let asked = self.asked.notified();
            if wanted(&self.script()) {
                return;
            }
            asked.await;
        }
    }
}

pub fn problem(status: StatusCode, detail: &str) -> (StatusCode, Value) {
    (
        status,
        json!({"type": "about:blank", "title": "t", "status": status.as_u16(), "detail": detail}),
    )
}

/// Blocks of SSE, numbered from `first`.
pub fn sse(first: u64, events: &[Value]) -> String {
    let blocks = (first..).zip(events).map(|(id, event)| {
        let retry = if id == 1 { "retry: 100\n" } else { "" };
        let kind = event["type"].as_str().unwrap();
        format!("{retry}id: {id}\nevent: {kind}\ndata: {event}\n\n")
    });
    blocks.collect::<Vec<_>>().concat()
}

async fn keep_authorization(
    State(server): State<Server>,
    request: Request<Body>,
    next: axum::middleware::Next,
) -> Response {
    let value = request.headers().get("authorization").map(|v| v.to_str().unwrap().to_owned());
    server.script().authorization = value;
    server.asked.notify_waiters();
    next.run(request).await
}

async fn create(State(server): State<Server>, mut form: Multipart) -> Response {
    let refuse = server.script().refuse_post.clone();
    if let Some((StatusCode::UNAUTHORIZED, body)) = refuse {
        return refusal(StatusCode::UNAUTHORIZED, &body);
    }
    // An error is a client that went away.
    while let Ok(Some(mut field)) = form.next_field().await {
        let name = field.name().unwrap().to_owned();
        let mut bytes = vec![];
        loop {
            match field.chunk().await {
                Ok(Some(chunk)) => {
                    let mut script = server.script();
                    if script.watch.is_some() && name == "source" {
                        script.source_bytes += chunk.len() as u64;
                        if let Some(path) = script.meddle.take() {
                            let file = std::fs::File::options().append(true).open(path);
                            file.unwrap().write_all(b"more").unwrap();
                        }
                    } else {
                        bytes.extend_from_slice(&chunk);
                    }
                    server.asked.notify_waiters();
                }
                Ok(None) => break,
                Err(_) => return StatusCode::BAD_REQUEST.into_response(),
            }
        }
        server.script().parts.insert(name, bytes);
    }
    // Only now, so that a connection with unread bytes does not lose the answer.
    if let Some((status, body)) = refuse {
        return refusal(status, &body);
    }
    let mut script = server.script();
    // The client waits for the answer: its peak so far is that of the upload.
    script.peak_kb = script.watch.map(peak_kb);
    let body = json!({"id": "b1", "status": "queued", "created_at": "2026-01-01T00:00:00Z"});
    (StatusCode::ACCEPTED, axum::Json(body)).into_response()
}

fn peak_kb(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

async fn events(
    State(server): State<Server>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    let mut script = server.script();
    let last = headers.get("last-event-id").map(|v| v.to_str().unwrap().to_owned());
    script.connections.push((last, query["follow"].clone()));
    server.asked.notify_waiters();
    let (text, ending) = match script.streams.len() {
        0 => return not_found(),
        1 => script.streams[0].clone(),
        _ => script.streams.pop_front().unwrap(),
    };
    let text = stream::iter([Ok(Bytes::from(text))]);
    let body = match ending.unwrap_or(Ending::Close) {
        Ending::Close => Body::from_stream(text),
        Ending::Abort => Body::from_stream(text.chain(stream::once(async {
            // What was written goes out while this waits.
            tokio::task::yield_now().await;
            Err(std::io::Error::other("cut"))
        }))),
        Ending::Hang => Body::from_stream(
            text.map(|part: Result<_, std::io::Error>| Ok::<_, Infallible>(part.unwrap()))
                .chain(stream::pending()),
        ),
    };
    ([("content-type", "text/event-stream")], body).into_response()
}

async fn show(State(server): State<Server>, Path(id): Path<String>) -> Response {
    if id == "b1" {
        axum::Json(server.script().build.clone()).into_response()
    } else {
        let (status, body) = problem(StatusCode::NOT_FOUND, "there is no build of that id");
        refusal(status, &body)
    }
}

async fn cancel(State(server): State<Server>, Path(id): Path<String>) -> Response {
    let refuse = {
        let mut script = server.script();
        script.deleted.push(id);
        script.refuse_delete.clone()
    };
    server.asked.notify_waiters();
    match refuse {
        Delete::Cancel => StatusCode::NO_CONTENT.into_response(),
        Delete::Refuse((status, body)) => refusal(status, &body),
        Delete::Hang => std::future::pending().await,
    }
}

/// 250 builds, in pages.
async fn list(
    State(server): State<Server>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    if let Some((StatusCode::UNAUTHORIZED, body)) = server.script().refuse_post.clone() {
        return refusal(StatusCode::UNAUTHORIZED, &body);
    }
    let start: usize = query.get("cursor").map_or(0, |cursor| cursor.parse().unwrap());
    let limit: usize = query["limit"].parse().unwrap();
    assert!((1..=200).contains(&limit), "as the API has it");
    let end = (start + limit).min(250);
    let status = query.get("status").map_or("ready", String::as_str);
    let builds: Vec<_> =
        (start..end).map(|n| json!({"id": format!("b{n}"), "status": status})).collect();
    if end < 250 {
        let link = format!("</builds?limit={limit}&cursor={end}>; rel=\"next\"");
        ([("link", link)], axum::Json(builds)).into_response()
    } else {
        axum::Json(builds).into_response()
    }
}

async fn list_instances(Query(query): Query<BTreeMap<String, String>>) -> axum::Json<Value> {
    let all = [
        json!({"id": "i2", "name": "web", "state": "Running", "image": "app\u{1b}[2J"}),
        json!({"id": "i1", "name": "db", "state": "Stopped", "exit_code": 3, "image": "db"}),
    ];
    let wanted = |i: &Value| query.get("state").is_none_or(|state| i["state"] == **state);
    axum::Json(all.into_iter().filter(wanted).collect())
}

async fn create_instance() -> Response {
    (StatusCode::CREATED, axum::Json(json!({"id": "i1", "state": "Created"}))).into_response()
}

/// There is one.
async fn delete_instance(server: State<Server>, id: Path<String>) -> Response {
    if *id == "i1" { cancel(server, id).await } else { not_found() }
}

/// For who may.
async fn collect(State(server): State<Server>) -> Response {
    if let Some((status, body)) = server.script().refuse_post.clone() {
        return refusal(status, &body);
    }
    let removed =
        json!({"log_events_removed": 1234, "log_bytes_removed": 2048, "builds_removed": 1, "x": 1});
    axum::Json(removed).into_response()
}

async fn tokens() -> axum::Json<Value> {
    axum::Json(json!([{"id": "t1", "tenant": "dev", "role": "admin", "name": "ci\u{1b}[2J"}]))
}

async fn create_token(axum::Json(body): axum::Json<Value>) -> Response {
    let made = json!({"id": "t2", "token": format!("kiln_{}", body["tenant"].as_str().unwrap()), "asked": body});
    let expected = json!({"tenant": "dev", "role": "reader", "ttl_seconds": 1800, "name": "n"});
    let status = if body == expected { StatusCode::CREATED } else { StatusCode::BAD_REQUEST };
    (status, axum::Json(made)).into_response()
}

async fn revoke_token(Path(id): Path<String>) -> Response {
    if id == "t1" { StatusCode::NO_CONTENT.into_response() } else { not_found() }
}

fn not_found() -> Response {
    let (status, body) = problem(StatusCode::NOT_FOUND, "there is no such thing");
    refusal(status, &body)
}

fn refusal(status: StatusCode, body: &Value) -> Response {
    (status, [("content-type", "application/problem+json")], body.to_string()).into_response()
}
