//! The one HTTP client that all client commands share.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use reqwest::header::{
    ACCEPT, CONNECTION, CONTENT_TYPE, LINK, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION, TE, UPGRADE,
};
use reqwest::{Certificate, Method, RequestBuilder, Response, StatusCode, Upgraded, redirect};
use serde::Deserialize;
use serde_json::Value;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use url::{Host, Url};

use super::error::CliError;

/// For a TCP and TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For a whole call that is answered at once.
const CALL_TIMEOUT: Duration = Duration::from_mins(1);
/// For a cancellation, which is answered once the VM has stopped.
const CANCEL_TIMEOUT: Duration = Duration::from_mins(2);
/// For a round of retention, which is answered once all is removed.
const ROUND_TIMEOUT: Duration = Duration::from_hours(1);
/// Most bytes of an answer: a page of 200 builds, each with its provenance.
const MAX_ANSWER: usize = 32 * 1024 * 1024;
/// Most bytes of an error's answer.
const MAX_PROBLEM: usize = 64 * 1024;

/// Where the server is and who asks.
#[derive(Clone, Debug, clap::Args)]
pub struct Connect {
    /// The server
    #[arg(long, global = true, env = "KILN_URL", default_value = "http://127.0.0.1:4973")]
    pub url: String,
    /// An API token, as `kiln token create` prints it
    #[arg(long, global = true, env = "KILN_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Certificates (PEM) that the server's is to come from, instead of the system's
    #[arg(long, global = true, env = "KILN_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

/// A call that did not work.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No answer.
    #[error("cannot reach {url}: {cause}")]
    Unreachable {
        /// The server.
        url: String,
        /// The innermost reason.
        cause: String,
    },
    /// An answer that says no.
    #[error("{detail}")]
    Refused {
        /// HTTP's status.
        status: StatusCode,
        /// The server's words.
        detail: String,
    },
    /// An answer that is not the API's.
    #[error("{url} does not answer like a Kiln server: {cause}")]
    Strange {
        /// The server.
        url: String,
        /// What is wrong with it.
        cause: String,
    },
}

impl CallError {
    /// Whether the same call may work later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            Self::Strange { .. } => false,
        }
    }

    /// HTTP's status, where there was an answer.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

impl From<CallError> for CliError {
    fn from(error: CallError) -> Self {
        let text = error.to_string();
        match error {
            CallError::Unreachable { .. } => {
                Self::host(text).hint("is `kiln serve` running, and --url or KILN_URL right?")
            }
            CallError::Strange { .. } => Self::host(text).hint("check --url or KILN_URL"),
            CallError::Refused { status, .. } => match status {
                StatusCode::UNAUTHORIZED => {
                    Self::host(text).hint("give a valid token with --token or KILN_TOKEN")
                }
                StatusCode::FORBIDDEN => Self::host(text),
                StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => Self::usage(text),
                status if status.is_server_error() => Self::host(text),
                _ => Self::failed(text),
            },
        }
    }
}

/// Most bytes of a message that comes over a WebSocket: the server's pieces are of 64 KiB.
const MAX_MESSAGE: usize = 1024 * 1024;

/// A WebSocket to the server.
pub type Socket = WebSocketStream<Upgraded>;

/// A page of a list.
#[derive(Debug)]
pub struct Page {
    /// Its entries.
    pub items: Vec<Value>,
    /// For the next page.
    pub cursor: Option<String>,
}

/// A client of one server.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    token: Option<String>,
}

