//! Into a VM: files of this machine are packed, or an archive on standard input is passed on, as the request's body.

use std::io::{self, ErrorKind, Write};

use bytes::{Bytes, BytesMut};
use kiln_archive::{LeftOut, Packing};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;

use super::side::Local;
use super::{files, note_left_out, open_here, refused};
use crate::cli::client::{CallError, Client};
use crate::cli::error::CliError;

/// Bytes of one part of the body.
const CHUNK: usize = 64 * 1024;
/// Parts that may wait.
const QUEUE: usize = 8;

/// Copies from here to there.
pub(super) async fn run(
    client: &Client,
    id: &str,
    query: Vec<(&str, String)>,
    from: Local,
) -> Result<(), CliError> {
    let source = Source::find(from)?;
    let path = files(client, id).await?;
    let (parts, body) = mpsc::channel(QUEUE);
    let mut out = Parts { parts, buffer: BytesMut::new() };
    let packing = spawn_blocking(move || {
        let made = source.write(&mut out).and_then(|left_out| out.flush().map(|()| left_out));
        if let Err(error) = &made {
            // The body must not look complete. Nobody reads it any more if this fails.
            let _ = out.parts.blocking_send(Err(io::Error::other(error.to_string())));
        }
        made
    });
    let body = reqwest::Body::wrap_stream(ReceiverStream::new(body));
    let answer = client.upload(&path, query, body).await;
    match answer {
        Ok(()) => {
            if let Ok(Ok(left_out)) = packing.await
                && !left_out.is_empty()
            {
                note_left_out(&left_out.to_string());
            }
            Ok(())
        }
        // The request broke because its body did.
        Err(error @ CallError::Unreachable { .. }) => match packing.await {
            Ok(Err(why)) if why.kind() != ErrorKind::BrokenPipe => {
                Err(CliError::failed(format!("cannot read what is to be copied: {why}")))
            }
            _ => Err(error.into()),
        },
        Err(error) => Err(refused(error)),
    }
}

/// Where the archive comes from.
enum Source {
    Files(Packing),
    Stdin,
}

impl Source {
    fn find(from: Local) -> Result<Self, CliError> {
        let path = match from {
            Local::Path(path) => path,
            Local::Stream => return Ok(Self::Stdin),
        };
        let found = Packing::find(&path, open_here).map(Self::Files);
        found.map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                CliError::failed(format!("there is nothing at {}", path.display()))
            }
            _ => CliError::failed(format!("{} cannot be copied: {error}", path.display())),
        })
    }

    fn write(self, out: &mut Parts) -> io::Result<LeftOut> {
        match self {
            Self::Files(packing) => packing.pack(out, &|| false),
            Self::Stdin => io::copy(&mut io::stdin().lock(), out).map(|_| LeftOut::default()),
        }
    }
}

/// Collects what is written into parts and waits while the queue is full.
struct Parts {
    parts: mpsc::Sender<io::Result<Bytes>>,
    buffer: BytesMut,
}

impl Write for Parts {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let part = self.buffer.split().freeze();
        self.parts.blocking_send(Ok(part)).map_err(|_| ErrorKind::BrokenPipe.into())
    }
}
