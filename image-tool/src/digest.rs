//! SHA-256 digests in the form that OCI uses, and hashing while copying.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::file::{self, FileError};

/// `sha256:` and 64 lowercase hexadecimal digits. Nothing else can be held, so that a digest is
/// safe as a file name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// A text that is no SHA-256 digest.
#[derive(Debug, thiserror::Error)]
#[error("not a digest of the form sha256:<64 hexadecimal digits>")]
pub struct NotADigest;

const PREFIX: &str = "sha256:";
const HEX_DIGITS: usize = 64;
/// Large enough that system calls do not show beside hashing.
const BUFFER: usize = 256 * 1024;

impl Digest {
    /// Checks and takes over a text.
    pub fn parse(text: &str) -> Result<Self, NotADigest> {
        let hex = text.strip_prefix(PREFIX).ok_or(NotADigest)?;
        let good =
            hex.len() == HEX_DIGITS && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if good { Ok(Self(text.to_owned())) } else { Err(NotADigest) }
    }

    /// The digest of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_hash(Sha256::new_with_prefix(bytes))
    }

    /// The digest and the size of a file.
    pub fn of_file(path: &Path) -> Result<(Self, u64), FileError> {
        let mut input = file::open(path)?;
        copy(&mut input, &mut io::sink()).map_err(|e| FileError::new("read", path, e))
    }

    /// The whole text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 digits: the blob's file name.
    pub fn hex(&self) -> &str {
        &self.0[PREFIX.len()..]
    }

    fn from_hash(hash: Sha256) -> Self {
        Self(format!("{PREFIX}{}", hex::encode(hash.finalize())))
    }
}

/// Copies all of `input` and says what it was.
pub fn copy(input: &mut impl Read, output: &mut impl Write) -> io::Result<(Digest, u64)> {
    let mut hashing = Hashing::new(output);
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        hashing.write_all(&buffer[..n])?;
    }
    Ok(hashing.finish())
}

/// A writer that hashes and counts what goes through it.
pub struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Hashing<W> {
    /// Passes everything on to `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), size: 0 }
    }

    /// What went through.
    pub fn finish(self) -> (Digest, u64) {
        (Digest::from_hash(self.hash), self.size)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl TryFrom<String> for Digest {
    type Error = NotADigest;

    fn try_from(text: String) -> Result<Self, NotADigest> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn the_digest_of_nothing_is_the_known_one() {
        assert_eq!(Digest::of(b"").as_str(), EMPTY);
        assert_eq!(Digest::parse(EMPTY).unwrap(), Digest::of(b""));
    }

    #[test]
    fn only_full_lowercase_sha256_is_taken() {
        let upper = EMPTY.to_uppercase();
        let longer = format!("{EMPTY}0");
        let path = format!("sha256:../{}", &EMPTY[10..]);
        for bad in ["", "sha256:", &EMPTY[..70], &longer, &upper, &path, &EMPTY[7..]] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn copying_tells_digest_and_size() {
        let mut out = Vec::new();
        let (digest, size) = copy(&mut &b"kiln"[..], &mut out).unwrap();
        assert_eq!((digest, size, out.as_slice()), (Digest::of(b"kiln"), 4, &b"kiln"[..]));
    }
}
