//! Takes secrets out of what a build prints, before anything of it is stored.
//!
//! Lines come in parts. What could be the beginning of a secret at the end of a part waits for the next part of the
//! same line; at a line's end nothing waits.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use kiln_protocol::event::LogStream;
use kiln_protocol::secret::SecretValue;
use sha2::{Digest as _, Sha256};

use super::known::{Known, Made, Unmasked, Way};
use super::leak::Gate;
use super::search::Search;

/// What stands in a secret's place.
pub const MASK: &[u8] = b"***";
/// Stands where somebody cut a text.
const CUT: char = '…';

/// A build's secrets, as they are searched for.
#[derive(Default)]
pub struct Masker {
    known: Known,
    /// Of all pieces; empty again with every new one.
    search: OnceLock<Option<Arc<Search>>>,
    /// The ends of begun lines that may be the beginning of a secret.
    waiting: HashMap<(u8, Option<u32>), Vec<u8>>,
}

impl std::fmt::Debug for Masker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Masker({} pieces)", self.known.pieces.len())
    }
}

impl Masker {
    /// Masks a value from now on. It blocks for as long as the value's forms take.
    pub fn add(&mut self, id: &str, value: &[u8]) -> Result<(), Unmasked> {
        let digest = Sha256::digest(value).into();
        if let Some(verdict) = self.known.verdict(&digest) {
            return verdict;
        }
        let made = Made::new(value, self.known.is_too_long(value.len()));
        self.enter(digest, id, value.len(), made)
    }

    /// Masks a value from now on. Its forms are made elsewhere.
    pub async fn learn(&mut self, id: &str, value: &SecretValue) -> Result<(), Unmasked> {
        let digest = Sha256::digest(value.expose()).into();
        if let Some(verdict) = self.known.verdict(&digest) {
            return verdict;
        }
        let too_long = self.known.is_too_long(value.expose().len());
        let copy = SecretValue::new(value.expose().to_vec());
        let made = tokio::task::spawn_blocking(move || Made::new(copy.expose(), too_long)).await;
        // The runtime ends; what is given must be masked all the same.
        let made = made.unwrap_or_else(|_| Made::new(value.expose(), too_long));
        self.enter(digest, id, value.expose().len(), made)
    }

    /// Builds the search for what has come, elsewhere. Whoever searches without waits for it in place.
    pub async fn prepare(&mut self) {
        if self.is_empty() || self.search.get().is_some() {
            return;
        }
        let pieces = Arc::clone(&self.known.pieces);
        if let Ok(search) = tokio::task::spawn_blocking(move || Search::new(pieces)).await {
            // It was empty above, and nobody else has it.
            let _ = self.search.set(search.map(Arc::new));
        }
    }

    fn enter(
        &mut self,
        digest: [u8; 32],
        id: &str,
        length: usize,
        made: Made,
    ) -> Result<(), Unmasked> {
        // It shares the pieces, which would be copied for one more.
        self.search = OnceLock::new();
        self.known.enter(digest, id, length, made)
    }

    /// Whether there is nothing to mask.
    pub fn is_empty(&self) -> bool {
        self.known.pieces.is_empty()
    }

    /// The gate of the image that the build made. It blocks for as long as its search takes to be built.
    pub fn into_gate(mut self) -> Gate {
        if Search::does_for_gate(&self.known.pieces) {
            let search = self.search().cloned();
            return Gate::new(self, search);
        }
        // Its memory is free before another is built.
        self.search = OnceLock::new();
        let says = self.known.pieces.iter().filter(|(_, marks)| marks.any());
        let pieces = says.map(|(piece, marks)| (piece.clone(), marks.clone())).collect();
        let search = Search::for_gate(Arc::new(pieces)).map(Arc::new);
        Gate::new(self, search)
    }

    /// How many parts of a way are a leak of which secret.
    pub(super) fn way(&self, way: usize) -> Option<&Way> {
        self.known.ways.get(way)
    }

    /// The id of a secret by its number.
    pub(super) fn id(&self, owner: usize) -> Option<&str> {
        self.known.owners.get(owner).map(String::as_str)
    }

    /// A part of a line of a step's stream, masked. `partial`: more of the line follows.
    pub fn part(
        &mut self,
        stream: LogStream,
        step: Option<u32>,
        content: &[u8],
        partial: bool,
    ) -> Vec<u8> {
        let key = (stream as u8, step);
        let mut text = self.waiting.remove(&key).unwrap_or_default();
        text.extend_from_slice(content);
        let Some(search) = self.search() else { return text };
        let rest = text.split_off(if partial { search.open(&text) } else { text.len() });
        let masked = search.replaced(&text, MASK);
        if !rest.is_empty() {
            self.waiting.insert(key, rest);
        }
        masked
    }

    /// A whole text, masked. Where it was cut, which a mark tells, it does not keep what may be the beginning of a secret.
    pub fn text(&self, text: &str) -> String {
        let Some(search) = self.search() else { return text.to_owned() };
        let mut masked = String::with_capacity(text.len());
        for part in text.split_inclusive(CUT) {
            let (whole, mark) = match part.strip_suffix(CUT) {
                Some(cut) => (&cut.as_bytes()[..search.open(cut.as_bytes())], Some(CUT)),
                None => (part.as_bytes(), None),
            };
            masked.push_str(&String::from_utf8_lossy(&search.replaced(whole, MASK)));
            masked.extend(mark);
        }
        masked
    }

