//! Takes secrets out of what a build prints, before anything of it is stored.
//!
//! Lines come in parts. What could be the beginning of a secret at the end of a part waits for the next part of the
//! same line; at a line's end nothing waits.

use std::collections::HashMap;

use aho_corasick::{AhoCorasick, MatchKind};
use kiln_protocol::event::LogStream;
use kiln_protocol::secret::SecretValue;

use super::forms;

/// What stands in a secret's place.
pub const MASK: &[u8] = b"***";
/// Most bytes of all values that are masked in one build: what is searched for is kept in memory, in some thirty forms.
const MAX_BYTES: usize = 64 * 1024;
/// Longest piece that is searched for as a whole; a longer form is cut into such pieces.
const PIECE: usize = 1024;
/// How many bytes before a place a secret may begin that ends behind it.
pub(super) const REACH: usize = PIECE + forms::LEAST;

/// Why a secret is not masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unmasked {
    /// It would be found everywhere.
    #[error("is shorter than {} bytes", forms::LEAST)]
    Short,
    /// Too much to be searched for.
    #[error("is, with the others, longer than {MAX_BYTES} bytes")]
    Long,
}

/// A build's secrets, as they are searched for.
#[derive(Default)]
pub struct Masker {
    pieces: Vec<Vec<u8>>,
    /// The id of each piece's secret.
    owners: Vec<String>,
    bytes: usize,
    values: Vec<SecretValue>,
    search: Option<AhoCorasick>,
    /// Pieces by their first byte.
    beginning: HashMap<u8, Vec<usize>>,
    /// The ends of begun lines that may be the beginning of a secret.
    waiting: HashMap<(u8, Option<u32>), Vec<u8>>,
}

impl std::fmt::Debug for Masker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Masker({} pieces)", self.pieces.len())
    }
}

impl Masker {
    /// Masks a value from now on.
    pub fn add(&mut self, id: &str, value: &[u8]) -> Result<(), Unmasked> {
        if self.values.iter().any(|known| known.expose() == value) {
            // Asked for again after a broken connection.
            return Ok(());
        }
        if self.bytes + value.len() > MAX_BYTES {
            return Err(Unmasked::Long);
        }
        let forms = forms::of(value);
        if forms.is_empty() {
            return Err(Unmasked::Short);
        }
        self.bytes += value.len();
        self.values.push(SecretValue::new(value.to_vec()));
        for piece in forms.iter().flat_map(|form| pieces(form)) {
            if !self.pieces.iter().any(|known| known == piece) {
                self.beginning.entry(piece[0]).or_default().push(self.pieces.len());
                self.pieces.push(piece.to_vec());
                self.owners.push(id.to_owned());
            }
        }
        // Only a search over gigabytes does not build.
        self.search =
            AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&self.pieces).ok();
        Ok(())
    }

    /// Whether there is nothing to mask.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// A part of a line of a step's stream, masked. `partial`: more of the line follows.
    pub fn part(
        &mut self,
        stream: LogStream,
        step: Option<u32>,
        content: &[u8],
        partial: bool,
    ) -> Vec<u8> {
        let Some(search) = &self.search else { return content.to_vec() };
        let key = (stream as u8, step);
        let mut text = self.waiting.remove(&key).unwrap_or_default();
        text.extend_from_slice(content);
        let end = if partial { self.open(search, &text) } else { text.len() };
        if end < text.len() {
            self.waiting.insert(key, text.split_off(end));
        }
        replaced(search, &text)
    }

    /// The id of the first secret in a text.
    pub fn find(&self, text: &[u8]) -> Option<&str> {
        self.first(text).map(|(secret, _)| secret)
    }

    /// The id of the first secret in a text, and where it ends.
    pub(super) fn first(&self, text: &[u8]) -> Option<(&str, usize)> {
        let found = self.search.as_ref()?.find(text)?;
        let owner = self.owners.get(found.pattern().as_usize())?;
        Some((owner, found.end()))
    }

    /// A whole text, masked.
    pub fn text(&self, text: &str) -> String {
        let Some(search) = &self.search else { return text.to_owned() };
        String::from_utf8_lossy(&replaced(search, text.as_bytes())).into_owned()
    }

    /// Where the end begins that more could change: it is the beginning of a piece, or within one that is.
    fn open(&self, search: &AhoCorasick, text: &[u8]) -> usize {
        let from = text.len().saturating_sub(PIECE + forms::LEAST - 1);
        let begins = |at: &usize| {
            let tail = &text[*at..];
            let goes_on = |n: &usize| {
                let piece = &self.pieces[*n];
                piece.len() > tail.len() && piece.starts_with(tail)
            };
            self.beginning.get(&tail[0]).is_some_and(|pieces| pieces.iter().any(goes_on))
        };
        let Some(at) = (from..text.len()).find(begins) else { return text.len() };
        // One secret may be the beginning of another.
        let around = search.find_iter(text).find(|found| found.start() < at && at < found.end());
        around.map_or(at, |found| found.start())
    }
}

