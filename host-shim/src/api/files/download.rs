//! Out of the VM: the session's output is the answer's body, and what the agent says beside it is its trailer.

use std::io;

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, TRAILER};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::StreamBody;
use hyper::body::Frame;
use kiln_protocol::exec::{Open, Stream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

use super::refused::problem;
use crate::api::error::ApiError;
use crate::api::exec::LAST_DEADLINE;
use crate::exec::{Admitted, ClientInput, ClientOutput, Gone, How, Outcome, Said, Sessions};

/// Pieces of 64 KiB that wait for a client.
const WAITING: usize = 2;

/// The trailer that says what is missing from the archive, in the agent's words. It is sent to clients that say
/// `TE: trailers`.
const LEFT_OUT: &str = "kiln-left-out";
/// So much of it is passed on, in bytes.
const MAX_LEFT_OUT: usize = 2048;

type Piece = io::Result<Frame<Bytes>>;

/// Begins the copy, and answers when the agent has.
pub(super) async fn answer(
    sessions: &Sessions,
    admitted: Admitted,
    open: Open,
) -> Result<Response, ApiError> {
    let (body, pieces) = mpsc::channel(WAITING);
    let (begun, begins) = oneshot::channel();
    let (end, ends) = oneshot::channel();
    let session = async move {
        let mut input = Waits(body.clone());
        let mut output = Output { body: body.clone(), begun: Some(begun), left_out: vec![] };
        let outcome = admitted.open(open, None, &mut input, &mut output).await;
        // Its place is free for others before the client knows.
        drop(admitted);
        finish(&body, &outcome, &output.left_out).await;
        // Where it had begun nobody waits for this.
        let _ = end.send(outcome);
    };
    tokio::spawn(sessions.track(session).in_current_span());
    if begins.await.is_ok() {
        let body = Body::new(StreamBody::new(ReceiverStream::new(pieces)));
        let headers = [(CONTENT_TYPE, "application/x-tar"), (TRAILER, LEFT_OUT)];
        return Ok((headers, body).into_response());
    }
    drop(pieces);
    let lost = || Outcome::failed("the copy was given up");
    Err(problem(ends.await.unwrap_or_else(|_| lost())))
}

/// Breaks the body, unless it is whole: then it says what is not in it.
async fn finish(body: &mpsc::Sender<Piece>, outcome: &Outcome, left_out: &[u8]) {
    let last = if outcome.how == How::Exited && outcome.exit_code == Some(0) {
        match trailer(left_out) {
            Some(trailer) => Ok(trailer),
            None => return,
        }
    } else {
        Err(io::Error::other(outcome.why.clone().unwrap_or_default()))
    };
    if timeout(LAST_DEADLINE, body.send(last)).await.is_err() {
        tracing::debug!("a client did not take the end of its archive");
    }
}

/// The guest's words as a trailer, where there are any and they are one line of text.
fn trailer(left_out: &[u8]) -> Option<Frame<Bytes>> {
    let value = HeaderValue::from_bytes(left_out).ok().filter(|value| !value.is_empty())?;
    Some(Frame::trailers(HeaderMap::from_iter([(HeaderName::from_static(LEFT_OUT), value)])))
}

/// A client that has nothing more to say, and may go away.
struct Waits(mpsc::Sender<Piece>);

impl ClientInput for Waits {
    async fn next(&mut self) -> Result<Said, Gone> {
        self.0.closed().await;
        Err(Gone::Lost)
    }
}

/// The answer's body, and who waits for it to begin.
struct Output {
    body: mpsc::Sender<Piece>,
    begun: Option<oneshot::Sender<()>>,
    /// What the agent says beside the archive.
    left_out: Vec<u8>,
}

impl ClientOutput for Output {
    async fn started(&mut self) -> Result<(), Gone> {
        match self.begun.take().map(|begun| begun.send(())) {
            Some(Err(())) => Err(Gone::Lost),
            Some(Ok(())) | None => Ok(()),
        }
    }

    async fn output(&mut self, stream: Stream, bytes: Vec<u8>) -> Result<(), Gone> {
        match stream {
            Stream::Out => {
                let piece = Frame::data(bytes.into());
                self.body.send(Ok(piece)).await.map_err(|_| Gone::Lost)
            }
            Stream::Err => {
                let room = MAX_LEFT_OUT - self.left_out.len();
                self.left_out.extend_from_slice(&bytes[..bytes.len().min(room)]);
                Ok(())
            }
        }
    }

    async fn ping(&mut self) -> Result<(), Gone> {
        if self.body.is_closed() { Err(Gone::Lost) } else { Ok(()) }
    }
}