    fn search(&self) -> Option<&Arc<Search>> {
        if self.is_empty() {
            return None;
        }
        let build = || Search::new(Arc::clone(&self.known.pieces)).map(Arc::new);
        self.search.get_or_init(build).as_ref()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    use super::super::known::{MAX_BYTES, MAX_FORM_BYTES, MAX_PIECES};
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
        assert_eq!(
            masker.add("id", &vec![7; MAX_BYTES + 1]),
            Err(Unmasked::Long { sampled: false })
        );
        assert!(masker.is_empty());
        assert_eq!(out(&mut masker, b"1234567", true), "1234567");
    }

    #[test]
    fn a_text_that_was_cut_does_not_end_in_half_a_secret() {
        let masker = masker(&[b"hunter2hunter2", b"hunter2hunter2-of-another"]);
        for (text, expected) in [
            ("echo hunter2hun…", "echo …"),
            ("login hunter2hunter2-of…\nnext: hunter2hunter2", "login …\nnext: ***"),
            ("hunter2hunt… and hunter2h…", "… and …"),
            ("nothing of it …", "nothing of it …"),
            ("not cut: hunter2hun", "not cut: hunter2hun"),
            ("…", "…"),
            ("", ""),
        ] {
            assert_eq!(masker.text(text), expected, "{text}");
        }
    }

    #[test]
    fn bytes_that_became_replacement_characters_are_masked() {
        let masker = masker(&[b"\xffhunter2\xfe\xfehunter3"]);
        let shown = String::from_utf8_lossy(b"it says \xffhunter2\xfe\xfehunter3!").into_owned();
        assert_eq!(masker.text(&shown), "it says ***!");
        // Nobody could tell these from other bytes that are no text.
        let masker = self::masker(&[&[0xff; 16]]);
        assert_eq!(masker.text(&"\u{fffd}".repeat(20)), "\u{fffd}".repeat(20));
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

    #[test]
    fn every_line_of_a_wrapped_value_is_masked() {
        let value: Vec<u8> = (0..300_u32).flat_map(|n| n.to_string().into_bytes()).collect();
        let (b64, hex) = (STANDARD.encode(&value), hex::encode(&value));
        let mut masker = masker(&[&value]);
        for (digits, columns) in [(&b64, 76), (&b64, 64), (&hex, 60)] {
            for line in digits.as_bytes().chunks(columns).filter(|line| line.len() == columns) {
                assert_eq!(out(&mut masker, line, false), "***");
            }
        }
    }

    #[test]
    fn lines_are_masked_whatever_they_weigh() {
        let mut masker = masker(&[b"[global]\n-----BEGIN X-----\npassword = hunter2\n11111111\n"]);
        for line in ["[global]", "-----BEGIN X-----", "password = hunter2", "11111111"] {
            assert_eq!(out(&mut masker, line.as_bytes(), false), "***", "{line}");
        }
    }

    #[test]
    fn samples_of_a_large_value_are_masked_and_the_rest_is_not() {
        let value: Vec<u8> = (0..20_000_u32).flat_map(|n| n.to_string().into_bytes()).collect();
        let mut masker = Masker::default();
        assert_eq!(masker.add("big", &value), Err(Unmasked::Long { sampled: true }));
        assert!(!masker.is_empty());
        let shown = out(&mut masker, &value, false);
        assert_eq!(shown.matches("***").count(), 16);
        assert_eq!(shown.len(), value.len() - 16 * (24 - 3));
    }

    /// As a hostile build has it: many short lines that differ, in values that differ.
    fn lines(number: usize, lines: usize) -> Vec<u8> {
        (0..lines).flat_map(|line| format!("{number:04}!{line:04}\n").into_bytes()).collect()
    }

    #[test]
    fn all_forms_of_a_build_are_bounded() {
        let mut masker = Masker::default();
        let verdicts: Vec<_> =
            (0..64).map(|n| masker.add(&n.to_string(), &lines(n, 100))).collect();
        let taken = verdicts.iter().take_while(|verdict| verdict.is_ok()).count();
        assert!((8..64).contains(&taken), "{taken}");
        assert!(
            verdicts[taken..]
                .iter()
                .all(|verdict| *verdict == Err(Unmasked::Forms { sampled: true }))
        );
        assert!(masker.known.form_bytes <= MAX_FORM_BYTES && masker.known.counted <= MAX_PIECES);
        // It was refused, and is refused again; nothing of it is masked, and all of the others.
        assert_eq!(masker.add("again", &lines(63, 100)), Err(Unmasked::Forms { sampled: true }));
        assert_eq!(out(&mut masker, b"0063!0001 0001!0001", false), "0063!0001 ***");
        // One that is left room for is taken.
        assert_eq!(masker.add("small", b"hunter2hunter2"), Ok(()));
        assert_eq!(out(&mut masker, b"hunter2hunter2", false), "***");
    }

    /// What takes long is done elsewhere, and once: the only worker goes on meanwhile.
    #[tokio::test]
    async fn a_hostile_secret_does_not_keep_an_async_worker() {
        let mut masker = Masker::default();
        for number in 0..8 {
            let value = SecretValue::new(lines(number, 100));
            masker.learn(&number.to_string(), &value).await.unwrap();
            assert!(masker.search.get().is_none(), "built before all have come");
        }
        masker.prepare().await;
        assert!(masker.search.get().is_some());
        // Each part ends in what may be the beginning of a secret.
        let began = std::time::Instant::now();
        let part = [&[b'0'; 2000][..], b"0001!0"].concat();
        for _ in 0..100 {
            masker.part(LogStream::Stdout, Some(1), &part, true);
        }
        assert!(began.elapsed() < std::time::Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!(out(&mut masker, b"001 0002!0002", false), "*** ***");
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