/// A text with the masks.
fn replaced(search: &AhoCorasick, text: &[u8]) -> Vec<u8> {
    let (mut masked, mut rest) = (Vec::with_capacity(text.len()), 0);
    for found in search.find_iter(text) {
        masked.extend_from_slice(&text[rest..found.start()]);
        // One for several pieces of the same.
        if found.start() > rest || !masked.ends_with(MASK) {
            masked.extend_from_slice(MASK);
        }
        rest = found.end();
    }
    masked.extend_from_slice(&text[rest..]);
    masked
}

/// A form in pieces, the last of them not too short to be searched for.
fn pieces(form: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = form;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let length = if rest.len() < PIECE + forms::LEAST { rest.len() } else { PIECE };
        let (piece, behind) = rest.split_at(length);
        rest = behind;
        Some(piece)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    use super::*;

    fn masker(values: &[&[u8]]) -> Masker {
        let mut masker = Masker::default();
        for value in values {
            masker.add("id", value).unwrap();
        }
        masker
    }

    fn out(masker: &mut Masker, content: &[u8], partial: bool) -> String {
        String::from_utf8(masker.part(LogStream::Stdout, Some(1), content, partial)).unwrap()
    }

    #[test]
    fn every_form_is_masked_and_the_rest_stays() {
        let mut masker = self::masker(&[b"hunter2hunter2\n"]);
        let b64 = STANDARD.encode("x hunter2hunter2 y");
        for (line, expected) in [
            ("token=hunter2hunter2;", "token=***;".to_owned()),
            ("hunter2hunter2 and hunter2hunter2", "*** and ***".to_owned()),
            ("68756e7465723268756e74657232", "***".to_owned()),
            ("hunter2hunter", "hunter2hunter".to_owned()),
        ] {
            assert_eq!(out(&mut masker, line.as_bytes(), false), expected);
        }
        let shown = out(&mut masker, b64.as_bytes(), false);
        assert!(shown.contains("***") && shown.len() < b64.len(), "{shown}");
        assert_eq!(masker.text("failed: hunter2hunter2"), "failed: ***");
    }

    #[test]
    fn what_cannot_be_masked_says_so() {
        let mut masker = Masker::default();
        assert_eq!(masker.add("id", b"1234567\n"), Err(Unmasked::Short));
        assert_eq!(masker.add("id", &vec![7; MAX_BYTES + 1]), Err(Unmasked::Long));
        assert!(masker.is_empty());
        assert_eq!(out(&mut masker, b"1234567", true), "1234567");
    }

    #[test]
    fn a_prompt_does_not_wait_and_what_may_be_a_secret_does() {
        let mut masker = masker(&[b"hunter2hunter2"]);
        assert_eq!(out(&mut masker, b"Password: ", true), "Password: ");
        assert_eq!(out(&mut masker, b"it is hunt", true), "it is ");
        // Another stream has its own line.
        let other = masker.part(LogStream::Stderr, Some(1), b"er2hunter2", false);
        assert_eq!(other, b"er2hunter2");
        assert_eq!(out(&mut masker, b"er2hunter2!", true), "***!");
        assert_eq!(out(&mut masker, b"hunt", true), "");
        assert_eq!(out(&mut masker, b"", false), "hunt");
    }

    #[test]
    fn a_secret_that_begins_another_waits_too() {
        let mut masker = masker(&[b"password", b"password-of-another"]);
        assert_eq!(out(&mut masker, b"a password", true), "a ");
        assert_eq!(out(&mut masker, b"-of-another", true), "***");
        assert_eq!(out(&mut masker, b"password", true), "");
        assert_eq!(out(&mut masker, b"!", false), "***!");
    }

    #[test]
    fn a_long_value_is_masked_whole() {
        let value: Vec<u8> = (0..5000_u32).flat_map(|n| n.to_string().into_bytes()).collect();
        let mut masker = masker(&[&value]);
        assert_eq!(out(&mut masker, &[b"<", &value[..], b">"].concat(), false), "<***>");
        let b64 = STANDARD.encode(&value);
        assert!(out(&mut masker, b64.as_bytes(), false).len() < 10);
    }

    proptest! {
        /// However a line is cut into parts, what comes out holds no secret and is what a whole line gives.
        #[test]
        fn parts_are_masked_as_the_whole(
            pieces in proptest::collection::vec("(hunter2|secret99|x|hunter2secret99|secret99secret99| ){0,6}", 1..6),
        ) {
            let secret = b"hunter2secret99";
            let line = pieces.concat();
            let mut whole = masker(&[secret]);
            let expected = out(&mut whole, line.as_bytes(), false);
            let mut parts = masker(&[secret]);
            let mut got = String::new();
            for (index, piece) in pieces.iter().enumerate() {
                got.push_str(&out(&mut parts, piece.as_bytes(), index + 1 < pieces.len()));
            }
            prop_assert!(!got.contains("hunter2secret99"), "{}", got);
            // Two secrets side by side are one mask or two, by where the cut is.
            prop_assert_eq!(got.replace("***", ""), expected.replace("***", ""));
        }
    }
}
