//! Names what passes: the entries of a layer, as tar has them.
//!
//! Names are for people. Whatever a layer says of itself, all its bytes pass, and what is kept of what it says is
//! bounded; the format is that of POSIX `pax`, with GNU tar's long names and sparse files.

use std::io;

use tar::{GnuExtSparseHeader, Header, PaxExtensions};

use super::Leak;
use super::tap::Tap;

const BLOCK: usize = 512;
/// How much of a header's extension is looked at; what is behind is only searched. Extended attributes may stand
/// before a name.
const MAX_EXTENSION: usize = 64 * 1024;
/// Longest name that is told: Linux opens none that is longer.
const MAX_NAME: usize = 4096;

/// What extensions say of the entry that comes next.
#[derive(Default)]
struct Ahead {
    name: Option<Vec<u8>>,
    size: Option<u64>,
}

/// The first secret, with the name of the entry that it is in. `None` at the end, and where it is no archive any more.
pub(super) fn entries(tap: &mut Tap<'_>) -> io::Result<Option<Leak>> {
    let mut ahead = Ahead::default();
    loop {
        let block = tap.read(BLOCK)?;
        if block.len() < BLOCK {
            return Ok(None);
        }
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let header = Header::from_byte_slice(&block);
        let Some(size) = size(header) else { return Ok(None) };
        let kind = header.entry_type();
        let whole = if kind.is_gnu_longname() {
            let (text, whole) = extension(tap, size)?;
            ahead.name = text.split(|byte| *byte == 0).next().map(<[u8]>::to_vec);
            whole
        } else if kind.is_pax_local_extensions() {
            let (text, whole) = extension(tap, size)?;
            ahead.read_pax(&text);
            whole
        } else if kind.is_gnu_longlink() || kind.is_pax_global_extensions() {
            skip_padded(tap, size)?
        } else {
            let said = std::mem::take(&mut ahead);
            let whole = sparse_map(tap, header)? && skip_padded(tap, said.size.unwrap_or(size))?;
            if let Some(secret) = tap.passed() {
                let mut name = said.name.unwrap_or_else(|| header.path_bytes().into_owned());
                name.truncate(MAX_NAME);
                let path = Some(String::from_utf8_lossy(&name).into_owned());
                return Ok(Some(Leak { secret: secret.to_owned(), path }));
            }
            tap.next_file();
            whole
        };
        if !whole {
            return Ok(None);
        }
    }
}

impl Ahead {
    fn read_pax(&mut self, text: &[u8]) {
        for record in PaxExtensions::new(text).map_while(Result::ok) {
            match record.key_bytes() {
                b"path" => self.name = Some(record.value_bytes().to_vec()),
                b"size" => self.size = record.value().ok().and_then(|size| size.parse().ok()),
                _ => {}
            }
        }
    }
}

/// How long the entry is, by a header that is one.
fn size(header: &Header) -> Option<u64> {
    let bytes = header.as_bytes();
    let sum: u32 = bytes[..148].iter().chain(&bytes[156..]).map(|byte| u32::from(*byte)).sum();
    // The sum counts its own place as blanks.
    (header.cksum().ok()? == sum + 8 * u32::from(b' ')).then_some(())?;
    header.entry_size().ok()
}

/// The beginning of an extension, and whether all of it was there.
fn extension(tap: &mut Tap<'_>, size: u64) -> io::Result<(Vec<u8>, bool)> {
    let kept = usize::try_from(size).unwrap_or(usize::MAX).min(MAX_EXTENSION);
    let text = tap.read(kept)?;
    let whole = text.len() == kept && skip_rest(tap, size, kept as u64)?;
    Ok((text, whole))
}

/// Passes the blocks in which GNU tar goes on to say where a sparse file has content.
fn sparse_map(tap: &mut Tap<'_>, header: &Header) -> io::Result<bool> {
    let is_sparse = header.entry_type().is_gnu_sparse();
    let mut more = is_sparse && header.as_gnu().is_some_and(tar::GnuHeader::is_extended);
    while more {
        let block = tap.read(BLOCK)?;
        if block.len() < BLOCK {
            return Ok(false);
        }
        let mut map = GnuExtSparseHeader::new();
        map.as_mut_bytes().copy_from_slice(&block);
        more = map.is_extended();
    }
    Ok(true)
}

fn skip_padded(tap: &mut Tap<'_>, size: u64) -> io::Result<bool> {
    skip_rest(tap, size, 0)
}

/// Passes what is left of an entry, up to the next block. An entry that no file can hold is passed as far as it is.
fn skip_rest(tap: &mut Tap<'_>, size: u64, read: u64) -> io::Result<bool> {
    tap.skip(size.checked_next_multiple_of(BLOCK as u64).unwrap_or(u64::MAX) - read)
}
