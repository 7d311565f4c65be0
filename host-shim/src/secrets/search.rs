//! The search for a build's secrets: built once for all of them, then only asked. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};

use super::forms;

/// Longest piece that is searched for as a whole; a longer form is cut into such pieces.
pub(super) const PIECE: usize = 1024;
/// How many bytes before a place a secret may begin that ends behind it.
pub(super) const REACH: usize = PIECE + forms::LEAST;
/// Up to so many bytes of pieces the fastest search is built; it takes a KiB of memory for each.
const MAX_FAST: usize = 16 * 1024;

/// What is searched for, each with the number of its secret.
pub(super) type Pieces = BTreeMap<Vec<u8>, usize>;

/// Finds pieces.
#[derive(Debug)]
pub(super) struct Search {
    automaton: AhoCorasick,
    /// The secret's number of each pattern.
    owners: Vec<usize>,
    pieces: Arc<Pieces>,
}

impl Search {
    /// It takes time by the pieces' length: not for an async worker. Only what takes gigabytes does not build.
    pub(super) fn new(pieces: Arc<Pieces>) -> Option<Self> {
        let bytes: usize = pieces.keys().map(Vec::len).sum();
        let kind = (bytes > MAX_FAST).then_some(AhoCorasickKind::ContiguousNFA);
        let mut builder = AhoCorasick::builder();
        let builder = builder.match_kind(MatchKind::LeftmostLongest).kind(kind);
        let automaton = builder.build(pieces.keys()).ok()?;
        Some(Self { automaton, owners: pieces.values().copied().collect(), pieces })
    }

    /// The number of the first secret in a text, and where it ends.
    pub(super) fn first(&self, text: &[u8]) -> Option<(usize, usize)> {
        let found = self.automaton.find(text)?;
        Some((*self.owners.get(found.pattern().as_usize())?, found.end()))
    }

    /// A text with `mask` in the place of what is found.
    pub(super) fn replaced(&self, text: &[u8], mask: &[u8]) -> Vec<u8> {
        let (mut masked, mut rest) = (Vec::with_capacity(text.len()), 0);
        for found in self.automaton.find_iter(text) {
            masked.extend_from_slice(&text[rest..found.start()]);
            // One for several pieces of the same.
            if found.start() > rest || !masked.ends_with(mask) {
                masked.extend_from_slice(mask);
            }
            rest = found.end();
        }
        masked.extend_from_slice(&text[rest..]);
        masked
    }

    /// Where the end begins that more could change: it is the beginning of a piece, or within one that is.
    pub(super) fn open(&self, text: &[u8]) -> usize {
        let from = text.len().saturating_sub(REACH - 1);
        let Some(at) = (from..text.len()).find(|at| self.begins(&text[*at..])) else {
            return text.len();
        };
        // One secret may be the beginning of another.
        let mut all = self.automaton.find_iter(text).take_while(|found| found.start() < at);
        all.find(|found| at < found.end()).map_or(at, |found| found.start())
    }

    /// Whether a piece begins with the text and goes on. In order, such pieces come right behind the text.
    fn begins(&self, text: &[u8]) -> bool {
        let behind = (Bound::Excluded(text), Bound::Unbounded);
        let next = self.pieces.range::<[u8], _>(behind).next();
        next.is_some_and(|(piece, _)| piece.starts_with(text))
    }
}

/// All that is searched for because of a value, each once. It takes time by the value's length: not for an async worker.
pub(super) fn pieces_of(value: &[u8]) -> BTreeSet<Vec<u8>> {
    forms::of(value).iter().flat_map(|form| pieces(form)).map(<[u8]>::to_vec).collect()
}

/// A form in pieces, the last of them not too short to be searched for.
fn pieces(form: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = form;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let length = if rest.len() < REACH { rest.len() } else { PIECE };
        let (piece, behind) = rest.split_at(length);
        rest = behind;
        Some(piece)
    })
}
