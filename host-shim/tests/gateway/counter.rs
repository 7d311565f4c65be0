//! Stands between a gateway and its registry, and counts the bytes of every request's body. One that moves uploads has them go on at
//! paths of its own, as some registries do.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use futures_util::TryStreamExt;
use http::{Method, header};
use tokio::net::TcpListener;

use crate::support::http;

/// A request that came by.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub bytes: usize,
}

#[derive(Clone)]
pub struct Counter {
    pub url: String,
    client: reqwest::Client,
    moves_uploads: bool,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Counter {
    /// Before the registry on this Unix socket.
    pub async fn start(socket: &Path) -> Self {
        Self::start_with(socket, false).await
    }

    pub async fn start_with(socket: &Path, moves_uploads: bool) -> Self {
        let _ = http();
        let client = reqwest::Client::builder().unix_socket(socket).no_proxy().build().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let counter = Self { url, client, moves_uploads, seen: Arc::default() };
        let app = Router::new().fallback(pass).with_state(counter.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        counter
    }

    /// What came by since it was asked last.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes of bodies that were sent for blobs.
pub fn of_blobs(seen: &[Seen]) -> usize {
    seen.iter().filter(|seen| seen.path.contains("/blobs/")).map(|seen| seen.bytes).sum()
}

async fn pass(State(counter): State<Counter>, request: Request) -> Response {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let at = {
        let mut seen = counter.lock();
        seen.push(Seen { method: parts.method.clone(), path, bytes: 0 });
        seen.len() - 1
    };
    let has_body = parts.headers.contains_key(header::TRANSFER_ENCODING)
        || parts.headers.get(header::CONTENT_LENGTH).is_some_and(|length| length != "0");
    for header in [header::HOST, header::TRANSFER_ENCODING, header::CONNECTION] {
        parts.headers.remove(header);
    }
    let uri = parts.uri.to_string();
    let url = match uri.strip_prefix("/takes/") {
        Some(moved) => format!("http://registry/v2/{}", moved.replace("/here/", "/blobs/uploads/")),
        None => format!("http://registry{uri}"),
    };
    let mut on = counter.client.request(parts.method, url).headers(parts.headers);
    if has_body {
        let counter = counter.clone();
        let count = move |bytes: &bytes::Bytes| counter.lock()[at].bytes += bytes.len();
        let body = body.into_data_stream().inspect_ok(count);
        on = on.body(reqwest::Body::wrap_stream(body));
    }
    let answer = on.send().await.unwrap();
    let mut to = Response::builder().status(answer.status());
    to.headers_mut().unwrap().extend(answer.headers().clone());
    if counter.moves_uploads
        && let Some(location) = to.headers_mut().unwrap().get_mut(header::LOCATION)
    {
        let text = location.to_str().unwrap();
        if let Some((name, rest)) = text.strip_prefix("/v2/").unwrap().split_once("/blobs/uploads/")
        {
            *location = format!("/takes/{name}/here/{rest}").parse().unwrap();
        }
    }
    to.body(Body::from_stream(answer.bytes_stream())).unwrap()
}
