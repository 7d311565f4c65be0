//! A value as it is searched for: cut into stretches, in all forms, with what a find of each says. Pure.
//!
//! There are several ways to cut a value, and each gives stretches that are counted by themselves:
//!
//! ```text
//! whole     ─▶ stretches of up to 336 bytes ─▶ all forms ─┐
//! lines     ─▶ those of at least 8 bytes    ─▶ all forms ─┼─▶ pieces, each with its marks
//! wrapped   ─▶ what a line of base64 or hex stands for ───┤
//! samples   ─▶ up to sixteen of 24 bytes    ─▶ all forms ─┘   (of a value that is too large for the others)
//! ```
//! A stretch that weighs `Alone` marks its pieces so. One that weighs `Part` gives them the way's number and its own: a
//! file with as many of a way as the way needs has the value. A piece without marks is only masked.

use std::collections::BTreeMap;
use std::ops::Range;

use super::forms::{self, LEAST, WIDEST};
use super::weight::{Weight, Weights, variety};
use super::{samples, wrapped};

/// Longest stretch that is searched for as a whole: its longest form has about a KiB.
const STRETCH: usize = 336;
/// Longest piece: how many bytes before a place a secret may begin that ends behind it.
pub(super) const REACH: usize = STRETCH * WIDEST;
/// So many different stretches that are no proof by themselves are one together.
const ENOUGH: usize = 3;

/// All that is searched for, each with what a find of it says.
pub(super) type Pieces = BTreeMap<Vec<u8>, Marks>;

/// What a find of a piece says. Nothing where it has no marks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// The number of the secret that is there.
    pub alone: Option<usize>,
    /// Of what it is a part, with others.
    pub parts: Vec<Part>,
}

/// One of the stretches of a way to cut a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub way: usize,
    pub number: usize,
}

impl Marks {
    /// Adds what the piece says of another stretch.
    pub(super) fn join(&mut self, other: Self) {
        self.alone = self.alone.or(other.alone);
        if self.alone.is_some() {
            self.parts.clear();
            return;
        }
        for part in other.parts {
            if !self.parts.contains(&part) {
                self.parts.push(part);
            }
        }
    }

    /// Whether a find says anything.
    pub(super) fn any(&self) -> bool {
        self.alone.is_some() || !self.parts.is_empty()
    }
}

/// A value that was cut. It has the secret's number 0, and numbers its ways from 0.
#[derive(Default)]
pub(super) struct Cut {
    pub pieces: Pieces,
    /// How many stretches of each way a file has to have.
    pub needed: Vec<usize>,
}

/// A stretch on its way to be pieces.
struct Stretch<'t> {
    /// What it is counted as: the same text in another place is no other.
    text: &'t [u8],
    weight: Weight,
    pieces: Vec<Vec<u8>>,
}

impl Cut {
    /// All of a value. Nothing when it is too short. It takes time by the value's length: not for an async worker.
    pub(super) fn whole(value: &[u8]) -> Self {
        let text = value.trim_ascii_end();
        let whole = trimmed(text, 0..text.len());
        let mut cut = Self::default();
        if whole.len() < LEAST {
            return cut;
        }
        let weights = Weights::new(text);
        cut.add(stretches(text, &whole, &weights, |at| &text[at]), true);
        let lines: Vec<_> = lines(text).filter(|line| line.len() >= LEAST).collect();
        if lines.first() != Some(&whole) {
            // A long line is one, whatever it is cut into.
            let of = |line: &Range<usize>| {
                let line = line.clone();
                stretches(text, &line.clone(), &weights, move |_| &text[line.clone()])
            };
            cut.add(lines.iter().flat_map(of).collect(), false);
        }
        for lines in wrapped::of(text) {
            let stretch = |(at, line): (Range<usize>, _)| Stretch {
                text: &text[at.clone()],
                weight: weights.of(at),
                pieces: vec![line],
            };
            cut.add(lines.into_iter().map(stretch).collect(), true);
        }
        cut
    }

    /// Samples of a value, if it has any. It takes time by the value's length: not for an async worker.
    pub(super) fn samples(value: &[u8]) -> Self {
        let text = value.trim_ascii_end();
        let whole = trimmed(text, 0..text.len());
        let weights = Weights::new(text);
        let samples = samples::of(text, &weights).into_iter().map(|sample| trimmed(text, sample));
        let stretch = |at: Range<usize>| Stretch {
            text: &text[at.clone()],
            weight: if at == whole { Weight::Alone } else { weights.of(at.clone()) },
            pieces: in_all_forms(&text[at.clone()], std::slice::from_ref(&(0..at.len()))).concat(),
        };
        let mut cut = Self::default();
        cut.add(samples.filter(|sample| sample.len() >= LEAST).map(stretch).collect(), true);
        cut
    }

