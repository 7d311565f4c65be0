//! The forms in which a secret is looked for: as it is, as UTF-8 where it is none, in base64 at every alignment, in hex, URL-encoded. Pure.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::ops::Range;

use base64::Engine as _;
use base64::alphabet::{Alphabet, STANDARD, URL_SAFE};
use base64::engine::{GeneralPurpose, GeneralPurposeConfig};

/// Shorter values are in too much that is none.
pub const LEAST: usize = 8;
/// How many bytes of a form stand for one byte at most: URL-encoded, or a replacement character.
pub(super) const WIDEST: usize = 3;
/// How many forms there are at most: the text itself, what it is as UTF-8, two of hex, six of base64, twelve URL-encoded.
#[cfg(test)]
pub(super) const MOST: usize = 22;

/// Every form of a text, each cut where the stretches are that the text is cut into: one piece for each stretch, that
/// together are the form of the whole text.
pub(super) fn of(text: &[u8], stretches: &[Range<usize>]) -> BTreeSet<Vec<Vec<u8>>> {
    let cut = |encode: &dyn Fn(&[u8]) -> Vec<u8>| -> Vec<Vec<u8>> {
        stretches.iter().map(|stretch| encode(&text[stretch.clone()])).collect()
    };
    let mut forms = BTreeSet::from([
        cut(&<[u8]>::to_vec),
        cut(&|bytes| hex::encode(bytes).into_bytes()),
        cut(&|bytes| hex::encode_upper(bytes).into_bytes()),
    ]);
    if let [_] = stretches {
        forms.extend(as_text(text).map(|text| vec![text]));
    }
    for alphabet in [&STANDARD, &URL_SAFE] {
        forms.extend((0..3).map(|offset| base64_cut(text, stretches, offset, alphabet)));
    }
    for kept in [&b"-._~"[..], b"-_.!~*'()", b"-_.*"] {
        for (upper, plus) in [(true, true), (true, false), (false, true), (false, false)] {
            forms.insert(cut(&|bytes| url_encoded(bytes, kept, upper, plus)));
        }
    }
    forms
}

/// As causes have it, that are text: with replacement characters for what is no UTF-8. Only if enough is left by which to
/// know it.
fn as_text(value: &[u8]) -> Option<Vec<u8>> {
    let known: usize = value.utf8_chunks().map(|chunk| chunk.valid().len()).sum();
    let is_another = known >= LEAST && known < value.len();
    is_another.then(|| String::from_utf8_lossy(value).into_owned().into_bytes())
}

/// A digit that stands for bits of two stretches is with the second.
fn base64_cut(
    text: &[u8],
    stretches: &[Range<usize>],
    offset: usize,
    alphabet: &Alphabet,
) -> Vec<Vec<u8>> {
    let digits = base64_at(text, offset, alphabet);
    let first = (offset * 8).div_ceil(6);
    let place = |at: usize| ((offset + at) * 8 / 6).saturating_sub(first);
    let pieces = stretches.iter().map(|stretch| place(stretch.start)..place(stretch.end));
    pieces.map(|piece| digits[piece].to_vec()).collect()
}

/// The digits that stand for the value alone when it begins `offset` bytes after a group's beginning, whatever is
/// before and behind it.
pub(super) fn base64_at(value: &[u8], offset: usize, alphabet: &Alphabet) -> Vec<u8> {
    let config = GeneralPurposeConfig::new().with_encode_padding(false);
    let shifted = [&vec![0; offset], value].concat();
    let mut digits = GeneralPurpose::new(alphabet, config).encode(&shifted).into_bytes();
    digits.truncate(shifted.len() * 8 / 6);
    digits.drain(..(offset * 8).div_ceil(6));
    digits
}

/// By RFC 3986, as JavaScript's `encodeURIComponent` has it, and as forms have it, by the signs that are kept; with
/// digits in upper case, and a blank as `+`.
fn url_encoded(value: &[u8], kept: &[u8], upper: bool, plus: bool) -> Vec<u8> {
    let mut text = String::new();
    for byte in value {
        if byte.is_ascii_alphanumeric() || kept.contains(byte) {
            text.push(char::from(*byte));
        } else if plus && *byte == b' ' {
            text.push('+');
        } else {
            // Writing to a string does not fail.
            let _ = if upper { write!(text, "%{byte:02X}") } else { write!(text, "%{byte:02x}") };
        }
    }
    text.into_bytes()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
    use proptest::prelude::*;

    use super::*;

    /// The forms of a value that is not cut.
    fn of(value: &[u8]) -> BTreeSet<Vec<u8>> {
        let text = value.trim_ascii();
        super::of(text, std::slice::from_ref(&(0..text.len()))).into_iter().flatten().collect()
    }

    fn holds(text: &[u8], forms: &BTreeSet<Vec<u8>>) -> bool {
        forms.iter().any(|form| text.windows(form.len()).any(|window| window == form))
    }

    proptest! {
        #[test]
        fn base64_is_found_wherever_the_value_stands(
            before in proptest::collection::vec(any::<u8>(), 0..9),
            value in proptest::collection::vec(any::<u8>(), 8..40),
            behind in proptest::collection::vec(any::<u8>(), 0..9),
        ) {
            let trimmed = value.trim_ascii();
            prop_assume!(trimmed.len() >= LEAST);
            let forms = of(&value);
            let whole = [before, value, behind].concat();
            for text in [STANDARD.encode(&whole), STANDARD_NO_PAD.encode(&whole), URL_SAFE.encode(&whole)] {
                prop_assert!(holds(text.as_bytes(), &forms), "{}", text);
            }
            prop_assert!(holds(hex::encode(&whole).as_bytes(), &forms));
        }

        #[test]
        fn the_pieces_of_a_form_are_the_form(
            value in proptest::collection::vec(any::<u8>(), 32..60),
            cuts in (8_usize..12, 8_usize..12),
        ) {
            let (first, second) = (cuts.0, cuts.0 + cuts.1);
            let cut = super::of(&value, &[0..first, first..second, second..value.len()]);
            let mut whole = super::of(&value, std::slice::from_ref(&(0..value.len())));
            prop_assert!(cut.len() <= MOST);
            prop_assert!(cut.iter().flatten().all(|piece| piece.len() >= LEAST));
            // What is cut has no text.
            whole.retain(|form| as_text(&value).is_none_or(|text| form[0] != text));
            let joined: BTreeSet<_> = cut.iter().map(|pieces| pieces.concat()).collect();
            prop_assert_eq!(joined, whole.into_iter().flatten().collect::<BTreeSet<_>>());
        }
    }

    #[test]
    fn the_forms_of_a_value() {
        let forms = of(b" pass word/+1\n");
        for form in [
            "pass word/+1",
            "70617373",
            "pass%20word%2F%2B1",
            "pass%20word%2f%2b1",
            "pass+word%2F%2B1",
        ] {
            let found = forms.iter().any(|known| known.starts_with(form.as_bytes()));
            assert!(found, "{form}");
        }
    }
}
