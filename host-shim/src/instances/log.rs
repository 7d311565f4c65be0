//! What an instance printed: a file of its own, one JSON object a line, in the form of a build's `log` events.
//!
//! The owner appends, and tells how far the file is; readers read up to there and wait for more. A file that is
//! removed while somebody reads it is read to its end all the same. It is not synced: an instance does not
//! outlive its host.

use std::io::{self, SeekFrom};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::Instant;

use super::instance::{Instance, State};

/// A follower says after so long without a line that it is quiet.
const QUIET: Duration = Duration::from_secs(15);
/// How much is read at once.
const CHUNK: usize = 64 * 1024;
/// Longest line of the file: 16 KiB of content, each byte an escape of six, and again in base64.
const MAX_LINE: usize = 256 * 1024;

/// How far an instance is.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Whole lines in its log, in bytes.
    pub bytes: u64,
    /// The instance.
    pub instance: Instance,
}

/// The owner's end of a log.
#[derive(Debug)]
pub struct Writer {
    file: File,
    bytes: u64,
}

impl Writer {
    /// A new log.
    pub async fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().append(true).create_new(true).mode(0o600).open(path).await?;
        Ok(Self { file, bytes: 0 })
    }

    /// Appends objects, and tells how long the log is.
    pub async fn append(&mut self, lines: &[Value]) -> io::Result<u64> {
        let mut text = String::new();
        for line in lines {
            text.push_str(&line.to_string());
            text.push('\n');
        }
        self.file.write_all(text.as_bytes()).await?;
        self.file.flush().await?;
        self.bytes += text.len() as u64;
        Ok(self.bytes)
    }
}

/// A line of a log.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Where the next line begins: to go on from there.
    pub end: u64,
    /// What it says.
    pub payload: Value,
}

/// What a reader has found.
#[derive(Debug)]
pub enum Batch {
    /// The next lines, at least one.
    Lines(Vec<Line>),
    /// Nothing for [`QUIET`].
    Quiet,
    /// There will be no more, or no more was wanted. The instance as it is then.
    End(Box<Instance>),
}

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// With so many of the last lines.
    Tail(u64),
    /// After this byte.
    Byte(u64),
}

/// A reader of one log.
#[derive(Debug)]
pub struct Reader {
    /// None when nothing was ever printed.
    file: Option<File>,
    at: u64,
    begun: Vec<u8>,
    follow: bool,
    /// How far the instance is, and whether that changes.
    seen: Seen,
    changes: Option<watch::Receiver<Seen>>,
}

impl Reader {
    /// Opens a log. `changes` is that of an instance that has an owner; what is told of one that has none is all that
    /// there will be.
    pub async fn open(
        path: &Path,
        instance: Instance,
        changes: Option<watch::Receiver<Seen>>,
        from: From,
        follow: bool,
    ) -> io::Result<Self> {
        let mut file = match File::open(path).await {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let seen = match (&changes, &file) {
            (Some(changes), _) => changes.borrow().clone(),
            (None, Some(file)) => Seen { bytes: file.metadata().await?.len(), instance },
            (None, None) => Seen { bytes: 0, instance },
        };
        let at = match (from, &mut file) {
            (From::Byte(at), _) => at.min(seen.bytes),
            (From::Tail(lines), Some(file)) => tail(file, seen.bytes, lines).await?,
            (From::Tail(_), None) => 0,
        };
        if let Some(file) = &mut file {
            file.seek(SeekFrom::Start(at)).await?;
        }
        Ok(Self { file, at, begun: vec![], follow, seen, changes })
    }

    /// The next batch. Cancel-safe but for what it had begun to read: not to be called again then.
    pub async fn next(&mut self) -> io::Result<Batch> {
        let quiet_at = Instant::now() + QUIET;
        loop {
            let lines = self.read().await?;
            if !lines.is_empty() {
                return Ok(Batch::Lines(lines));
            }
            let over = !self.follow || self.seen.instance.state == State::Stopped;
            let Some(changes) = self.changes.as_mut().filter(|_| !over) else {
                return Ok(Batch::End(Box::new(self.seen.instance.clone())));
            };
            match tokio::time::timeout_at(quiet_at, changes.changed()).await {
                Ok(Ok(())) => self.seen = changes.borrow_and_update().clone(),
                // Its owner is gone, and could not say how it ended.
                Ok(Err(_)) => {
                    self.seen = changes.borrow().clone();
                    self.changes = None;
                }
                Err(_) => return Ok(Batch::Quiet),
            }
        }
    }

    /// Lines up to where the log is known to be whole: a chunk's worth, none only when there are none.
    async fn read(&mut self) -> io::Result<Vec<Line>> {
        let Some(file) = &mut self.file else { return Ok(vec![]) };
        let mut lines = vec![];
        while lines.is_empty() {
            let read_to = self.at + self.begun.len() as u64;
            let left = usize::try_from(self.seen.bytes - read_to).unwrap_or(usize::MAX);
            let mut chunk = vec![0; left.min(CHUNK)];
            let read = file.read(&mut chunk).await?;
            if read == 0 {
                break;
            }
            self.begun.extend_from_slice(&chunk[..read]);
            while let Some(length) = self.begun.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.begun.drain(..=length).collect();
                self.at += line.len() as u64;
                let payload = serde_json::from_slice(&line)?;
                lines.push(Line { end: self.at, payload });
            }
            if self.begun.len() > MAX_LINE {
                return Err(io::Error::other("a log holds a line that no owner has written"));
            }
        }
        Ok(lines)
    }
}

/// Where the last lines begin.
async fn tail(file: &mut File, length: u64, lines: u64) -> io::Result<u64> {
    let (mut end, mut left) = (length, lines);
    if left == 0 {
        return Ok(length);
    }
    while end > 0 {
        let start = end.saturating_sub(CHUNK as u64);
        let mut chunk = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        file.seek(SeekFrom::Start(start)).await?;
        file.read_exact(&mut chunk).await?;
        for (at, _) in chunk.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            let next = start + at as u64 + 1;
            // The newline of the last line does not begin one.
            if next < length {
                left -= 1;
                if left == 0 {
                    return Ok(next);
                }
            }
        }
        end = start;
    }
    Ok(0)
}
