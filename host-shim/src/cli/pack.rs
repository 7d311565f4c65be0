//! The source as a stream of tar bytes. A thread writes, the request's body reads, and a short queue
//! between them bounds what is in memory, whatever the source's size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use nix::libc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::context::{Context, Entry, named};

/// Bytes of one part of the body.
const CHUNK: usize = 64 * 1024;
/// Parts that may wait.
const QUEUE: usize = 8;

/// Where the bytes come from.
#[derive(Debug)]
pub enum Source {
    /// A directory, to be packed.
    Directory(Context),
    /// An archive on standard input, passed on as it is.
    Stdin,
}

/// What was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Files, directories and links; 0 for an archive.
    pub entries: u64,
    /// What could not be sent, with the reason.
    pub skipped: Vec<String>,
}

/// How far the stream is.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes that the reader has taken.
    taken: AtomicU64,
    /// Bytes that were put into the queue, or wait to be.
    made: AtomicU64,
    /// Everything was made.
    complete: AtomicBool,
}

impl Meter {
    /// Bytes that the request has taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Whether the request has taken everything.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire) && self.is_waited_for()
    }

    /// Whether nothing waits for the request to take it.
    fn is_waited_for(&self) -> bool {
        self.taken() == self.made.load(Ordering::Relaxed)
    }

    /// Whether it is the server's turn, not the disk's or the user's.
    pub fn is_servers_turn(&self) -> bool {
        self.is_complete() || !self.is_waited_for()
    }
}

/// A stream that is being made.
#[derive(Debug)]
pub struct Packing {
    /// How far it is.
    pub meter: Arc<Meter>,
    /// The writing thread.
    pub task: JoinHandle<io::Result<Summary>>,
}

/// Starts to make the stream.
pub fn start(source: Source) -> (impl Stream<Item = io::Result<Bytes>> + Send + 'static, Packing) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let meter = Arc::new(Meter::default());
    let mut out = Chunks { sender, buffer: BytesMut::new(), meter: meter.clone() };
    let task = tokio::task::spawn_blocking(move || {
        let result = match source {
            Source::Directory(context) => pack(&context, &mut out),
            Source::Stdin => {
                io::copy(&mut io::stdin().lock(), &mut out).map(|_| Summary::default())
            }
        };
        let result = result.and_then(|summary| out.flush().map(|()| summary));
        match &result {
            Ok(_) => out.meter.complete.store(true, Ordering::Release),
            // The body must not look complete. Nobody reads it any more if this fails.
            Err(error) => {
                let copy = io::Error::new(error.kind(), error.to_string());
                let _ = out.sender.blocking_send(Err(copy));
            }
        }
        result
    });
    let taken = meter.clone();
    let stream = ReceiverStream::new(receiver).inspect(move |part| {
        if let Ok(bytes) = part {
            taken.taken.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
    });
    (stream, Packing { meter, task })
}

/// Writes a context as a tar archive: the same bytes for the same files, whoever packs them.
fn pack(context: &Context, out: impl Write) -> io::Result<Summary> {
    let mut tar = tar::Builder::new(out);
    let mut summary = Summary::default();
    if let Some(content) = &context.ignore_file {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, ".dockerignore", &content[..])?;
        summary.entries += 1;
    }
    let mut entries = 0;
    context.walk::<io::Error>(
        &mut |entry| {
            entries += 1;
            append(&mut tar, &context.root, entry)
        },
        &mut |path, what| summary.skipped.push(format!("{} ({what})", path.display())),
    )?;
    tar.into_inner()?.flush()?;
    summary.entries += entries;
    Ok(summary)
}

