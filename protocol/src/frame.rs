//! The bounded codec: a 4-byte big-endian length, then one postcard value.

use postcard::ser_flavors::{Flavor, Size};
use postcard::serialize_with_flavor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most bytes of a frame's value.
pub const MAX_FRAME: usize = 1024 * 1024;

const PREFIX: usize = 4;

/// A frame that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer closed the connection between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection broke, or ended inside a frame.
    #[error("the connection broke")]
    Io(#[source] std::io::Error),
    /// The value is larger than a frame may be.
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLarge(usize),
    /// The bytes are not a value of the expected type.
    #[error("a frame does not decode")]
    Malformed(#[source] postcard::Error),
    /// Bytes are left over after the value.
    #[error("{0} bytes follow the value of a frame")]
    Trailing(usize),
}

/// The bytes of a frame, length included. A value that is too large is refused before there is room for it.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, FrameError> {
    Ok(encode_around(value, usize::MAX)?.before)
}

/// A frame without a long slice of its value, for who has those bytes anyway and need not copy them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Around {
    /// What comes before the slice, the frame's length included.
    pub before: Vec<u8>,
    /// How long the slice is; 0 where the value has none, and `before` is the whole frame.
    pub left_out: usize,
    /// What comes behind it.
    pub behind: Vec<u8>,
}

/// [`encode`], but without the value's first slice of at least `least` bytes.
pub fn encode_around<T: Serialize>(value: &T, least: usize) -> Result<Around, FrameError> {
    let len = serialize_with_flavor(value, Size::default()).map_err(FrameError::Malformed)?;
    let prefix = match u32::try_from(len) {
        Ok(prefix) if len <= MAX_FRAME => prefix.to_be_bytes(),
        _ => return Err(FrameError::TooLarge(len)),
    };
    // Of one with a slice that is left out, little more is known than that its head is short.
    let room = if len < least { PREFIX + len } else { AROUND };
    let mut before = Vec::with_capacity(room);
    before.extend_from_slice(&prefix);
    let frame = Around { before, left_out: 0, behind: Vec::new() };
    serialize_with_flavor(value, Writer { frame, least }).map_err(FrameError::Malformed)
}

/// Room for what an event has around its content.
const AROUND: usize = 48;

/// What a value is written to. Unlike postcard's own, it takes a slice as a slice.
struct Writer {
    frame: Around,
    least: usize,
}

impl Writer {
    fn end(&mut self) -> &mut Vec<u8> {
        if self.frame.left_out == 0 { &mut self.frame.before } else { &mut self.frame.behind }
    }
}

impl Flavor for Writer {
    type Output = Around;

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.end().push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        if self.frame.left_out == 0 && bytes.len() >= self.least {
            self.frame.left_out = bytes.len();
        } else {
            self.end().extend_from_slice(bytes);
        }
        Ok(())
    }

    fn finalize(self) -> postcard::Result<Around> {
        Ok(self.frame)
    }
}

/// The value of a frame's bytes, without the length.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FrameError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(FrameError::Malformed)?;
    if rest.is_empty() { Ok(value) } else { Err(FrameError::Trailing(rest.len())) }
}

/// Writes one frame and flushes it.
pub async fn write<W, T>(writer: &mut W, value: &T) -> Result<(), FrameError>
where
    W: AsyncWrite + Unpin,
    T: Serialize,
{
    let bytes = encode(value)?;
    writer.write_all(&bytes).await.map_err(FrameError::Io)?;
    writer.flush().await.map_err(FrameError::Io)
}

/// Reads one frame and not a byte more, so that `reader` can serve something else next. Not cancel-safe.
pub async fn read<R, T>(reader: &mut R) -> Result<T, FrameError>
where
    R: AsyncRead + Unpin,
    T: DeserializeOwned,
{
    let mut frames = FrameReader::new(reader);
    frames.ahead = false;
    frames.read().await
}

/// Reads frames one after another.
///
/// It reads ahead, so that one read of the connection serves several frames: what follows a frame
/// has to be a frame, and be read by the same reader. Where something else may follow, see [`read`].
///
/// [`FrameReader::read`] is cancel-safe: a read that was dropped half-way goes on where it was, so
/// it can stand in a `select!`.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: R,
    /// Whether more may be read than the frame that is asked for.
    ahead: bool,
    /// What was read; up to `taken` it has been given out.
    buffer: Vec<u8>,
    taken: usize,
}

