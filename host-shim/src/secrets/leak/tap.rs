//! Searches what passes, in chunks: how small the pieces are in which it comes does not matter.

use std::collections::VecDeque;
use std::io::{self, Read};

use super::gate::{Evidence, Gate};
use super::{Bounds, CHUNK};
use crate::secrets::cut::{Marks, REACH};

/// Unpacked bytes on their way to whoever names them.
pub(super) struct Tap<'s> {
    inner: Box<dyn Read + 's>,
    gate: &'s Gate,
    bounds: &'s Bounds,
    /// The end of what passed, which a secret may have begun in, and then what was searched and is to pass next.
    buffer: Vec<u8>,
    /// Where in the buffer that begins.
    at: usize,
    /// How much was forgotten before the buffer.
    before: u64,
    /// What was found in what is to pass next, by where it ends. Up to one for each byte of a chunk.
    ahead: VecDeque<(u64, &'s Marks)>,
    /// What was found in what passed of this file.
    evidence: Evidence<'s>,
}

impl<'s> Tap<'s> {
    pub(super) fn new(inner: Box<dyn Read + 's>, gate: &'s Gate, bounds: &'s Bounds) -> Self {
        let (buffer, ahead, evidence) = (vec![], VecDeque::new(), Evidence::new(gate));
        Self { inner, gate, bounds, buffer, at: 0, before: 0, ahead, evidence }
    }

    /// The first secret that what passed of this file holds.
    pub(super) fn passed(&mut self) -> Option<&'s str> {
        let here = self.before + self.at as u64;
        while let Some((_, marks)) = self.ahead.pop_front_if(|(end, _)| *end <= here) {
            self.evidence.take(marks);
        }
        self.evidence.leaked()
    }

    /// What passes next is of another file.
    pub(super) fn next_file(&mut self) {
        self.passed();
        self.evidence.clear();
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
        let leaked = self.passed().is_some();
        let old = self.buffer.len().saturating_sub(REACH);
        self.buffer.drain(..old);
        self.before += old as u64;
        self.at = self.buffer.len();
        let searched = self.at;
        let mut filled = searched;
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
        // This file is told when it ends; nothing behind it is.
        if !leaked {
            self.look(searched);
        }
        Ok(())
    }

    /// Finds what ends behind a place in the buffer.
    fn look(&mut self, from: usize) {
        for hit in self.gate.hits(&self.buffer, from) {
            self.ahead.push_back((self.before + hit.end as u64, hit.marks));
            if hit.marks.alone.is_some() {
                break;
            }
        }
        // One may begin before another and end behind it.
        self.ahead.make_contiguous().sort_by_key(|(end, _)| *end);
    }
}