fn append(tar: &mut tar::Builder<impl Write>, root: &Path, entry: &Entry) -> io::Result<()> {
    let full = root.join(&entry.path);
    let metadata = &entry.metadata;
    let mut header = tar::Header::new_gnu();
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(0);
    header.set_gid(0);
    // A tar's time is not negative.
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    if metadata.is_dir() {
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        tar.append_data(&mut header, &entry.path, io::empty())
    } else if metadata.is_symlink() {
        let target = fs::read_link(&full).map_err(|e| named(&full, e))?;
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        // The crate tidies targets that it writes itself; a link stays as it is where that fits.
        if header.set_link_name_literal(target.as_os_str().as_bytes()).is_ok() {
            tar.append_data(&mut header, &entry.path, io::empty())
        } else {
            tar.append_link(&mut header, &entry.path, &target)
        }
    } else {
        append_file(tar, &mut header, &full, entry)
    }
}

/// Sends a file whose content may change while it is read: that is found and said.
fn append_file(
    tar: &mut tar::Builder<impl Write>,
    header: &mut tar::Header,
    full: &Path,
    entry: &Entry,
) -> io::Result<()> {
    let changed = || io::Error::other(format!("{}: it changed while it was read", full.display()));
    // The path may have become a link or a pipe since it was looked at.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(full)
        .map_err(
            |e| if e.raw_os_error() == Some(libc::ELOOP) { changed() } else { named(full, e) },
        )?;
    let before = file.metadata().map_err(|e| named(full, e))?;
    if !before.is_file() || before.ino() != entry.metadata.ino() {
        return Err(changed());
    }
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(before.len());
    let mut content = Exact { file: &file, left: before.len(), full };
    tar.append_data(header, &entry.path, &mut content)?;
    let after = file.metadata().map_err(|e| named(full, e))?;
    let stamp = |m: &fs::Metadata| (m.len(), m.mtime(), m.mtime_nsec());
    if content.left > 0 || stamp(&before) != stamp(&after) {
        return Err(changed());
    }
    Ok(())
}

/// Reads exactly as much as the header says: an early end is an error, more is not read.
struct Exact<'a> {
    file: &'a File,
    left: u64,
    full: &'a Path,
}