impl Client {
    /// A client; connects with the first call.
    pub fn new(connect: &Connect) -> Result<Self, CliError> {
        let base = Url::parse(&connect.url)
            .map_err(|e| CliError::usage(format!("the server's URL {:?}: {e}", connect.url)))?;
        let is_http = matches!(base.scheme(), "http" | "https");
        if !is_http || base.host_str().is_none_or(str::is_empty) {
            return Err(CliError::usage(format!(
                "the server's URL {:?} is not of the form http://HOST:PORT",
                connect.url
            )));
        }
        let token = connect.token.clone().filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(CliError::usage("the token holds characters that no token has"));
        }
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            // The API has none, and a token must not follow one.
            .redirect(redirect::Policy::none());
        if let Some(file) = &connect.ca_file {
            http = http.tls_certs_only(authorities(file)?);
        }
        if is_loopback(&base) {
            http = http.no_proxy();
        }
        let http = http
            .build()
            .map_err(|e| CliError::failed(format!("cannot set up HTTP: {}", innermost(&e))))?;
        Ok(Self { http, base, token })
    }

    /// The build of that id, as the API shows it.
    pub async fn build(&self, id: &str) -> Result<Value, CallError> {
        self.call(self.request(Method::GET, &["builds", id])).await
    }

    /// A page of builds, newest first.
    pub async fn builds(
        &self,
        status: Option<&str>,
        limit: usize,
        cursor: Option<&str>,
    ) -> Result<Page, CallError> {
        let mut query = vec![("limit", limit.to_string())];
        query.extend(status.map(|status| ("status", status.to_owned())));
        query.extend(cursor.map(|cursor| ("cursor", cursor.to_owned())));
        self.page(&["builds"], query).await
    }

    /// A page of sessions, newest first, of one `build` or `instance` where one is named.
    pub async fn sessions(
        &self,
        of: Option<(&str, &str)>,
        limit: usize,
        cursor: Option<&str>,
    ) -> Result<Page, CallError> {
        let mut query = vec![("limit", limit.to_string())];
        query.extend(of.map(|(kind, id)| (kind, id.to_owned())));
        query.extend(cursor.map(|cursor| ("cursor", cursor.to_owned())));
        self.page(&["sessions"], query).await
    }

    async fn page(&self, path: &[&str], query: Vec<(&str, String)>) -> Result<Page, CallError> {
        let mut url = self.url(path);
        url.query_pairs_mut().extend_pairs(query);
        let response = self.send(self.http.get(url).timeout(CALL_TIMEOUT)).await?;
        let links: Vec<_> =
            response.headers().get_all(LINK).iter().filter_map(|v| v.to_str().ok()).collect();
        // Only the cursor is taken from a link, so that a token never goes where a link leads.
        let cursor = links.iter().find_map(|link| next_cursor(&self.base, link));
        Ok(Page { items: self.json(response).await?, cursor })
    }

    /// Submits a build. The caller sees to the time.
    pub async fn submit(&self, form: reqwest::multipart::Form) -> Result<Value, CallError> {
        let request = self.http.post(self.url(&["builds"])).multipart(form);
        let response = self.send(request).await?;
        self.json(response).await
    }

    /// Cancels a build; returns once it is cancelled.
    pub async fn cancel(&self, id: &str) -> Result<(), CallError> {
        let request = self.request(Method::DELETE, &["builds", id]).timeout(CANCEL_TIMEOUT);
        self.send(request).await.map(drop)
    }

    /// Has the server remove what it is not to keep; returns once that is done.
    pub async fn collect_garbage(&self) -> Result<Value, CallError> {
        self.call(self.request(Method::POST, &["gc"]).timeout(ROUND_TIMEOUT)).await
    }

    /// Opens a build's stream of events. The caller sees to the time between two of them.
    pub async fn events(
        &self,
        id: &str,
        follow: bool,
        after: Option<&str>,
    ) -> Result<Response, CallError> {
        let mut url = self.url(&["builds", id, "events"]);
        url.query_pairs_mut().append_pair("follow", if follow { "true" } else { "false" });
        self.stream(url, after).await
    }

    /// Instances, newest first, as the API shows them.
    pub async fn instances(&self, state: Option<&str>) -> Result<Vec<Value>, CallError> {
        let mut url = self.url(&["instances"]);
        if let Some(state) = state {
            url.query_pairs_mut().append_pair("state", state);
        }
        self.call(self.http.get(url).timeout(CALL_TIMEOUT)).await
    }

    /// Opens the stream of what an instance prints: what there is, or up to its end.
    pub async fn instance_log(
        &self,
        id: &str,
        follow: bool,
        after: Option<&str>,
    ) -> Result<Response, CallError> {
        let mut url = self.url(&["instances", id, "logs"]);
        let follow = if follow { "true" } else { "false" };
        url.query_pairs_mut().append_pair("follow", follow).append_pair("format", "events");
        self.stream(url, after).await
    }

    /// Stops and deletes an instance; returns once nothing of it is left.
    pub async fn delete_instance(&self, id: &str) -> Result<(), CallError> {
        let request = self.request(Method::DELETE, &["instances", id]).timeout(CANCEL_TIMEOUT);
        self.send(request).await.map(drop)
    }

    /// Opens a WebSocket (RFC 6455) at a path below the server.
    pub async fn websocket(&self, path: &[&str]) -> Result<Socket, CallError> {
        let key = generate_key();
        let request = self
            .http
            .get(self.url(path))
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_VERSION, "13")
            .header(SEC_WEBSOCKET_KEY, &key);
        let opened = tokio::time::timeout(CALL_TIMEOUT, self.send(request)).await;
        let response =
            opened.unwrap_or_else(|_| Err(self.unreachable("it does not answer".into())))?;
        let accepted = response.headers().get(SEC_WEBSOCKET_ACCEPT);
        let ours = accepted.is_some_and(|value| *value == derive_accept_key(key.as_bytes()));
        if response.status() != StatusCode::SWITCHING_PROTOCOLS || !ours {
            return Err(self.strange("it does not change to WebSocket".into()));
        }
        let stream = response.upgrade().await.map_err(|e| self.unreachable(innermost(&e)))?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE))
            .write_buffer_size(0);
        Ok(WebSocketStream::from_raw_socket(stream, Role::Client, Some(config)).await)
    }

    async fn stream(&self, url: Url, after: Option<&str>) -> Result<Response, CallError> {
        let mut request = self.http.get(url).header(ACCEPT, "text/event-stream");
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let opened = tokio::time::timeout(CALL_TIMEOUT, self.send(request)).await;
        let response =
            opened.unwrap_or_else(|_| Err(self.unreachable("it does not answer".into())))?;
        match media_type(&response) {
            Some("text/event-stream") => Ok(response),
            other => {
                let other = other.unwrap_or("something of no type").to_owned();
                Err(self.strange(format!("it sends {other} and no events")))
            }
        }
    }

    /// `GET` of a path below the server, as JSON.
    pub async fn get<T: for<'de> Deserialize<'de>>(&self, path: &[&str]) -> Result<T, CallError> {
        self.call(self.request(Method::GET, path)).await
    }

    /// `POST` of JSON, with JSON as its answer.
    pub async fn post<T: for<'de> Deserialize<'de>>(
        &self,
        path: &[&str],
        body: &Value,
    ) -> Result<T, CallError> {
        self.call(self.request(Method::POST, path).json(body)).await
    }

    /// `PUT` of bytes to a path below the server.
    pub async fn put(&self, path: &[&str], body: Vec<u8>) -> Result<(), CallError> {
        self.send(self.request(Method::PUT, path).body(body)).await.map(drop)
    }

    /// Opens a body of any length, with trailers. The caller sees to the time.
    pub async fn download(
        &self,
        path: &[&str],
        query: Vec<(&str, String)>,
    ) -> Result<Response, CallError> {
        let mut url = self.url(path);
        url.query_pairs_mut().extend_pairs(query);
        self.send(self.http.get(url).header(TE, "trailers")).await
    }

    /// `PUT` of a body of any length. The caller sees to the time.
    pub async fn upload(
        &self,
        path: &[&str],
        query: Vec<(&str, String)>,
        body: reqwest::Body,
    ) -> Result<(), CallError> {
        let mut url = self.url(path);
        url.query_pairs_mut().extend_pairs(query);
        self.send(self.http.put(url).body(body)).await.map(drop)
    }

    /// `DELETE` of a path below the server.
    pub async fn delete(&self, path: &[&str]) -> Result<(), CallError> {
        self.send(self.request(Method::DELETE, path)).await.map(drop)
    }

    fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        self.http.request(method, self.url(path)).timeout(CALL_TIMEOUT)
    }

    /// A URL below the server; a segment cannot lead elsewhere.
    fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.base.clone();
        url.set_query(None);
        url.set_fragment(None);
        if let Ok(mut path) = url.path_segments_mut() {
            // `url` drops a segment that is `.` or `..`: such an id is nobody's.
            let safe = segments.iter().map(|s| if matches!(*s, "." | "..") { "-" } else { s });
            path.pop_if_empty().extend(safe);
        }
        url
    }

    async fn call<T: for<'de> Deserialize<'de>>(
        &self,
        request: RequestBuilder,
    ) -> Result<T, CallError> {
        let response = self.send(request).await?;
        self.json(response).await
    }

    async fn send(&self, mut request: RequestBuilder) -> Result<Response, CallError> {
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let response = request.send().await.map_err(|e| self.unreachable(innermost(&e)))?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        if status.is_redirection() {
            return Err(self.strange(format!("it redirects ({status})")));
        }
        // A web server has nothing at most paths, and no methods but GET: those are not Kiln's words. The
        // other statuses may come from a proxy on the way, and say enough.
        let words = media_type(&response) == Some("application/problem+json");
        let nobodys = [
            StatusCode::BAD_REQUEST,
            StatusCode::NOT_FOUND,
            StatusCode::METHOD_NOT_ALLOWED,
            StatusCode::NOT_IMPLEMENTED,
        ];
        if !words && nobodys.contains(&status) {
            return Err(self.strange(format!("it answers {status} and no more")));
        }
        // The status says enough where the answer cannot be read.
        let body = self.body(response, MAX_PROBLEM).await.unwrap_or_default();
        Err(CallError::Refused { status, detail: problem(status, &body) })
    }

    async fn json<T: for<'de> Deserialize<'de>>(&self, response: Response) -> Result<T, CallError> {
        let body = self.body(response, MAX_ANSWER).await?;
        serde_json::from_slice(&body).map_err(|e| self.strange(e.to_string()))
    }

    async fn body(&self, response: Response, limit: usize) -> Result<Vec<u8>, CallError> {
        let mut body = vec![];
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            let chunk: Bytes = chunk.map_err(|e| self.unreachable(innermost(&e)))?;
            if body.len() + chunk.len() > limit {
                return Err(self.strange(format!("an answer of more than {limit} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// The error of a server that is not there.
    pub fn unreachable(&self, cause: String) -> CallError {
        CallError::Unreachable { url: self.shown(), cause }
    }

    fn strange(&self, cause: String) -> CallError {
        CallError::Strange { url: self.shown(), cause }
    }

    /// The URL without what may be secret in it.
    fn shown(&self) -> String {
        self.base.origin().ascii_serialization()
    }
}

/// What an answer holds, without parameters.
fn media_type(response: &Response) -> Option<&str> {
    let value = response.headers().get(CONTENT_TYPE)?.to_str().ok()?;
    value.split(';').next().map(str::trim)
}

/// A problem's words: RFC 9457's `detail`, hypeman's `message`, or the status.
fn problem(status: StatusCode, body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Problem {
        detail: Option<String>,
        message: Option<String>,
        title: Option<String>,
    }
    let problem: Option<Problem> = serde_json::from_slice(body).ok();
    problem
        .and_then(|p| p.detail.or(p.message).or(p.title))
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| format!("the server answers {status}"))
}

/// The cursor of an RFC 8288 link to the next page.
fn next_cursor(base: &Url, header: &str) -> Option<String> {
    header.split(',').find_map(|link| {
        let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next =
            parameters.split(';').any(|p| matches!(p.trim(), "rel=\"next\"" | "rel=next"));
        let url = base.join(target).ok().filter(|_| is_next)?;
        url.query_pairs().find(|(key, _)| key == "cursor").map(|(_, value)| value.into_owned())
    })
}

/// The certificates in a file.
fn authorities(file: &Path) -> Result<Vec<Certificate>, CliError> {
    let refused = |why: String| CliError::usage(format!("--ca-file {}: {why}", file.display()));
    let pem = std::fs::read(file).map_err(|error| refused(error.to_string()))?;
    let all = Certificate::from_pem_bundle(&pem).map_err(|error| refused(innermost(&error)))?;
    if all.is_empty() {
        return Err(refused("it holds no certificate as PEM".into()));
    }
    Ok(all)
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// The last of a chain of causes: "connection refused", not "error sending request".
pub fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn client(url: &str) -> Result<Client, CliError> {
        // Another test of this process may have been first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        Client::new(&Connect { url: url.into(), token: None, ca_file: None })
    }

    #[test]
    fn an_id_cannot_leave_its_place() {
        let client = client("http://h:1/kiln/?x#y").unwrap();
        let url = |id| client.url(&["builds", id]).to_string();
        assert_eq!(url("b1"), "http://h:1/kiln/builds/b1");
        assert_eq!(url("../tokens?x#y"), "http://h:1/kiln/builds/..%2Ftokens%3Fx%23y");
        assert_eq!(url(".."), "http://h:1/kiln/builds/-");
    }

    #[test]
    fn only_http_urls_are_taken() {
        for url in ["", "localhost:4973", "ftp://h/", "http://", "unix:/x"] {
            assert!(client(url).is_err(), "{url:?}");
        }
    }

    #[test]
    fn a_next_link_gives_its_cursor_wherever_it_points() {
        let base = Url::parse("http://h:1/").unwrap();
        let next = |header| next_cursor(&base, header);
        assert_eq!(next("</builds?limit=2&cursor=a%2Fb>; rel=\"next\""), Some("a/b".into()));
        assert_eq!(
            next("</x?cursor=a>; rel=\"prev\", <https://evil/?cursor=b>; rel=next"),
            Some("b".into())
        );
        assert_eq!(next("</x?cursor=a>; rel=\"prev\""), None);
        assert_eq!(next("nonsense"), None);
    }

    #[test]
    fn a_problem_is_told_in_its_own_words() {
        let status = StatusCode::CONFLICT;
        assert_eq!(problem(status, br#"{"title":"t","detail":"d","message":"m"}"#), "d");
        assert_eq!(problem(status, br#"{"message":"m"}"#), "m");
        assert_eq!(problem(status, b"<html>"), "the server answers 409 Conflict");
    }
}
