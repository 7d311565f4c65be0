//! What an archive is packed in, by its first bytes.

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

/// Bytes that are read ahead of a decoder. Half of the pieces that the host sends.
const READ_AHEAD: usize = 128 * 1024;

/// Largest zstd window, as a power of two: 128 MiB, which is zstd's own limit without `--long=31`.
/// A frame that asks for more is refused before it gets memory.
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

/// As many first bytes as the longest magic has.
const MAGIC_LEN: usize = 6;

type Input<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// A reader of the archive itself.
pub enum Decoder<R: Read> {
    /// A tar, or something that is no archive: its first header will tell.
    Plain(Input<R>),
    /// gzip, of one or more members.
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    /// zstd, of one or more frames.
    Zstd(Box<zstd::Decoder<'static, Input<R>>>),
}

/// A compression that tar programs know and this does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsupported(pub &'static str);

/// Looks at the first bytes and chooses the decoder.
pub fn open<R: Read>(mut reader: R) -> io::Result<Result<Decoder<R>, Unsupported>> {
    let mut magic = Vec::with_capacity(MAGIC_LEN);
    reader.by_ref().take(MAGIC_LEN as u64).read_to_end(&mut magic)?;
    let known = match magic[..] {
        [0x1f, 0x8b, ..] => Magic::Gzip,
        // A zstd frame, or a skippable frame before one (RFC 8878, section 3.1).
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Magic::Zstd,
        [0xfd, b'7', b'z', b'X', b'Z', 0] => return Ok(Err(Unsupported("xz"))),
        [b'B', b'Z', b'h', ..] => return Ok(Err(Unsupported("bzip2"))),
        [b'P', b'K', 3, 4, ..] => return Ok(Err(Unsupported("zip"))),
        _ => Magic::None,
    };
    let input = BufReader::with_capacity(READ_AHEAD, Cursor::new(magic).chain(reader));
    Ok(Ok(match known {
        Magic::None => Decoder::Plain(input),
        Magic::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(input))),
        Magic::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(input)?;
            decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
            Decoder::Zstd(Box::new(decoder))
        }
    }))
}

enum Magic {
    None,
    Gzip,
    Zstd,
}

impl<R: Read> Decoder<R> {
    /// The name of the compression, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain(_) => "tar",
            Self::Gzip(_) => "gzip",
            Self::Zstd(_) => "zstd",
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(into),
            Self::Gzip(reader) => reader.read(into),
            Self::Zstd(reader) => reader.read(into),
        }
    }
}
