//! A value's base64 and hex as tools wrap them into lines, from its beginning. Pure.

use std::ops::Range;

use base64::alphabet::STANDARD;

use super::forms::base64_at;

/// How many bytes a line of base64 stands for: of 76 columns by `base64`, of 64 by `openssl` and in PEM.
const BASE64: [usize; 2] = [57, 48];
/// How many bytes a line of hex stands for: of 60 columns by `xxd -p`.
const HEX: usize = 30;
/// Shortest last line: shorter ones are in too much that is none.
const LEAST_LAST: usize = 12;

/// The lines of a text in one way to wrap it: what each stands for, and as it is.
pub(super) type Lines = Vec<(Range<usize>, Vec<u8>)>;

/// Every way to wrap a text that has several lines then. The text has no blanks at its end: of a last line the digits
/// are taken that stand for it whatever is behind.
pub(super) fn of(text: &[u8]) -> Vec<Lines> {
    let wrapped = |width: usize, encode: &dyn Fn(&[u8]) -> Vec<u8>| -> Lines {
        if text.len() <= width {
            return vec![];
        }
        let starts = (0..text.len()).step_by(width);
        let lines = starts.map(|start| start..text.len().min(start + width));
        let lines = lines.map(|stretch| (stretch.clone(), encode(&text[stretch])));
        lines.filter(|(_, line)| line.len() >= LEAST_LAST).collect()
    };
    let mut all: Vec<_> =
        BASE64.map(|width| wrapped(width, &|bytes| base64_at(bytes, 0, &STANDARD))).into();
    all.push(wrapped(HEX, &|bytes| hex::encode(bytes).into_bytes()));
    all
}

/// Whether the stretch is within one line however the text is wrapped.
pub(super) fn is_uncut(stretch: &Range<usize>) -> bool {
    let mut widths = BASE64.into_iter().chain([HEX]);
    widths.all(|width| stretch.start / width == (stretch.end - 1) / width)
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;

    use super::*;

    #[test]
    fn every_line_is_as_tools_write_it_but_for_the_end_of_the_last() {
        let text: Vec<u8> = (0..=255).collect();
        let whole = [&text[..], b"\n"].concat();
        let b64 = base64::engine::general_purpose::STANDARD.encode(&whole);
        let written = [(76, &b64), (64, &b64), (60, &hex::encode(&whole))];
        for (lines, (columns, digits)) in of(&text).into_iter().zip(written) {
            let expected: Vec<_> = digits.as_bytes().chunks(columns).collect();
            assert_eq!(lines.len(), expected.len(), "{columns}");
            assert_eq!(lines.last().map(|(stretch, _)| stretch.end), Some(text.len()));
            for ((_, line), expected) in lines.iter().zip(expected) {
                assert!(expected.starts_with(line) && line.len() + 4 >= expected.len());
            }
        }
    }

    #[test]
    fn what_fits_a_line_is_not_wrapped_and_a_very_short_end_is_left() {
        let lengths =
            |length: usize| of(&vec![b'x'; length]).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(lengths(30), [0, 0, 0]);
        assert_eq!(lengths(48), [0, 0, 2]);
        // Eight bytes are ten digits, five are ten of hex.
        assert_eq!(lengths(65), [1, 2, 2]);
        assert_eq!(lengths(66), [2, 2, 3]);
        assert!(is_uncut(&(0..24)) && is_uncut(&(60..84)) && !is_uncut(&(56..80)));
    }
}
