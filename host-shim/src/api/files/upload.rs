//! Into the VM: the request's body is the session's input.

use axum::body::{Body, BodyDataStream};
use axum::http::StatusCode;
use futures_util::StreamExt;
use kiln_protocol::exec::{Open, Stream};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::Instrument;

use super::refused::problem;
use crate::api::error::ApiError;
use crate::api::exec::LAST_DEADLINE;
use crate::exec::{Admitted, ClientInput, ClientOutput, Gone, How, Outcome, Said, Sessions};

/// Copies the body's archive in, and answers when it is all there.
pub(super) async fn answer(
    sessions: &Sessions,
    admitted: Admitted,
    open: Open,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let (end, ends) = oneshot::channel();
    let session = async move {
        let mut input = Input { body: body.into_data_stream(), over: false, end };
        let outcome = admitted.open(open, None, &mut input, &mut Silent).await;
        // Its place is free for others before the client knows.
        drop(admitted);
        let Input { mut body, over, end } = input;
        // A client that has gone waits for nothing.
        let told = end.send(outcome).is_ok();
        if told && !over {
            // What the client still sends is read, or the kernel would take the answer back with a reset.
            let rest = async { while let Some(Ok(_)) = body.next().await {} };
            let _ = timeout(LAST_DEADLINE, rest).await;
        }
    };
    tokio::spawn(sessions.track(session).in_current_span());
    let outcome = ends.await.unwrap_or_else(|_| Outcome::failed("the copy was given up"));
    if outcome.how == How::Exited && outcome.exit_code == Some(0) {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(problem(outcome))
    }
}

/// The archive, and who waits for the end of the copy.
struct Input {
    body: BodyDataStream,
    over: bool,
    end: oneshot::Sender<Outcome>,
}

impl ClientInput for Input {
    async fn next(&mut self) -> Result<Said, Gone> {
        if self.over {
            self.end.closed().await;
            return Err(Gone::Lost);
        }
        match self.body.next().await {
            Some(Ok(bytes)) => Ok(Said::Input(bytes)),
            // An archive that is cut off has no end.
            Some(Err(_)) => Err(Gone::Lost),
            None => {
                self.over = true;
                Ok(Said::InputEnd)
            }
        }
    }
}

/// A client that hears the end only.
struct Silent;

impl ClientOutput for Silent {
    async fn output(&mut self, _: Stream, _: Vec<u8>) -> Result<(), Gone> {
        Ok(())
    }

    async fn ping(&mut self) -> Result<(), Gone> {
        Ok(())
    }
}