/// How much is read at once. It holds a frame of the largest piece of a session's output, and a peer's
/// largest packet.
const BUFFER: usize = 64 * 1024 + 512;

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `reader`.
    pub fn new(reader: R) -> Self {
        Self { reader, ahead: true, buffer: Vec::new(), taken: 0 }
    }

    /// The next frame's value. The deadline is the caller's.
    pub async fn read<T: DeserializeOwned>(&mut self) -> Result<T, FrameError> {
        loop {
            let held = &self.buffer[self.taken..];
            let mut needed = PREFIX;
            if let Some((prefix, rest)) = held.split_first_chunk() {
                let len = u32::from_be_bytes(*prefix) as usize;
                if len > MAX_FRAME {
                    return Err(FrameError::TooLarge(len));
                }
                if let Some(value) = rest.get(..len) {
                    let value = decode(value);
                    self.take(PREFIX + len);
                    return value;
                }
                needed = PREFIX + len;
            }
            self.make_room(needed);
            let limit = if self.ahead { self.buffer.capacity() } else { needed };
            let room = (limit.min(self.buffer.capacity()) - self.buffer.len()) as u64;
            let read = (&mut self.reader).take(room).read_buf(&mut self.buffer).await;
            match read.map_err(FrameError::Io)? {
                0 if self.buffer.is_empty() => return Err(FrameError::Closed),
                0 => return Err(FrameError::Io(std::io::ErrorKind::UnexpectedEof.into())),
                _ => {}
            }
        }
    }

    /// Gives out the next `len` bytes.
    fn take(&mut self, len: usize) {
        self.taken += len;
        if self.taken == self.buffer.len() {
            self.buffer.clear();
            self.taken = 0;
            // A large frame's room is not kept.
            self.buffer.shrink_to(BUFFER);
        }
    }

    /// Makes room for a frame of `needed` bytes whose end has not come. The room grows as bytes arrive, so
    /// that a length alone costs a peer's victim little.
    fn make_room(&mut self, needed: usize) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let held = self.buffer.len();
        if needed <= BUFFER {
            self.buffer.shrink_to(BUFFER);
        }
        let room = needed.min(held * 2).max(BUFFER);
        self.buffer.reserve_exact(room - held);
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the limit is small")]
mod tests {
    use super::*;

    async fn read_all(bytes: &[u8]) -> Result<Vec<u8>, FrameError> {
        FrameReader::new(bytes).read::<Vec<u8>>().await
    }

    /// A vector whose postcard value is exactly `len` bytes long.
    fn value_of(len: usize) -> Vec<u8> {
        let mut value = vec![7; len];
        while postcard::to_stdvec(&value).unwrap().len() > len {
            value.pop();
        }
        value
    }

    #[tokio::test]
    async fn the_largest_frame_passes_and_one_byte_more_does_not() {
        let largest = value_of(MAX_FRAME);
        let bytes = encode(&largest).unwrap();
        assert_eq!(bytes.len(), PREFIX + MAX_FRAME);
        assert_eq!(read_all(&bytes).await.unwrap(), largest);

        let larger = value_of(MAX_FRAME + 1);
        assert!(matches!(encode(&larger), Err(FrameError::TooLarge(n)) if n == MAX_FRAME + 1));
    }

    #[tokio::test]
    async fn an_oversized_length_is_refused_before_its_bytes() {
        for len in [MAX_FRAME as u32 + 1, u32::MAX] {
            let error = read_all(&len.to_be_bytes()).await.unwrap_err();
            assert!(matches!(error, FrameError::TooLarge(_)), "{error}");
        }
    }

    #[tokio::test]
    async fn a_length_alone_allocates_little() {
        let prefix = (MAX_FRAME as u32).to_be_bytes();
        let mut reader = FrameReader::new(&prefix[..]);
        assert!(matches!(reader.read::<Vec<u8>>().await, Err(FrameError::Io(_))));
        assert!(reader.buffer.capacity() <= BUFFER);
    }

    #[tokio::test]
    async fn the_room_for_a_frame_follows_what_has_come_and_is_given_back() {
        let bytes = encode(&value_of(MAX_FRAME)).unwrap();
        let (mut near, far) = tokio::io::duplex(1024);
        let mut reader = FrameReader::new(far);
        for (at, part) in bytes.chunks(1024).enumerate() {
            tokio::select! {
                biased;
                _ = reader.read::<Vec<u8>>() => panic!("the frame is not complete yet"),
                () = std::future::ready(()) => {}
            }
            assert!(reader.buffer.capacity() <= BUFFER.max(2 * 1024 * at), "after {at} KiB");
            near.write_all(part).await.unwrap();
        }
        assert_eq!(reader.read::<Vec<u8>>().await.unwrap().len(), value_of(MAX_FRAME).len());
        assert!(reader.buffer.capacity() <= BUFFER);
    }

