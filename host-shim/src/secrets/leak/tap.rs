//! Searches what passes, in chunks: how small the pieces are in which it comes does not matter.

use std::io::{self, Read};

use super::{Bounds, CHUNK};
use crate::secrets::Masker;
use crate::secrets::search::REACH;

/// Unpacked bytes on their way to whoever names them.
pub(super) struct Tap<'s> {
    inner: Box<dyn Read + 's>,
    masker: &'s Masker,
    bounds: &'s Bounds,
    /// The end of what passed, which a secret may have begun in, and then what was searched and is to pass next.
    buffer: Vec<u8>,
    /// Where in the buffer that begins.
    at: usize,
    /// How much was forgotten before the buffer.
    before: u64,
    /// The first secret, and where it ends.
    found: Option<(String, u64)>,
}

impl<'s> Tap<'s> {
    pub(super) fn new(inner: Box<dyn Read + 's>, masker: &'s Masker, bounds: &'s Bounds) -> Self {
        Self { inner, masker, bounds, buffer: vec![], at: 0, before: 0, found: None }
    }

    /// The first secret, once all of it has passed.
    pub(super) fn passed(&self) -> Option<&str> {
        let here = self.before + self.at as u64;
        self.found.as_ref().filter(|(_, end)| *end <= here).map(|(secret, _)| secret.as_str())
    }

    /// Reads up to `length` bytes, fewer only at the end.
    pub(super) fn read(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut read = Vec::with_capacity(length);
        while read.len() < length {
            let next = self.next()?;
            let next = &next[..next.len().min(length - read.len())];
            if next.is_empty() {
                break;
            }
            read.extend_from_slice(next);
            self.at += next.len();
        }
        Ok(read)
    }

    /// Lets so many bytes pass. False when there are fewer.
    pub(super) fn skip(&mut self, mut length: u64) -> io::Result<bool> {
        while length > 0 {
            let next = self.next()?.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            if next == 0 {
                return Ok(false);
            }
            self.at += next;
            length -= next as u64;
        }
        Ok(true)
    }

    /// What passes next; nothing at the end only.
    fn next(&mut self) -> io::Result<&[u8]> {
        if self.at == self.buffer.len() {
            self.fill()?;
        }
        Ok(&self.buffer[self.at..])
    }

    fn fill(&mut self) -> io::Result<()> {
        let old = self.buffer.len().saturating_sub(REACH);
        self.buffer.drain(..old);
        self.before += old as u64;
        self.at = self.buffer.len();
        let mut filled = self.at;
        self.buffer.resize(self.at + CHUNK, 0);
        while filled < self.buffer.len() {
            self.bounds.check()?;
            let length = self.inner.read(&mut self.buffer[filled..])?;
            self.bounds.spend(length)?;
            if length == 0 {
                break;
            }
            filled += length;
        }
        self.buffer.truncate(filled);
        if self.found.is_none()
            && let Some((secret, end)) = self.masker.first(&self.buffer)
        {
            self.found = Some((secret.to_owned(), self.before + end as u64));
        }
        Ok(())
    }
}
