//! A multipart body that costs little memory, whatever is sent.
//!
//! The parser buffers all that its stream has ready, and looks for the end of a part's headers in
//! all that has come. [`Paced`] stands between it and the body: it hands over one small piece for
//! each look, stops when too much comes between two parts, and gives up on a client that stalls.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::StatusCode;
use axum::http::header::EXPECT;
use futures_util::{Stream, StreamExt};
use tokio::time::{Instant, Sleep, sleep_until};

use super::error::ApiError;

/// Most bytes of any part but the source.
pub(super) const MAX_TEXT: usize = 1024 * 1024;
/// Most bytes that are handed to the parser at once.
const PIECE: usize = 64 * 1024;
/// Most bytes of a part's headers and what stands around them. The last piece of the part before
/// may hold the next ones too.
const MAX_BETWEEN: usize = 64 * 1024;
/// A client that sends nothing for so long has gone.
const STALLED: Duration = Duration::from_mins(1);
/// What is read and thrown away after a refusal, so that the client has sent its request and
/// listens to the answer. More than this is cut off.
const DRAIN: usize = 16 * 1024 * 1024;
/// How long that may take.
const DRAIN_FOR: Duration = Duration::from_secs(5);

/// The parts of a request.
pub(super) struct Parts {
    multipart: Multipart,
    gate: Arc<Mutex<Gate>>,
}

/// What the parser's stream and we share.
struct Gate {
    body: BodyDataStream,
    /// Bytes that may still come before the next part is there; `None` inside of a part.
    between: Option<usize>,
    stopped: Option<Stop>,
}

/// Why we stopped reading.
#[derive(Clone, Copy, Debug)]
enum Stop {
    Headers,
    Stalled,
    Broken,
}

impl Parts {
    /// Takes the body of a request.
    pub(super) async fn new(request: Request) -> Result<Self, ApiError> {
        let (head, body) = request.into_parts();
        let gate =
            Gate { body: body.into_data_stream(), between: Some(MAX_BETWEEN), stopped: None };
        let gate = Arc::new(Mutex::new(gate));
        let body = Body::from_stream(Paced::new(Arc::clone(&gate)));
        let request = Request::from_parts(head, body);
        if let Ok(multipart) = Multipart::from_request(request, &()).await {
            return Ok(Self { multipart, gate });
        }
        drain(&gate).await;
        let message = "send multipart/form-data with a boundary";
        Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message))
    }

    /// The next part.
    pub(super) async fn next(&mut self) -> Result<Option<Part<'_>>, ApiError> {
        lock(&self.gate).between = Some(MAX_BETWEEN);
        let field = self.multipart.next_field().await;
        let field = field.map_err(|error| refused(&self.gate, &error))?;
        lock(&self.gate).between = None;
        Ok(field.map(|field| Part { field, gate: Arc::clone(&self.gate) }))
    }

    /// Reads on for a while after a refusal, so that the answer is heard.
    pub(super) async fn drain(self) {
        drain(&self.gate).await;
    }
}

/// One part.
pub(super) struct Part<'a> {
    field: Field<'a>,
    gate: Arc<Mutex<Gate>>,
}

impl Part<'_> {
    /// Its name; empty without one.
    pub(super) fn name(&self) -> &str {
        self.field.name().unwrap_or_default()
    }

    /// The next bytes.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, ApiError> {
        self.field.chunk().await.map_err(|error| refused(&self.gate, &error))
    }

    /// All of it, as text of at most [`MAX_TEXT`] bytes.
    pub(super) async fn text(mut self) -> Result<String, ApiError> {
        let name = self.name().to_owned();
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            if bytes.len() + chunk.len() > MAX_TEXT {
                let message = format!("{name} is longer than {MAX_TEXT} bytes");
                return Err(ApiError::too_large(message));
            }
            bytes.extend_from_slice(&chunk);
        }
        String::from_utf8(bytes).map_err(|error| {
            let lossy = String::from_utf8_lossy(error.as_bytes());
            ApiError::invalid(&name, &lossy, "text in UTF-8")
        })
    }
}

fn refused(gate: &Mutex<Gate>, error: &MultipartError) -> ApiError {
    match lock(gate).stopped {
        Some(Stop::Headers) => ApiError::bad_request(
            "invalid_multipart",
            format!("a part's headers are longer than {MAX_BETWEEN} bytes"),
        ),
        Some(Stop::Stalled) => {
            let message = format!("nothing was received for {} seconds", STALLED.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "upload_stalled", message)
        }
        Some(Stop::Broken) => ApiError::bad_request(
            "upload_broken",
            "the connection broke before the end of the body",
        ),
        None => {
            let message =
                format!("the body is not multipart/form-data as RFC 7578 has it: {error}");
            ApiError::bad_request("invalid_multipart", message)
        }
    }
}

/// Reads the body of a request that was refused, like [`Parts::drain`].
pub(super) async fn discard(request: Request) {
    // Such a client waits for the answer before it sends a body.
    if !request.headers().contains_key(EXPECT) {
        let mut body = request.into_body().into_data_stream();
        read_away(|cx| body.poll_next_unpin(cx)).await;
    }
}

async fn drain(gate: &Mutex<Gate>) {
    read_away(|cx| lock(gate).body.poll_next_unpin(cx)).await;
}

