//! A session's WebSocket: texts and bytes on the one side, what a session understands on the other.

use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use kiln_protocol::exec::Stream;
use tokio::time::timeout;

use super::message::{self, Asked};
use super::{LAST_DEADLINE, OPENING_DEADLINE};
use crate::exec::{ClientInput, ClientOutput, Gone, Outcome, Said};

/// Both directions.
pub(super) struct Socket {
    input: Input,
    output: Output,
}

/// What the client sends.
pub(super) struct Input(SplitStream<WebSocket>);

/// What the client is sent.
pub(super) struct Output {
    sink: SplitSink<WebSocket, Message>,
    multiplex: bool,
}

impl Socket {
    pub(super) fn new(socket: WebSocket) -> Self {
        let (sink, stream) = socket.split();
        Self { input: Input(stream), output: Output { sink, multiplex: false } }
    }

    /// The first message.
    pub(super) async fn opening(&mut self) -> Result<Asked, Gone> {
        let opening = timeout(OPENING_DEADLINE, self.input.message()).await;
        let Ok(opening) = opening else {
            let seconds = OPENING_DEADLINE.as_secs();
            return Err(Gone::Misused(format!("there was no first message within {seconds} s")));
        };
        match opening? {
            Heard::Text(text) => message::first(&text).map_err(Gone::Misused),
            Heard::Binary(_) => Err(Gone::Misused(
                "the first message has to be a text that names the command".into(),
            )),
        }
    }

    /// For a session.
    pub(super) fn halves(&mut self, multiplex: bool) -> (&mut Input, &mut Output) {
        self.output.multiplex = multiplex;
        (&mut self.input, &mut self.output)
    }

    /// The last message, and the end of the connection.
    pub(super) async fn finish(mut self, outcome: &Outcome) {
        let Some(exit_code) = outcome.exit_code else { return };
        let sink = &mut self.output.sink;
        let told = async {
            sink.send(Message::Text(message::last(exit_code, outcome).into())).await?;
            let frame = CloseFrame { code: close_code::NORMAL, reason: "".into() };
            sink.send(Message::Close(Some(frame))).await?;
            // What the client had sent is read, or the kernel would take the last words back with a reset.
            while let Some(Ok(_)) = self.input.0.next().await {}
            Ok::<(), axum::Error>(())
        };
        if !matches!(timeout(LAST_DEADLINE, told).await, Ok(Ok(()))) {
            tracing::debug!("a client did not take the end of its session");
        }
    }
}

enum Heard {
    Text(axum::extract::ws::Utf8Bytes),
    Binary(Bytes),
}

impl Input {
    /// The next message that says something. Cancel-safe.
    async fn message(&mut self) -> Result<Heard, Gone> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Text(text))) => return Ok(Heard::Text(text)),
                Some(Ok(Message::Binary(bytes))) => return Ok(Heard::Binary(bytes)),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone::Lost),
            }
        }
    }
}

impl ClientInput for Input {
    async fn next(&mut self) -> Result<Said, Gone> {
        loop {
            match self.message().await? {
                Heard::Binary(bytes) if bytes.is_empty() => {}
                Heard::Binary(bytes) => return Ok(Said::Input(bytes)),
                Heard::Text(text) => {
                    if let Some(said) = message::next(&text).map_err(Gone::Misused)? {
                        return Ok(said);
                    }
                }
            }
        }
    }
}

impl ClientOutput for Output {
    async fn output(&mut self, stream: Stream, mut bytes: Vec<u8>) -> Result<(), Gone> {
        if self.multiplex {
            let number = match stream {
                Stream::Out => 1,
                Stream::Err => 2,
            };
            bytes.insert(0, number);
        }
        self.sink.send(Message::Binary(bytes.into())).await.map_err(|_| Gone::Lost)
    }

    async fn ping(&mut self) -> Result<(), Gone> {
        self.sink.send(Message::Ping(Bytes::new())).await.map_err(|_| Gone::Lost)
    }
}
