//! The conversation of a session: what is read here goes out, what comes in is written here.

use std::io::ErrorKind;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use super::stdio::{self, Output, put};
use crate::cli::client::{Socket, innermost};

/// The server gives a sign of life every few seconds: after this much silence it is lost.
const SILENCE: Duration = Duration::from_mins(1);
/// Signals and sizes that wait to be sent. More are dropped: nobody types so fast, and the way is stuck.
const WAITING: usize = 32;

/// As much of standard error is remembered. A reason is at most a few hundred characters.
const REMEMBERED: usize = 4096;

/// How a session ended for this side.
#[derive(Debug)]
pub(super) enum End {
    /// The command's exit code, or Kiln's with its reason, unless that stands on standard error already.
    Exited { code: u8, error: Option<String> },
    /// A signal ended this process.
    Left(i32),
    /// Nobody reads standard output any more.
    ReaderGone,
    /// The connection broke.
    Lost(String),
}

/// A session.
pub(super) struct Talk {
    reading: Pin<Box<dyn Future<Output = End>>>,
    writing: Pin<Box<dyn Future<Output = ()>>>,
    wrote: bool,
    texts: mpsc::Sender<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Last {
    exit_code: u8,
    error: Option<String>,
}

impl Talk {
    /// Begins with the first message. `close_input` says at once that there is no input.
    pub(super) fn begin(socket: Socket, first: Value, stdin: bool, close_input: bool) -> Self {
        let (sink, stream) = socket.split();
        let (texts, waiting) = mpsc::channel(WAITING);
        let mut begin = vec![first];
        if close_input {
            begin.push(input_end());
        }
        Self {
            reading: Box::pin(read(stream)),
            writing: Box::pin(async move {
                // A connection that cannot be written to is one whose end the other direction tells.
                let _ = write(sink, begin, waiting, stdin).await;
            }),
            wrote: false,
            texts,
        }
    }

    /// Sends a text as soon as there is room.
    pub(super) fn say(&self, text: Value) {
        let _ = self.texts.try_send(text);
    }

    /// Works until the session ends. Cancel-safe.
    pub(super) async fn end(&mut self) -> End {
        loop {
            tokio::select! {
                biased;
                end = &mut self.reading => return end,
                () = &mut self.writing, if !self.wrote => self.wrote = true,
            }
        }
    }
}

fn input_end() -> Value {
    json!({ "stdin_closed": true })
}

async fn write(
    mut sink: SplitSink<Socket, Message>,
    begin: Vec<Value>,
    mut waiting: mpsc::Receiver<Value>,
    stdin: bool,
) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    for text in begin {
        sink.send(Message::text(text.to_string())).await?;
    }
    let mut stdin = if stdin { stdio::stdin().ok() } else { None };
    loop {
        tokio::select! {
            biased;
            text = waiting.recv() => match text {
                Some(text) => sink.send(Message::text(text.to_string())).await?,
                None => return Ok(()),
            },
            piece = next(stdin.as_mut()) => if let Some(piece) = piece {
                sink.send(Message::binary(piece)).await?;
            } else {
                stdin = None;
                sink.send(Message::text(input_end().to_string())).await?;
            },
        }
    }
}

async fn next(stdin: Option<&mut mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match stdin {
        Some(stdin) => stdin.recv().await,
        None => std::future::pending().await,
    }
}

async fn read(mut stream: SplitStream<Socket>) -> End {
    let mut complaints = Complaints::default();
    loop {
        let message = match tokio::time::timeout(SILENCE, stream.next()).await {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(error))) => return End::Lost(innermost(&error)),
            Ok(None) => return End::Lost("the server ended it early".into()),
            Err(_) => return End::Lost("the server fell silent".into()),
        };
        match message {
            Message::Binary(mut bytes) => match bytes.split_to(1.min(bytes.len())).first() {
                Some(1) => match put(Output::Stdout, bytes).await {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => return End::ReaderGone,
                    Err(error) => {
                        return End::Lost(format!("cannot write to standard output: {error}"));
                    }
                },
                // Nobody is left to tell when that is closed.
                Some(2) => {
                    complaints.see(&bytes);
                    drop(put(Output::Stderr, bytes).await);
                }
                _ => return End::Lost("the server sent output of no stream".into()),
            },
            // A newer server may say more.
            Message::Text(text) => {
                if let Ok(Last { exit_code, error }) = serde_json::from_str(&text) {
                    let error = error.filter(|error| !complaints.end_with(error));
                    return End::Exited { code: exit_code, error };
                }
            }
            Message::Close(_) => return End::Lost("the server ended it early".into()),
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
        }
    }
}

/// The end of what was written to standard error. A command that cannot be started is reported twice: there, by what
/// should have started it, and as the session's end.
#[derive(Default)]
struct Complaints(Vec<u8>);

impl Complaints {
    fn see(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(&bytes[bytes.len().saturating_sub(REMEMBERED)..]);
        self.0.drain(..self.0.len().saturating_sub(REMEMBERED));
    }

    fn end_with(&self, words: &str) -> bool {
        let said = String::from_utf8_lossy(&self.0);
        !words.trim().is_empty() && said.trim_end().ends_with(words.trim())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_found_at_the_end_of_what_was_said() {
        let mut complaints = Complaints::default();
        assert!(!complaints.end_with("") && !complaints.end_with("not found"));
        for piece in ["x".repeat(3 * REMEMBERED).as_bytes(), b"is not ", b"found\n"] {
            complaints.see(piece);
        }
        assert!(complaints.end_with("is not found") && complaints.end_with("is not found\n"));
        assert!(!complaints.end_with("is not") && !complaints.end_with(""));
        assert_eq!(complaints.0.len(), REMEMBERED);
    }
}
