//! Unpacks a layer's blob in a thread of its own, and checks both of its digests.
//!
//! ```text
//! blob ─▶ hash (descriptor's digest) ─▶ gunzip | unzstd ─▶ chunks ─▶ hash (diff_id), count ─▶ reader
//! └──────────────── this thread's ───────────────────┘   a few    └────── the caller's ──────────┘
//! ```
//! The form is told by the first bytes, as containerd and Docker do: media types lie. What is not
//! compressed is taken for tar, and its first header says whether it is.

use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use flate2::bufread::MultiGzDecoder;
use tokio_util::sync::CancellationToken;

use super::limits::TooLarge;
use super::window::Window;
use crate::digest::{Digest, Hashing};

/// Unpacked at a time.
const CHUNK: usize = 1024 * 1024;
/// Chunks between the threads: enough to keep both busy, 4 MiB of memory.
const AHEAD: usize = 4;
/// Read from the blob at a time.
const INPUT: usize = 256 * 1024;
/// zstd's own default: a frame may ask for a window of 128 MiB, the most memory that unpacking takes.
const ZSTD_WINDOW_LOG: u32 = 27;

/// A blob's digest and size, as it was read.
pub type Checked = (Digest, u64);

/// Unpacks `blob` while `consume` reads; at most `limit` bytes. Gives what `consume` made, and what the blob and
/// the unpacked bytes were, each of them whole, whatever `consume` left unread.
pub fn unpack<T, E: From<io::Error>>(
    blob: Window,
    limit: u64,
    what: &'static str,
    cancel: &CancellationToken,
    consume: impl FnOnce(&mut Unpacked) -> Result<T, E>,
) -> Result<(T, Checked, Checked), E> {
    let (full, chunks) = sync_channel(AHEAD);
    let (empty, used) = channel();
    std::thread::scope(|scope| {
        let unpacking = scope.spawn(move || produce(blob, &full, &used, cancel));
        let mut unpacked = Unpacked::new(chunks, empty, limit, what);
        let made = match consume(&mut unpacked) {
            Ok(made) => unpacked.drain().map(|checked| (made, checked)).map_err(E::from),
            Err(error) => Err(error),
        };
        // Without a receiver the other thread cannot send, and ends.
        drop(unpacked);
        let blob = unpacking.join().map_err(|_| io::Error::other("the unpacking thread died"))?;
        let (made, unpacked) = made?;
        Ok((made, blob?, unpacked))
    })
}

/// The other thread. Errors go where they are read; what is returned counts when there was none.
fn produce(
    blob: Window,
    full: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
    cancel: &CancellationToken,
) -> io::Result<Checked> {
    let mut blob = BufReader::with_capacity(INPUT, Hashed::new(blob, cancel));
    let sent = form(&mut blob).and_then(|form| match form {
        Form::Gzip => send(&mut MultiGzDecoder::new(&mut blob), full, empty),
        Form::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(&mut blob)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            send(&mut decoder, full, empty)
        }
        Form::Tar => send(&mut blob, full, empty),
    });
    // What a decoder left is part of the blob all the same.
    let rest = sent.and_then(|()| io::copy(&mut blob, &mut io::sink()));
    if let Err(error) = rest {
        let kind = error.kind();
        // Nobody listens any more when the reader failed first.
        let _ = full.send(Err(error));
        return Err(kind.into());
    }
    Ok(blob.into_inner().hash.finish())
}

enum Form {
    Gzip,
    Zstd,
    Tar,
}

fn form(blob: &mut impl BufRead) -> io::Result<Form> {
    // RFC 1952, 2.3.1; RFC 8878, 3.1.1 and 3.1.2 (a skippable frame may come first).
    Ok(match blob.fill_buf()? {
        [0x1f, 0x8b, ..] => Form::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Form::Zstd,
        _ => Form::Tar,
    })
}

fn send(
    from: &mut impl Read,
    full: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
) -> io::Result<()> {
    loop {
        let mut chunk = empty.try_recv().unwrap_or_default();
        chunk.clear();
        from.by_ref().take(CHUNK as u64).read_to_end(&mut chunk)?;
        if chunk.is_empty() {
            return Ok(());
        }
        full.send(Ok(chunk)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
    }
}

/// Hashes and counts what is read; ends when it is cancelled.
struct Hashed<'a> {
    inner: Window,
    hash: Hashing<io::Sink>,
    cancel: &'a CancellationToken,
}

impl<'a> Hashed<'a> {
    fn new(inner: Window, cancel: &'a CancellationToken) -> Self {
        Self { inner, hash: Hashing::new(io::sink()), cancel }
    }
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let n = self.inner.read(buffer)?;
        self.hash.write_all(&buffer[..n])?;
        Ok(n)
    }
}

/// The unpacked bytes, counted and hashed as they arrive.
pub struct Unpacked {
    chunks: Receiver<io::Result<Vec<u8>>>,
    empty: Sender<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
    size: u64,
    limit: TooLarge,
    hash: Hashing<io::Sink>,
}

impl Unpacked {
    fn new(
        chunks: Receiver<io::Result<Vec<u8>>>,
        empty: Sender<Vec<u8>>,
        limit: u64,
        what: &'static str,
    ) -> Self {
        let limit = TooLarge { what, limit };
        let hash = Hashing::new(io::sink());
        Self { chunks, empty, chunk: Vec::new(), at: 0, size: 0, limit, hash }
    }

    /// Reads what is left: a tar archive's end is not the stream's.
    fn drain(&mut self) -> io::Result<Checked> {
        loop {
            let length = self.fill_buf()?.len();
            if length == 0 {
                let hash = std::mem::replace(&mut self.hash, Hashing::new(io::sink()));
                return Ok(hash.finish());
            }
            self.consume(length);
        }
    }

    fn next(&mut self) -> io::Result<()> {
        // A sender that has gone has sent all there is.
        let Ok(chunk) = self.chunks.recv() else { return Ok(()) };
        let used = std::mem::replace(&mut self.chunk, chunk?);
        self.at = 0;
        // The other thread may have ended.
        let _ = self.empty.send(used);
        self.size += self.chunk.len() as u64;
        if self.size > self.limit.limit {
            return Err(io::Error::other(self.limit));
        }
        self.hash.write_all(&self.chunk)
    }
}

impl BufRead for Unpacked {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.chunk.len() {
            self.next()?;
        }
        Ok(&self.chunk[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(buffer)?;
        self.consume(n);
        Ok(n)
    }
}
