//! The search for a build's secrets: built once for all of them, then only asked. Pure.

use std::ops::Bound;
use std::sync::Arc;

use aho_corasick::{AhoCorasick, AhoCorasickKind, Input, MatchKind};

use super::cut::{Marks, Pieces, REACH};

/// Up to so many bytes of pieces the fastest search is built; it takes up to a KiB of memory for each.
const MAX_FAST: usize = 16 * 1024;
/// The same for a gate, which lives only as long as an image is searched: a key file's pieces, searched twice as fast.
const MAX_FAST_GATE: usize = 64 * 1024;

/// How often a text may be gone through again for what begins within a hit. In what nobody made for it that is less than
/// once: only a pattern over and over has hits within hits within hits.
const AGAIN: usize = 4;

/// Finds pieces.
#[derive(Debug)]
pub(super) struct Search {
    automaton: AhoCorasick,
    /// What a find of each pattern says.
    marks: Vec<Marks>,
    pieces: Arc<Pieces>,
}

/// A piece in a text.
#[derive(Debug)]
pub(super) struct Hit<'s> {
    pub end: usize,
    pub marks: &'s Marks,
}

impl Search {
    /// For what is printed. It takes time by the pieces' length: not for an async worker. Only what takes gigabytes does
    /// not build.
    pub(super) fn new(pieces: Arc<Pieces>) -> Option<Self> {
        Self::build(pieces, MAX_FAST)
    }

    /// For an image, as [`Self::new`].
    pub(super) fn for_gate(pieces: Arc<Pieces>) -> Option<Self> {
        Self::build(pieces, MAX_FAST_GATE)
    }

    /// Whether a gate has the same search for these pieces.
    pub(super) fn does_for_gate(pieces: &Pieces) -> bool {
        let bytes = length(pieces);
        pieces.values().all(Marks::any) && (bytes <= MAX_FAST || bytes > MAX_FAST_GATE)
    }

    fn build(pieces: Arc<Pieces>, max_fast: usize) -> Option<Self> {
        let fast = length(&pieces) <= max_fast;
        // What the library chooses by itself is not the fastest for more than a hundred pieces.
        let kind = if fast { AhoCorasickKind::DFA } else { AhoCorasickKind::ContiguousNFA };
        let mut builder = AhoCorasick::builder();
        let builder = builder.match_kind(MatchKind::LeftmostLongest).kind(Some(kind));
        let automaton = builder.build(pieces.keys()).ok()?;
        Some(Self { automaton, marks: with_beginnings(&pieces), pieces })
    }

    /// Every place in a text where a piece begins that ends behind `from`, by the longest there. What is within
    /// another hit is left out if it does not say all by itself.
    ///
    /// Where hits are few it is one pass. The work is bounded: when too much was gone through again, what begins within
    /// a hit is not looked for any more.
    pub(super) fn hits<'s, 't>(
        &'s self,
        text: &'t [u8],
        from: usize,
    ) -> impl Iterator<Item = Hit<'s>> + use<'s, 't> {
        let (mut at, mut covered, mut left) = (0, from, AGAIN * text.len());
        std::iter::from_fn(move || {
            loop {
                let found = self.automaton.find(Input::new(text).range(at..))?;
                let end = found.end();
                at = if left == 0 { end } else { found.start() + 1 };
                left = left.saturating_sub(found.len());
                let marks = self.marks.get(found.pattern().as_usize())?;
                if end > covered || (end > from && marks.alone.is_some()) {
                    covered = covered.max(end);
                    return Some(Hit { end, marks });
                }
            }
        })
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

fn length(pieces: &Pieces) -> usize {
    pieces.keys().map(Vec::len).sum()
}

/// The marks of each piece in order. What begins with a piece that says all says all too: the longest is found.
fn with_beginnings(pieces: &Pieces) -> Vec<Marks> {
    let mut beginnings: Vec<(&[u8], usize)> = vec![];
    let mut all = Vec::with_capacity(pieces.len());
    for (piece, marks) in pieces {
        while beginnings.last().is_some_and(|(beginning, _)| !piece.starts_with(beginning)) {
            beginnings.pop();
        }
        let mut marks = marks.clone();
        match (marks.alone, beginnings.last()) {
            (Some(owner), _) => beginnings.push((piece, owner)),
            (None, Some((_, owner))) => marks.alone = Some(*owner),
            (None, None) => {}
        }
        all.push(marks);
    }
    all
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::cut::Part;
    use super::*;

    fn search(pieces: &[(&str, Marks)]) -> Search {
        let pieces = pieces.iter().map(|(piece, marks)| (piece.as_bytes().to_vec(), marks.clone()));
        Search::new(Arc::new(pieces.collect())).unwrap()
    }

    fn alone(owner: usize) -> Marks {
        Marks { alone: Some(owner), parts: vec![] }
    }

    fn part(number: usize) -> Marks {
        Marks { alone: None, parts: vec![Part { way: 0, number }] }
    }

    fn ends(search: &Search, text: &str, from: usize) -> Vec<usize> {
        search.hits(text.as_bytes(), from).map(|hit| hit.end).collect()
    }

    #[test]
    fn the_search_goes_on_after_a_hit_and_within_it() {
        let search = search(&[
            ("part one", part(0)),
            ("one two", part(1)),
            ("art o", part(2)),
            ("t on", alone(7)),
            ("part", alone(8)),
        ]);
        // `art o` is within another and says no more.
        assert_eq!(ends(&search, "a part one two", 0), [10, 9, 14]);
        assert_eq!(ends(&search, "a part one two", 9), [10, 14]);
        assert_eq!(ends(&search, "a part one two", 10), [14]);
        // It begins with what is a find by itself.
        assert_eq!(search.hits(b"part one", 0).next().map(|hit| hit.marks.alone), Some(Some(8)));
        assert_eq!(search.hits(b"one two", 0).next().map(|hit| hit.marks.clone()), Some(part(1)));
    }

    #[test]
    fn a_pattern_over_and_over_is_not_gone_through_for_ever() {
        let text = "abcdef".repeat(10_000);
        let whole = &text[..300];
        let search = search(&[(whole, part(0)), ("efab", part(1)), ("f and the end", alone(1))]);
        let hits = search.hits(text.as_bytes(), 0).filter(|hit| *hit.marks == part(0)).count();
        // Each of 300 bytes.
        assert!(hits <= (AGAIN + 1) * text.len() / 300, "{hits}");
        // What is behind is found all the same.
        let behind = format!("{text} f and the end");
        assert_eq!(
            search.hits(behind.as_bytes(), 0).last().map(|hit| hit.marks.alone),
            Some(Some(1))
        );
    }
}
