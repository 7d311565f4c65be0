//! Reads a tar archive entry by entry from a stream: no file system, bounded memory, no guesses.
//!
//! Layers are attackers' bytes, and two readers that understand one archive differently are an attack
//! (CVE-2025-62518), so what is ambiguous is refused. The semantics are those of Go's `archive/tar`,
//! which made nearly every layer there is: the archive ends at two zero blocks or between entries, and
//! links, directories and devices have no data.
//!
//! [`header`]: one block. [`pax`]: extended headers. Both are pure.

mod header;
mod pax;

use std::io::{self, BufRead, Read};

pub use header::HeaderError;
pub use pax::PaxError;

use header::{BLOCK, Header};
use pax::Pax;

/// Largest extended header or long name: what Linux allows as extended attributes of one file (64 KiB
/// each) and as a path (4 KiB) fits many times.
pub const MAX_EXTENDED: u64 = 1024 * 1024;

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// It ends where more must follow.
    #[error("it ends in the middle")]
    Truncated,
    /// A header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// An extended header.
    #[error(transparent)]
    Pax(#[from] PaxError),
    /// A header for the next entry that is too long to be true.
    #[error("an extended header has {0} bytes; at most {MAX_EXTENDED} are read")]
    LargeExtended(u64),
    /// Two names, two links, or a header that belongs to no entry.
    #[error("its extended headers contradict each other, or belong to no entry")]
    Ambiguous,
    /// A type of entry that no layer has.
    #[error("it has the type {:?}, which is not taken", char::from(*.0))]
    Type(u8),
    /// Data where none can be.
    #[error("it is no regular file and states a size of {0} bytes")]
    SizeOfNothing(u64),
    /// One block of zeros and then something else.
    #[error("a block of zeros stands between entries")]
    LoneZeroBlock,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; its data follows.
    File,
    /// Another name of a file.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A directory.
    Dir,
    /// A named pipe.
    Fifo,
}

/// An entry, its names as the bytes that stand there.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub path: Vec<u8>,
    /// The target of a link.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits and perhaps others.
    pub mode: u64,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Bytes of data.
    pub size: u64,
    /// Seconds since 1970, nanoseconds.
    pub mtime: (i64, u32),
    /// Of a device: major and minor number.
    pub device: (u64, u64),
    /// Extended attributes, each name once.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An archive being read. As a [`BufRead`] it gives the data of the entry that [`Reader::entry`]
/// returned last.
pub struct Reader<R> {
    input: R,
    /// Of the entry: data not read yet, and the padding behind it.
    left: u64,
    padding: u64,
    ended: bool,
}

/// What stood before an entry.
#[derive(Default)]
struct Before {
    pax: Option<Pax>,
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl<R: BufRead> Reader<R> {
    /// Begins at the archive's first byte.
    pub fn new(input: R) -> Self {
        Self { input, left: 0, padding: 0, ended: false }
    }

    /// The stream, wherever it is.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The next entry; data of the last one that was not read is skipped.
    pub fn entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut before = Before::default();
        loop {
            let Some(header) = self.header()? else {
                let nothing =
                    before.pax.is_none() && before.name.is_none() && before.link.is_none();
                return if nothing { Ok(None) } else { Err(TarError::Ambiguous) };
            };
            let repeated = match header.kind {
                b'x' => {
                    let pax = Pax::parse(&self.extended(header.size)?)?;
                    before.pax.replace(pax).is_some()
                }
                b'g' => {
                    pax::check_global(&self.extended(header.size)?)?;
                    false
                }
                b'L' => before.name.replace(until_nul(self.extended(header.size)?)).is_some(),
                b'K' => before.link.replace(until_nul(self.extended(header.size)?)).is_some(),
                b'S' => return Err(PaxError::Sparse.into()),
                _ => return self.finish(header, before).map(Some),
            };
            if repeated {
                return Err(TarError::Ambiguous);
            }
        }
    }

    fn finish(&mut self, header: Header, before: Before) -> Result<Entry, TarError> {
        let pax = before.pax.unwrap_or_default();
        let path = one_of(pax.path, before.name)?.unwrap_or(header.name);
        let link = one_of(pax.link, before.link)?.unwrap_or(header.link);
        let kind = match header.kind {
            // The oldest format has no type for directories.
            0 if path.ends_with(b"/") => Kind::Dir,
            0 | b'0' | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Dir,
            b'6' => Kind::Fifo,
            other => return Err(TarError::Type(other)),
        };
        let size = pax.size.unwrap_or(header.size);
        if kind != Kind::File && size != 0 {
            return Err(TarError::SizeOfNothing(size));
        }
        self.data(size);
        Ok(Entry {
            path,
            link,
            kind,
            mode: header.mode,
            uid: pax.uid.unwrap_or(header.uid),
            gid: pax.gid.unwrap_or(header.gid),
            size,
            mtime: pax.mtime.unwrap_or((header.mtime, 0)),
            device: (header.major, header.minor),
            xattrs: pax.xattrs,
        })
    }