impl Read for Exact<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let read = self.file.read(&mut buffer[..most]).map_err(|e| named(self.full, e))?;
        if read == 0 {
            let text = format!("{}: it changed while it was read", self.full.display());
            return Err(io::Error::other(text));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

/// Collects what is written into parts and waits while the queue is full.
struct Chunks {
    sender: mpsc::Sender<io::Result<Bytes>>,
    buffer: BytesMut,
    meter: Arc<Meter>,
}

impl Write for Chunks {
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
        self.meter.made.fetch_add(part.len() as u64, Ordering::Relaxed);
        self.buffer.reserve(CHUNK);
        self.sender.blocking_send(Ok(part)).map_err(|_| ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    use super::*;

    fn archive(root: &Path) -> io::Result<(Vec<u8>, Summary)> {
        let context = Context::open(root, None).unwrap();
        let mut bytes = vec![];
        let summary = pack(&context, &mut bytes)?;
        Ok((bytes, summary))
    }

    #[test]
    fn an_archive_is_the_same_for_the_same_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/x"), "content").unwrap();
        fs::set_permissions(dir.path().join("d/x"), fs::Permissions::from_mode(0o4751)).unwrap();
        symlink("./d/../d/x", dir.path().join("link")).unwrap();
        fs::hard_link(dir.path().join("d/x"), dir.path().join("same")).unwrap();
        let long: PathBuf = ["n".repeat(90), "m".repeat(90)].iter().collect();
        fs::create_dir(dir.path().join("n".repeat(90))).unwrap();
        fs::write(dir.path().join(&long), "").unwrap();
        symlink("t".repeat(200), dir.path().join("long")).unwrap();

        let (bytes, summary) = archive(dir.path()).unwrap();
        assert_eq!(bytes, archive(dir.path()).unwrap().0);
        assert_eq!(summary, Summary { entries: 7, skipped: vec![] });

        let mut seen = vec![];
        for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let header = entry.header().clone();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            let path = entry.path().unwrap().into_owned();
            let real = fs::symlink_metadata(dir.path().join(&path)).unwrap();
            assert_eq!(header.mtime().unwrap(), u64::try_from(real.mtime()).unwrap());
            assert_eq!(header.mode().unwrap(), real.mode() & 0o7777);
            let link = entry.link_name_bytes().map(std::borrow::Cow::into_owned);
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            seen.push((path, header.entry_type(), link, content));
        }
        let find = |path: &str| seen.iter().find(|(p, ..)| p == Path::new(path)).unwrap();
        assert_eq!(find("same").1, tar::EntryType::Regular);
        assert_eq!(find("same").3, "content");
        assert_eq!(find("d/x").3, "content");
        assert_eq!(find("link").2.as_deref(), Some(&b"./d/../d/x"[..]));
        assert_eq!(find("long").2.as_deref(), Some("t".repeat(200).as_bytes()));
        assert!(seen.iter().any(|(path, ..)| *path == long));
    }

    #[test]
    fn a_file_that_shrank_or_was_replaced_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "12345").unwrap();
        let file = File::open(&path).unwrap();
        let mut exact = Exact { file: &file, left: 6, full: &path };
        let error = exact.read_to_end(&mut vec![]).unwrap_err();
        assert!(error.to_string().contains("f: it changed while it was read"), "{error}");

        let entry = Entry { path: "f".into(), metadata: fs::symlink_metadata(&path).unwrap() };
        fs::rename(&path, dir.path().join("old")).unwrap();
        for replace in [
            |path: &Path| fs::write(path, "new").unwrap(),
            |path: &Path| symlink("/etc/passwd", path).unwrap(),
            |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
        ] {
            replace(&path);
            let mut tar = tar::Builder::new(vec![]);
            let error = append(&mut tar, dir.path(), &entry).unwrap_err();
            assert!(error.to_string().contains("it changed while it was read"), "{error}");
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_file_that_grows_meanwhile_is_an_error() {
        /// Appends to the file when its first bytes come out.
        struct Meddler(PathBuf, bool);
        impl Write for Meddler {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if !std::mem::replace(&mut self.1, true) {
                    OpenOptions::new().append(true).open(&self.0)?.write_all(b"more")?;
                }
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "12345").unwrap();
        let context = Context::open(dir.path(), None).unwrap();
        let error = pack(&context, Meddler(path, false)).unwrap_err();
        assert!(error.to_string().contains("it changed while it was read"), "{error}");
    }

    #[tokio::test]
    async fn the_stream_is_the_archive_and_the_meter_knows() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), vec![7; 3 * CHUNK + 1]).unwrap();
        let source = || Source::Directory(Context::open(dir.path(), None).unwrap());
        let (stream, packing) = start(source());
        let parts: Vec<_> = stream.map(Result::unwrap).collect().await;
        assert!(parts.iter().all(|part| part.len() <= CHUNK));
        assert_eq!(packing.task.await.unwrap().unwrap().entries, 1);
        assert_eq!(parts.concat(), archive(dir.path()).unwrap().0);
        assert!(packing.meter.is_complete());
        assert_eq!(packing.meter.taken(), parts.concat().len() as u64);
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_ends_the_thread() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("large")).unwrap();
        file.set_len(1 << 30).unwrap();
        let (stream, packing) = start(Source::Directory(Context::open(dir.path(), None).unwrap()));
        drop(stream);
        let error = packing.task.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        assert!(!packing.meter.is_complete());
    }

    #[tokio::test]
    async fn a_source_that_cannot_be_read_breaks_the_stream() {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::open(dir.path(), None).unwrap();
        drop(dir);
        let (stream, packing) = start(Source::Directory(context));
        let parts: Vec<_> = stream.collect().await;
        assert!(parts.last().unwrap().is_err());
        assert!(packing.task.await.unwrap().is_err());
    }
}
