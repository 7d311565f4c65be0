//! The bounded codec: a 4-byte big-endian length, then one postcard value.

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

/// The bytes of a frame, length included.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(value, vec![0; PREFIX]).map_err(FrameError::Malformed)?;
    let len = bytes.len() - PREFIX;
    match u32::try_from(len) {
        Ok(prefix) if len <= MAX_FRAME => bytes[..PREFIX].copy_from_slice(&prefix.to_be_bytes()),
        _ => return Err(FrameError::TooLarge(len)),
    }
    Ok(bytes)
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

/// Reads frames one after another.
///
/// [`FrameReader::read`] is cancel-safe: a read that was dropped half-way goes on where it was, so
/// it can stand in a `select!`.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: R,
    prefix: [u8; PREFIX],
    /// Bytes of prefix and value read so far.
    filled: usize,
    value: Vec<u8>,
}

/// A value's buffer grows as its bytes arrive, so that a length alone costs a peer's victim little.
const GROW: usize = 64 * 1024;

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `reader`.
    pub fn new(reader: R) -> Self {
        Self { reader, prefix: [0; PREFIX], filled: 0, value: Vec::new() }
    }

    /// The next frame's value. The deadline is the caller's.
    pub async fn read<T: DeserializeOwned>(&mut self) -> Result<T, FrameError> {
        while self.filled < PREFIX {
            let read = self.reader.read(&mut self.prefix[self.filled..]).await;
            match read.map_err(FrameError::Io)? {
                0 if self.filled == 0 => return Err(FrameError::Closed),
                0 => return Err(ended_inside()),
                n => self.filled += n,
            }
        }
        let len = u32::from_be_bytes(self.prefix) as usize;
        if len > MAX_FRAME {
            return Err(FrameError::TooLarge(len));
        }
        while self.filled < PREFIX + len {
            let at = self.filled - PREFIX;
            if self.value.len() == at {
                self.value.resize(len.min(at + GROW), 0);
            }
            let end = len.min(self.value.len());
            match self.reader.read(&mut self.value[at..end]).await.map_err(FrameError::Io)? {
                0 => return Err(ended_inside()),
                n => self.filled += n,
            }
        }
        let value = decode(&self.value[..len]);
        self.filled = 0;
        // What is kept need not be filled with zeros for the next one.
        self.value.truncate(GROW);
        self.value.shrink_to(GROW);
        value
    }
}

fn ended_inside() -> FrameError {
    FrameError::Io(std::io::ErrorKind::UnexpectedEof.into())
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
        assert!(reader.value.capacity() <= GROW);
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
