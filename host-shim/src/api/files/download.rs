//! Out of the VM: the session's output is the answer's body.

use std::io;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::StreamExt;
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

type Piece = io::Result<Bytes>;

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
        let mut output = Output { body: body.clone(), begun: Some(begun) };
        let outcome = admitted.open(open, None, &mut input, &mut output).await;
        // Its place is free for others before the client knows.
        drop(admitted);
        finish(&body, &outcome).await;
        // Where it had begun nobody waits for this.
        let _ = end.send(outcome);
    };
    tokio::spawn(sessions.track(session).in_current_span());
    if begins.await.is_ok() {
        let body = Body::from_stream(ReceiverStream::new(pieces).boxed());
        return Ok(([(CONTENT_TYPE, "application/x-tar")], body).into_response());
    }
    drop(pieces);
    let lost = || Outcome::failed("the copy was given up");
    Err(problem(ends.await.unwrap_or_else(|_| lost())))
}

/// Breaks the body, unless it is whole.
async fn finish(body: &mpsc::Sender<Piece>, outcome: &Outcome) {
    if outcome.how == How::Exited && outcome.exit_code == Some(0) {
        return;
    }
    let why = outcome.why.clone().unwrap_or_default();
    let broken = body.send(Err(io::Error::other(why)));
    if timeout(LAST_DEADLINE, broken).await.is_err() {
        tracing::debug!("a client did not take the end of its archive");
    }
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
            Stream::Out => self.body.send(Ok(bytes.into())).await.map_err(|_| Gone::Lost),
            // An archive has no complaints.
            Stream::Err => Ok(()),
        }
    }

    async fn ping(&mut self) -> Result<(), Gone> {
        if self.body.is_closed() { Err(Gone::Lost) } else { Ok(()) }
    }
}