    /// Adds what one way to cut the value gave. `whole`: all of it together are the value.
    fn add(&mut self, mut stretches: Vec<Stretch<'_>>, whole: bool) {
        let most = stretches.iter().map(|stretch| stretch.weight).max();
        if whole && most == Some(Weight::Nothing) {
            // One byte over and over is in every file.
            for stretch in stretches.iter_mut().filter(|stretch| variety(stretch.text) > 1) {
                stretch.weight = Weight::Part;
            }
        }
        // A single part is enough only where nothing else of the value says anything.
        let least = if whole && most != Some(Weight::Alone) { 1 } else { 2 };
        let mut numbers = BTreeMap::new();
        for stretch in stretches.iter().filter(|stretch| stretch.weight == Weight::Part) {
            let next = numbers.len();
            numbers.entry(stretch.text).or_insert(next);
        }
        let enough = numbers.len() >= least;
        let way = self.needed.len();
        self.needed.push(numbers.len().min(ENOUGH));
        for stretch in stretches {
            let part =
                numbers.get(stretch.text).filter(|_| enough && stretch.weight == Weight::Part);
            let marks = Marks {
                alone: (stretch.weight == Weight::Alone).then_some(0),
                parts: part.map(|number| Part { way, number: *number }).into_iter().collect(),
            };
            for piece in stretch.pieces {
                self.pieces.entry(piece).or_default().join(marks.clone());
            }
        }
    }
}

/// A part of a text in stretches, counted as `counted` says. One alone is the whole and says all if the text is no more.
fn stretches<'t>(
    text: &'t [u8],
    part: &Range<usize>,
    weights: &Weights<'_>,
    counted: impl Fn(Range<usize>) -> &'t [u8],
) -> Vec<Stretch<'t>> {
    let cuts = cuts(part.len());
    let whole = *part == trimmed(text, 0..text.len()) && cuts.len() == 1;
    let forms = in_all_forms(&text[part.clone()], &cuts);
    let stretch = |(cut, pieces): (Range<usize>, _)| {
        let at = part.start + cut.start..part.start + cut.end;
        let weight = if whole { Weight::Alone } else { weights.of(at.clone()) };
        Stretch { text: counted(at), weight, pieces }
    };
    cuts.into_iter().zip(forms).map(stretch).collect()
}

/// For each stretch its pieces in all forms.
fn in_all_forms(text: &[u8], cuts: &[Range<usize>]) -> Vec<Vec<Vec<u8>>> {
    let mut of_each = vec![vec![]; cuts.len()];
    for form in forms::of(text, cuts) {
        for (all, piece) in of_each.iter_mut().zip(form) {
            all.push(piece);
        }
    }
    of_each
}

/// Where a text of a length is cut, the last stretch not too short to be searched for.
fn cuts(length: usize) -> Vec<Range<usize>> {
    let (mut all, mut at) = (vec![], 0);
    while at < length {
        let rest = length - at;
        let next = match rest {
            ..=STRETCH => rest,
            _ if rest < STRETCH + LEAST => rest - LEAST,
            _ => STRETCH,
        };
        all.push(at..at + next);
        at += next;
    }
    all
}

/// The lines of a text, without blanks at their ends.
fn lines(text: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut end = 0;
    text.split_inclusive(|byte| *byte == b'\n').map(move |line| {
        let start = end;
        end += line.len();
        trimmed(text, start..end)
    })
}