    #[tokio::test]
    async fn frames_around_the_buffers_size_follow_each_other() {
        let lens = [BUFFER - PREFIX - 1, BUFFER - PREFIX, BUFFER - PREFIX + 1, BUFFER, 1, BUFFER];
        let bytes: Vec<u8> = lens.iter().flat_map(|&len| encode(&value_of(len)).unwrap()).collect();
        let mut reader = FrameReader::new(&bytes[..]);
        for len in lens {
            assert_eq!(reader.read::<Vec<u8>>().await.unwrap(), value_of(len), "{len}");
        }
        assert!(matches!(reader.read::<Vec<u8>>().await, Err(FrameError::Closed)));
    }

    #[tokio::test]
    async fn one_frame_is_read_and_not_a_byte_more() {
        for len in [1, 100, BUFFER, 3 * BUFFER] {
            let mut bytes = encode(&value_of(len)).unwrap();
            bytes.extend(b"something else");
            let mut stream = &bytes[..];
            assert_eq!(read::<_, Vec<u8>>(&mut stream).await.unwrap(), value_of(len));
            assert_eq!(stream, b"something else");
        }
        let error = read::<_, Vec<u8>>(&mut &[][..]).await.unwrap_err();
        assert!(matches!(error, FrameError::Closed), "{error}");
    }

    #[test]
    fn a_frame_around_a_slice_is_the_frame_without_it() {
        let value =
            (7u8, "short".to_owned(), "a long text".to_owned(), "another long one".to_owned());
        let whole = encode(&value).unwrap();
        for least in [10, 11, 12, 16, 17] {
            let Around { before, left_out, behind } = encode_around(&value, least).unwrap();
            let slice = match least {
                ..=11 => &*value.2,
                12..=16 => &*value.3,
                _ => "",
            };
            assert_eq!(left_out, slice.len(), "{least}");
            assert_eq!([&before, slice.as_bytes(), &behind].concat(), whole, "{least}");
        }
        let error = encode_around(&value_of(MAX_FRAME + 1), 1).unwrap_err();
        assert!(matches!(error, FrameError::TooLarge(_)), "{error}");
    }

    #[tokio::test]
    async fn trailing_bytes_and_empty_frames_are_refused() {
        let mut bytes = encode(&1u8).unwrap();
        bytes[PREFIX - 1] = 2;
        bytes.push(0);
        let error = FrameReader::new(&bytes[..]).read::<u8>().await.unwrap_err();
        assert!(matches!(error, FrameError::Trailing(1)), "{error}");
        let error = FrameReader::new(&[0, 0, 0, 0][..]).read::<u8>().await.unwrap_err();
        assert!(matches!(error, FrameError::Malformed(_)), "{error}");
    }

    #[tokio::test]
    async fn the_end_between_frames_is_told_from_the_end_inside_one() {
        assert!(matches!(read_all(&[]).await, Err(FrameError::Closed)));
        let bytes = encode(&vec![1u8, 2, 3]).unwrap();
        for cut in 1..bytes.len() {
            let error = read_all(&bytes[..cut]).await.unwrap_err();
            assert!(matches!(error, FrameError::Io(_)), "cut at {cut}: {error}");
        }
    }

    #[tokio::test]
    async fn a_read_that_was_dropped_goes_on() {
        let (mut near, far) = tokio::io::duplex(1024);
        let mut reader = FrameReader::new(far);
        let bytes = encode(&vec![5u8; 100]).unwrap();
        for part in bytes.chunks(3) {
            let read = reader.read::<Vec<u8>>();
            tokio::select! {
                biased;
                _ = read => panic!("the frame is not complete yet"),
                () = std::future::ready(()) => {}
            }
            near.write_all(part).await.unwrap();
        }
        assert_eq!(reader.read::<Vec<u8>>().await.unwrap(), vec![5u8; 100]);
        write(&mut near, &vec![6u8]).await.unwrap();
        assert_eq!(reader.read::<Vec<u8>>().await.unwrap(), vec![6u8]);
    }
}
