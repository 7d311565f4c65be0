//! Samples of a value that is too large to be looked for whole. Pure.

use std::ops::Range;

use super::forms::LEAST;
use super::weight::variety;
use super::wrapped;

/// Most samples of a value.
const MOST: usize = 16;
/// How long one is. Short enough to be within a line of hex and of base64.
pub(super) const LENGTH: usize = 24;
/// How many different bytes one has at least: fewer are padding, or a pattern that many files have.
pub(super) const LEAST_VARIETY: usize = 8;

/// From each of up to sixteen stretches the first sample that is none of padding, and if there is one, that no line
/// cuts when the value is wrapped.
pub(super) fn of(value: &[u8]) -> Vec<&[u8]> {
    // The places count from the value's beginning, as the lines do.
    let value = value.trim_ascii_end();
    if value.len() <= LENGTH {
        return if value.len() >= LEAST { vec![value] } else { vec![] };
    }
    let count = (value.len() / LENGTH).clamp(1, MOST);
    let stretch = |n| value.len() * n / count..value.len() * (n + 1) / count;
    (0..count).filter_map(|n| from(value, stretch(n))).collect()
}

fn from(value: &[u8], stretch: Range<usize>) -> Option<&[u8]> {
    let candidates = || {
        let starts = stretch.start..(stretch.end + 1).saturating_sub(LENGTH);
        starts.map(|start| start..start + LENGTH)
    };
    let varies = |sample: &Range<usize>| variety(&value[sample.clone()]) >= LEAST_VARIETY;
    let uncut = candidates().filter(wrapped::is_uncut).find(varies);
    uncut.or_else(|| candidates().find(varies)).map(|sample| &value[sample])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_over_the_value() {
        let value: Vec<u8> = (0..100_000_u32).flat_map(u32::to_be_bytes).collect();
        let samples = of(&value);
        assert_eq!(samples.len(), MOST);
        for (n, sample) in samples.iter().enumerate() {
            let place = value.windows(LENGTH).position(|window| window == *sample);
            assert_eq!(place.map(|place| place * MOST / value.len()), Some(n));
            assert!(place.is_some_and(|place| wrapped::is_uncut(&(place..place + LENGTH))));
        }
    }

    #[test]
    fn padding_is_no_sample() {
        assert!(of(&[0; 100_000]).is_empty());
        assert!(of(&b"1234567".repeat(10_000)).is_empty());
        let mut value = vec![0; 100_000];
        value[70_000..70_024].copy_from_slice(b"abcdefghijklmnopqrstuvwx");
        let samples = of(&value);
        assert_eq!(samples.len(), 1);
        assert!(samples.iter().all(|sample| variety(sample) == LEAST_VARIETY || sample.len() == LENGTH));
    }

    #[test]
    fn a_value_of_any_length_has_samples() {
        let value: Vec<u8> = (0..200).collect();
        for (length, count) in [(7, 0), (8, 1), (24, 1), (25, 1), (47, 1), (48, 2), (160, 6)] {
            assert_eq!(of(&value[33..33 + length]).len(), count, "{length}");
        }
    }
}