/// A part of a text without blanks at its ends.
fn trimmed(text: &[u8], part: Range<usize>) -> Range<usize> {
    let end = part.start + text[part.clone()].trim_ascii_end().len();
    end - text[part.start..end].trim_ascii_start().len()..end
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn marks<'c>(cut: &'c Cut, piece: &[u8]) -> Option<&'c Marks> {
        cut.pieces.get(piece)
    }

    #[test]
    fn lines_are_searched_for_as_they_weigh() {
        let key =
            b"-----BEGIN KEY-----\nMIIEvQIBADANBg9w\n[global]\nshort\nport = 80\n-----END KEY-----\n";
        let cut = Cut::whole(key);
        let alone = Marks { alone: Some(0), parts: vec![] };
        assert_eq!(marks(&cut, key.trim_ascii()), Some(&alone));
        assert_eq!(marks(&cut, b"MIIEvQIBADANBg9w"), Some(&alone));
        assert_eq!(marks(&cut, hex::encode("MIIEvQIBADANBg9w").as_bytes()), Some(&alone));
        // Armor is masked and says nothing.
        assert_eq!(marks(&cut, b"-----END KEY-----"), Some(&Marks::default()));
        assert_eq!(marks(&cut, b"short"), None);
        let parts = |piece: &[u8]| marks(&cut, piece).map(|marks| marks.parts.clone());
        let part = |number| Some(vec![Part { way: 1, number }]);
        assert_eq!((parts(b"[global]"), parts(b"port = 80")), (part(0), part(1)));
        assert_eq!(parts(hex::encode("port = 80").as_bytes()), part(1));
        assert_eq!(cut.needed[1], 2);
        assert!(Cut::whole(b" 1234567\n").pieces.is_empty());
    }

    #[test]
    fn a_part_that_has_no_other_says_nothing() {
        let cut = Cut::whole(b"[global]\nindex-url = https://user:hunter2hunter2@pypi.org/");
        assert_eq!(marks(&cut, b"[global]"), Some(&Marks::default()));
    }

    /// Whatever the lines of a value say, all of it together is the value.
    #[test]
    fn a_value_that_says_nothing_is_still_found_whole() {
        for value in [&b"0000!0001\n1111!0001\n".repeat(40)[..], &b"0110".repeat(300)] {
            let cut = Cut::whole(value);
            let parts = &cut.pieces[&value[..STRETCH]].parts;
            assert_eq!(parts.len(), 1);
            assert!((1..=ENOUGH).contains(&cut.needed[parts[0].way]));
        }
        assert!(!Cut::whole(&[b'='; 4000]).pieces.values().any(Marks::any));
    }

    #[test]
    fn the_same_stretch_twice_is_one() {
        let period: Vec<u8> = (0..84).map(|n| b"abcdefghijkl"[n % 12]).collect();
        let cut = Cut::whole(&period.repeat(40));
        assert_eq!(cut.pieces[&period.repeat(4)].parts, [Part { way: 0, number: 0 }]);
        assert_eq!(cut.needed[0], 1);
        let lines = Cut::whole(&b"user: me and you\n".repeat(100));
        assert_eq!(lines.pieces[&b"user: me and you"[..]], Marks::default());
    }

    #[test]
    fn a_text_is_cut_at_every_length() {
        for length in [1, 8, 335, 336, 337, 343, 344, 672, 679, 680, 10_000] {
            let cuts = cuts(length);
            assert_eq!(cuts.iter().map(ExactSizeIterator::len).sum::<usize>(), length);
            let of_size = |cut: &Range<usize>| (LEAST..=STRETCH).contains(&cut.len());
            assert!(length < LEAST || cuts.iter().all(of_size), "{length}: {cuts:?}");
        }
    }

    #[test]
    fn the_samples_of_any_value_are_small() {
        // What each kind of URL-encoding keeps, letters in its digits, blanks, base64 of both alphabets.
        let nasty: Vec<u8> = b"\xff\xfe~ !\xef(*\xfb '".repeat(50_000);
        for value in [&nasty[..nasty.len() / 2], &[b'a', 0xff, 0xfb, 0xef].repeat(100_000)] {
            let cut = Cut::samples(value);
            let longest = samples::LENGTH * (1 + 2 * 2 + 13 * WIDEST) + 6 * samples::LENGTH * 4 / 3;
            assert_eq!(longest, 1248);
            let bytes: usize = cut.pieces.keys().map(Vec::len).sum();
            assert!(bytes <= samples::MOST * longest, "{bytes}");
            assert!(cut.pieces.len() <= samples::MOST * forms::MOST);
        }
        let small = Cut::samples(b"correct horse\n");
        assert_eq!(marks(&small, b"correct horse").and_then(|marks| marks.alone), Some(0));
        assert!(Cut::samples(&vec![0; 100_000]).pieces.is_empty());
    }

    proptest! {
        #[test]
        fn pieces_are_as_long_as_the_search_expects(
            value in proptest::collection::vec(any::<u8>(), 0..3000),
            lines in "([a-z0-9 ]{0,20}\n){0,40}",
        ) {
            for value in [&value[..], lines.as_bytes()] {
                for cut in [Cut::whole(value), Cut::samples(value)] {
                    let fits = |piece: &Vec<u8>| (LEAST..=REACH).contains(&piece.len());
                    prop_assert!(cut.pieces.keys().all(fits));
                    let mut parts = cut.pieces.values().flat_map(|marks| &marks.parts);
                    prop_assert!(parts.all(|part| part.way < cut.needed.len()));
                }
            }
        }
    }
}