async fn read_away(
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<Option<Result<Bytes, axum::Error>>>,
) {
    let mut left = DRAIN;
    let reading = std::future::poll_fn(|cx| {
        while let Some(Ok(chunk)) = ready!(poll(cx)) {
            if chunk.len() > left {
                break;
            }
            left -= chunk.len();
        }
        Poll::Ready(())
    });
    // Either way the answer is sent.
    let _ = tokio::time::timeout(DRAIN_FOR, reading).await;
}

fn lock(gate: &Mutex<Gate>) -> std::sync::MutexGuard<'_, Gate> {
    gate.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body in small pieces, one for each look.
struct Paced {
    gate: Arc<Mutex<Gate>>,
    rest: Bytes,
    /// Whether a piece was just handed over.
    given: bool,
    stalled: Pin<Box<Sleep>>,
}

impl Paced {
    fn new(gate: Arc<Mutex<Gate>>) -> Self {
        let stalled = Box::pin(sleep_until(Instant::now() + STALLED));
        Self { gate, rest: Bytes::new(), given: false, stalled }
    }
}

impl Stream for Paced {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if std::mem::take(&mut this.given) {
            // The parser takes all that is ready before it looks at any: there is no more for now.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut gate = lock(&this.gate);
        if this.rest.is_empty() {
            match gate.body.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(bytes))) => {
                    this.stalled.as_mut().reset(Instant::now() + STALLED);
                    this.rest = bytes;
                }
                Poll::Ready(Some(Err(error))) => {
                    gate.stopped = Some(Stop::Broken);
                    return Poll::Ready(Some(Err(std::io::Error::other(error))));
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => {
                    ready!(this.stalled.as_mut().poll(cx));
                    gate.stopped = Some(Stop::Stalled);
                    return Poll::Ready(Some(Err(std::io::ErrorKind::TimedOut.into())));
                }
            }
        }
        let piece = this.rest.split_to(this.rest.len().min(PIECE));
        if let Some(left) = &mut gate.between {
            // What is left over when the headers end belongs to the part, so only a piece that
            // begins beyond the limit is too much.
            if *left == 0 {
                gate.stopped = Some(Stop::Headers);
                return Poll::Ready(Some(Err(std::io::ErrorKind::InvalidData.into())));
            }
            *left = left.saturating_sub(piece.len());
        }
        this.given = true;
        Poll::Ready(Some(Ok(piece)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    async fn parts(body: impl Into<Body>) -> Parts {
        let request = Request::builder()
            .header("content-type", "multipart/form-data; boundary=B")
            .body(body.into())
            .unwrap();
        Parts::new(request).await.unwrap()
    }

    fn part(name: &str, content: &str) -> String {
        format!("--B\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{content}\r\n")
    }

    #[tokio::test]
    async fn parts_come_whole_however_the_body_is_cut() {
        let long = "x".repeat(3 * PIECE);
        let body = format!("{}{}{}--B--\r\n", part("a", "1"), part("b", &long), part("c", ""));
        for cut in [1, 7, 4096, body.len()] {
            let pieces: Vec<_> =
                body.as_bytes().chunks(cut).map(|c| Ok::<_, std::io::Error>(c.to_vec())).collect();
            let mut parts = parts(Body::from_stream(futures_util::stream::iter(pieces))).await;
            let mut seen = vec![];
            while let Some(part) = parts.next().await.unwrap() {
                seen.push((part.name().to_owned(), part.text().await.unwrap().len()));
            }
            assert_eq!(seen, [("a".into(), 1), ("b".into(), long.len()), ("c".into(), 0)]);
        }
    }

    #[tokio::test]
    async fn text_is_bounded() {
        let text = async |n: usize| {
            let mut parts = parts(format!("{}--B--\r\n", part("a", &"x".repeat(n)))).await;
            parts.next().await.unwrap().unwrap().text().await
        };
        assert_eq!(text(MAX_TEXT).await.unwrap().len(), MAX_TEXT);
        assert_eq!(text(MAX_TEXT + 1).await.unwrap_err().code(), "too_large");
    }

    #[tokio::test]
    async fn endless_headers_and_preambles_are_cut_off() {
        // As many pieces as a parser without a bound would take, and none of them counted here
        // before it is asked for.
        let taken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        for start in ["--B\r\nX-Endless: ", ""] {
            taken.store(0, std::sync::atomic::Ordering::Relaxed);
            let count = Arc::clone(&taken);
            let endless = std::iter::once(start.to_owned())
                .chain(std::iter::repeat_n("y".repeat(PIECE), 1000));
            let pieces = endless.inspect(move |_| {
                count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            });
            let body =
                Body::from_stream(futures_util::stream::iter(pieces.map(Ok::<_, std::io::Error>)));
            let mut parts = parts(body).await;
            assert_eq!(parts.next().await.err().unwrap().code(), "invalid_multipart");
            assert!(taken.load(std::sync::atomic::Ordering::Relaxed) < 8);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stalls_is_given_up() {
        let begin = futures_util::stream::iter([Ok::<_, std::io::Error>(part("a", "1"))]);
        let stalls = begin.chain(futures_util::stream::pending());
        let mut parts = parts(Body::from_stream(stalls)).await;
        let part = parts.next().await.unwrap().unwrap();
        assert_eq!(part.text().await.unwrap_err().code(), "upload_stalled");
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_refused() {
        let mut broken = parts(part("a", "1")).await;
        let part = broken.next().await.unwrap().unwrap();
        assert_eq!(part.text().await.unwrap_err().code(), "invalid_multipart");
        broken.drain().await;
        let mut none = parts("").await;
        assert_eq!(none.next().await.err().unwrap().code(), "invalid_multipart");
    }
}
