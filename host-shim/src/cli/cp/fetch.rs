//! Out of a VM: the answer's archive is unpacked here, or printed.

use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;

use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use hyper::body::Frame;
use kiln_archive::{ArchiveError, LandError, Landing, Limits, land, unpack};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::side::Local;
use super::{files, note_left_out, open_here, refused};
use crate::cli::client::{Client, innermost};
use crate::cli::error::{CliError, stdout_is_terminal};

/// The trailer of docs/EXEC.md.
const LEFT_OUT: &str = "kiln-left-out";

/// Pieces that wait for the disk.
const WAITING: usize = 8;

/// Copies from there to here.
pub(super) async fn run(
    client: &Client,
    id: &str,
    query: Vec<(&str, String)>,
    to: Local,
) -> Result<(), CliError> {
    let sink = Sink::open(to)?;
    let path = files(client, id).await?;
    let response = client.download(&path, query).await.map_err(refused)?;
    let (pieces, arriving) = mpsc::channel(WAITING);
    let writing =
        spawn_blocking(move || sink.take(Incoming { pieces: arriving, current: Bytes::new() }));
    let mut body = http::Response::from(response).into_body();
    let (mut broken, mut left_out) = (None, None);
    while let Some(frame) = body.frame().await {
        let piece = match frame.map(Frame::into_data) {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(last)) => {
                left_out = last.trailers_ref().and_then(|all| all.get(LEFT_OUT)).cloned();
                continue;
            }
            Err(error) => Err(broken.insert(innermost(&error)).clone()),
        };
        let last = piece.is_err();
        if pieces.send(piece).await.is_err() || last {
            break;
        }
    }
    drop(pieces);
    let written = writing.await.map_err(|e| CliError::failed(format!("the copy failed: {e}")))?;
    match broken {
        Some(why) => Err(CliError::failed(format!("the copy out of {id} broke off: {why}"))
            .hint(format!("what is here is not whole; the reason may be in: kiln sessions {id}"))),
        None => written.inspect(|()| {
            if let Some(left_out) = left_out {
                note_left_out(&String::from_utf8_lossy(left_out.as_bytes()));
            }
        }),
    }
}

/// Where the archive goes.
enum Sink {
    Tree(Landing),
    Stdout,
}

impl Sink {
    fn open(to: Local) -> Result<Self, CliError> {
        match to {
            Local::Path(path) => landing(&path).map(Self::Tree),
            Local::Stream if stdout_is_terminal() => {
                Err(CliError::usage("an archive is not printed on a terminal")
                    .hint("name a file with >, or a program with |"))
            }
            Local::Stream => Ok(Self::Stdout),
        }
    }

    fn take(self, mut archive: Incoming) -> Result<(), CliError> {
        match self {
            Self::Tree(landing) => unpack(archive, landing.tree(None), Limits::NONE, &|| false)
                .map_err(|error| not_unpacked(&error)),
            Self::Stdout => {
                let mut out = io::stdout().lock();
                match io::copy(&mut archive, &mut out).and_then(|_| out.flush()) {
                    Ok(()) => Ok(()),
                    // As everywhere: a reader that has gone has had enough.
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
                    Err(error) => {
                        Err(CliError::failed(format!("cannot write to standard output: {error}")))
                    }
                }
            }
        }
    }
}

fn landing(path: &Path) -> Result<Landing, CliError> {
    land(path, open_here).map_err(|error| match &error {
        LandError::Missing(_) => CliError::failed(error.to_string()),
        LandError::Open { cause, .. } => CliError::failed(format!("{error}: {cause}")),
    })
}

fn not_unpacked(error: &ArchiveError) -> CliError {
    CliError::failed(error.to_string())
}

/// The body, for the thread that writes.
struct Incoming {
    pieces: mpsc::Receiver<Result<Bytes, String>>,
    current: Bytes,
}

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(Ok(bytes)) => self.current = bytes,
                Some(Err(why)) => return Err(io::Error::other(why)),
                None => return Ok(0),
            }
        }
        let len = into.len().min(self.current.len());
        self.current.copy_to_slice(&mut into[..len]);
        Ok(len)
    }
}
