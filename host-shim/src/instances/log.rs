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
    /// Nothing for a while.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::instance::{Change, End, InstanceId};
    use super::*;
    use crate::build::Tenant;

    fn instance() -> Instance {
        Instance {
            id: InstanceId::parse("i1").unwrap(),
            tenant: Tenant::new("a").unwrap(),
            name: "web".into(),
            image: "a/web".into(),
            image_digest: "sha256:0".into(),
            vcpus: 1,
            memory_mb: 1024,
            state: State::Created,
            created_at: 1,
            started_at: None,
            stopped_at: None,
            exit_code: None,
            exit_message: None,
        }
    }

    fn line(n: usize) -> Value {
        json!({ "type": "log", "content": format!("line {n}") })
    }

    struct Bench {
        dir: tempfile::TempDir,
        writer: Writer,
        seen: watch::Sender<Seen>,
    }

    impl Bench {
        async fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let writer = Writer::create(&dir.path().join("log")).await.unwrap();
            let seen = watch::Sender::new(Seen { bytes: 0, instance: instance() });
            Self { dir, writer, seen }
        }

        async fn print(&mut self, lines: &[Value]) {
            let bytes = self.writer.append(lines).await.unwrap();
            self.seen.send_modify(|seen| seen.bytes = bytes);
        }

        fn end(self) -> tempfile::TempDir {
            let stopped = instance().apply(Change::Stop(End::exited(3)), 9).unwrap();
            self.seen.send_modify(|seen| seen.instance = stopped);
            self.dir
        }

        async fn read(&self, from: From, follow: bool) -> Reader {
            let changes = Some(self.seen.subscribe());
            let path = self.dir.path().join("log");
            Reader::open(&path, instance(), changes, from, follow).await.unwrap()
        }
    }

    async fn lines(reader: &mut Reader) -> Option<Vec<Value>> {
        match reader.next().await.unwrap() {
            Batch::Lines(lines) => Some(lines.into_iter().map(|line| line.payload).collect()),
            Batch::End(_) => None,
            Batch::Quiet => panic!("it is quiet"),
        }
    }

    async fn all(mut reader: Reader) -> Vec<Value> {
        let mut found = vec![];
        while let Some(lines) = lines(&mut reader).await {
            found.extend(lines);
        }
        found
    }

    #[tokio::test]
    async fn a_follower_sees_lines_as_they_come_and_then_the_end_though_the_file_is_gone() {
        let mut bench = Bench::new().await;
        bench.print(&[line(1)]).await;
        let mut reader = bench.read(From::Byte(0), true).await;
        assert_eq!(lines(&mut reader).await.unwrap(), [line(1)]);
        let waiting = tokio::spawn(async move {
            let next = lines(&mut reader).await;
            (reader, next)
        });
        bench.print(&[line(2), line(3)]).await;
        let (mut reader, next) = waiting.await.unwrap();
        assert_eq!(next.unwrap(), [line(2), line(3)]);
        bench.print(&[line(4)]).await;
        drop(bench.end());
        assert_eq!(lines(&mut reader).await.unwrap(), [line(4)]);
        let Batch::End(ended) = reader.next().await.unwrap() else { panic!("it goes on") };
        assert_eq!(ended.exit_code, Some(3));
    }

    #[tokio::test]
    async fn what_there_is_ends_without_a_wait_and_goes_on_where_a_line_ended() {
        let mut bench = Bench::new().await;
        bench.print(&[line(1), line(2)]).await;
        let mut reader = bench.read(From::Byte(0), false).await;
        let Batch::Lines(found) = reader.next().await.unwrap() else { panic!("no lines") };
        assert!(matches!(reader.next().await.unwrap(), Batch::End(_)));
        let again = bench.read(From::Byte(found[0].end), false).await;
        assert_eq!(all(again).await, [line(2)]);
        assert_eq!(all(bench.read(From::Byte(u64::MAX), false).await).await, [] as [Value; 0]);
    }

    #[tokio::test]
    async fn the_last_lines_are_found_across_chunks() {
        let mut bench = Bench::new().await;
        let long = json!({ "content": "x".repeat(CHUNK + 10) });
        let written = [line(1), long, line(2), line(3)];
        bench.print(&written).await;
        for n in 0..=5_usize {
            let reader = bench.read(From::Tail(n as u64), false).await;
            let expected = &written[written.len().saturating_sub(n)..];
            assert!(all(reader).await == expected, "{n}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_told_and_an_owner_that_vanished_ends_it() {
        let bench = Bench::new().await;
        let mut reader = bench.read(From::Byte(0), true).await;
        assert!(matches!(reader.next().await.unwrap(), Batch::Quiet));
        drop(bench.seen);
        assert!(matches!(reader.next().await.unwrap(), Batch::End(_)));
    }

    #[tokio::test]
    async fn an_instance_that_never_had_a_log_has_an_empty_one() {
        let path = std::path::Path::new("/nonexistent/log");
        let reader = Reader::open(path, instance(), None, From::Tail(3), true).await.unwrap();
        assert_eq!(all(reader).await, [] as [Value; 0]);
    }
}
