//! The forms in which a secret is looked for: as it is, in base64 at every alignment, in hex, URL-encoded. Pure.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::alphabet::{Alphabet, STANDARD, URL_SAFE};
use base64::engine::{GeneralPurpose, GeneralPurposeConfig};

/// Shorter values are in too much that is none.
pub const LEAST: usize = 8;

/// Every form of a value, none of them shorter than [`LEAST`]. Of a value of several lines each line too, since a log
/// has lines. Empty for a value that is too short.
pub fn of(value: &[u8]) -> BTreeSet<Vec<u8>> {
    let mut forms = BTreeSet::new();
    let trimmed = value.trim_ascii();
    let lines = trimmed.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    for part in std::iter::once(trimmed).chain(lines).filter(|part| part.len() >= LEAST) {
        forms.insert(part.to_vec());
        forms.insert(hex::encode(part).into_bytes());
        forms.insert(hex::encode_upper(part).into_bytes());
        for alphabet in [&STANDARD, &URL_SAFE] {
            forms.extend((0..3).map(|offset| base64_at(part, offset, alphabet)));
        }
        forms.extend(url_encoded(part));
    }
    forms.retain(|form| form.len() >= LEAST);
    forms
}

/// The digits that stand for the value alone when it begins `offset` bytes after a group's beginning, whatever is
/// before and behind it.
fn base64_at(value: &[u8], offset: usize, alphabet: &Alphabet) -> Vec<u8> {
    let config = GeneralPurposeConfig::new().with_encode_padding(false);
    let shifted = [&vec![0; offset], value].concat();
    let mut digits = GeneralPurpose::new(alphabet, config).encode(&shifted).into_bytes();
    digits.truncate(shifted.len() * 8 / 6);
    digits.drain(..(offset * 8).div_ceil(6));
    digits
}

/// By RFC 3986, as JavaScript's `encodeURIComponent` has it, and as forms have it; digits in both cases.
fn url_encoded(value: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let encode = |kept: &[u8], upper: bool, plus: bool| {
        let mut text = String::new();
        for byte in value {
            if byte.is_ascii_alphanumeric() || kept.contains(byte) {
                text.push(char::from(*byte));
            } else if plus && *byte == b' ' {
                text.push('+');
            } else {
                // Writing to a string does not fail.
                let _ =
                    if upper { write!(text, "%{byte:02X}") } else { write!(text, "%{byte:02x}") };
            }
        }
        text.into_bytes()
    };
    let mut all = vec![];
    for kept in [&b"-._~"[..], b"-_.!~*'()", b"-_.*"] {
        for upper in [true, false] {
            all.push(encode(kept, upper, false));
            all.push(encode(kept, upper, true));
        }
    }
    all.into_iter()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
    use proptest::prelude::*;

    use super::*;

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
        assert!(of(b"1234567\n").is_empty());
        let key = of(b"-----BEGIN KEY-----\nMIIEvQIBADANBg\nshort\n-----END KEY-----\n");
        assert!(key.contains(&b"MIIEvQIBADANBg"[..]) && !key.contains(&b"short"[..]));
    }
}