    fn data(&mut self, size: u64) {
        let block = BLOCK as u64;
        self.left = size;
        self.padding = (block - size % block) % block;
    }

    /// The next header, or none at the archive's end.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        self.skip()?;
        let Some(block) = self.block()? else { return Ok(None) };
        if block != [0; BLOCK] {
            return Ok(Some(Header::parse(&block)?));
        }
        self.ended = true;
        match self.block_at_end()? {
            Some(block) if block != [0; BLOCK] => Err(TarError::LoneZeroBlock),
            _ => Ok(None),
        }
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        if self.ended { Ok(None) } else { self.block_at_end() }
    }

    fn block_at_end(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        if self.input.fill_buf().map_err(TarError::Read)?.is_empty() {
            self.ended = true;
            return Ok(None);
        }
        self.input.read_exact(&mut block).map_err(cut)?;
        Ok(Some(block))
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENDED {
            return Err(TarError::LargeExtended(size));
        }
        self.data(size);
        let mut data = Vec::new();
        self.read_to_end(&mut data).map_err(cut)?;
        Ok(data)
    }

    fn skip(&mut self) -> Result<(), TarError> {
        self.left = self.left.saturating_add(self.padding);
        self.padding = 0;
        while self.left > 0 {
            let available = self.fill_buf().map_err(cut)?.len();
            self.consume(available);
        }
        Ok(())
    }
}

/// The data of the last entry. An archive that ends in it is [`io::ErrorKind::UnexpectedEof`].
impl<R: BufRead> BufRead for Reader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let buffer = self.input.fill_buf()?;
        if buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let length = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        Ok(&buffer[..length])
    }

    fn consume(&mut self, amount: usize) {
        self.input.consume(amount);
        self.left -= amount as u64;
    }
}

impl<R: BufRead> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(buffer)?;
        self.consume(n);
        Ok(n)
    }
}

/// GNU's and POSIX's way to say the same thing; with both, readers disagree on which counts.
fn one_of(pax: Option<Vec<u8>>, gnu: Option<Vec<u8>>) -> Result<Option<Vec<u8>>, TarError> {
    if pax.is_some() && gnu.is_some() { Err(TarError::Ambiguous) } else { Ok(pax.or(gnu)) }
}

/// GNU ends its long names with a NUL.
fn until_nul(mut name: Vec<u8>) -> Vec<u8> {
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    name.truncate(end);
    name
}

fn cut(error: io::Error) -> TarError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        TarError::Truncated
    } else {
        TarError::Read(error)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Entries = Vec<(Vec<u8>, Vec<u8>)>;

    /// All entries and their data, by this reader.
    fn read(archive: &[u8]) -> Result<Entries, TarError> {
        let mut reader = Reader::new(archive);
        let mut entries = Vec::new();
        while let Some(entry) = reader.entry()? {
            let mut data = Vec::new();
            reader.read_to_end(&mut data).map_err(cut)?;
            assert_eq!(data.len() as u64, entry.size);
            entries.push((entry.path, data));
        }
        Ok(entries)
    }

    /// By the crate that other programs use.
    fn read_by_crate(archive: &[u8]) -> Entries {
        let mut archive = ::tar::Archive::new(archive);
        let read = |entry: io::Result<::tar::Entry<'_, _>>| {
            let mut entry: ::tar::Entry<'_, &[u8]> = entry.unwrap();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            (entry.path_bytes().into_owned(), data)
        };
        archive.entries().unwrap().map(read).collect()
    }

    fn pack(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut builder = ::tar::Builder::new(Vec::new());
        for (name, data) in entries {
            let mut header = ::tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &data[..]).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn entries() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
        let entry =
            ("[a-zé]{1,80}(/[a-z]{1,90}){0,3}", prop::collection::vec(any::<u8>(), 0..1500));
        prop::collection::vec(entry, 0..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn archives_are_read_as_others_read_them(entries in entries()) {
            let archive = pack(&entries);
            prop_assert_eq!(read(&archive).unwrap(), read_by_crate(&archive));
        }

        /// With headers that still have their checksum, so that damage gets further than that.
        #[test]
        fn damage_is_an_error_or_an_archive_and_never_a_panic(
            entries in entries(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut_at in any::<prop::sample::Index>(),
        ) {
            let mut archive = pack(&entries);
            for (at, byte) in changes {
                let at = at.index(archive.len());
                archive[at] = byte;
                let block = at / BLOCK * BLOCK;
                archive[block + 148..block + 156].fill(b' ');
                let sum: u64 = archive[block..block + BLOCK].iter().map(|b| u64::from(*b)).sum();
                archive[block + 148..block + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            }
            let _ = read(&archive);
            let _ = read(&archive[..cut_at.index(archive.len() + 1)]);
        }
    }
}
