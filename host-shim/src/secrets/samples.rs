//! Samples of a value that is too large to be looked for whole. Pure.

use std::ops::Range;

use super::forms::LEAST;
use super::weight::{Weight, Weights, variety};
use super::wrapped;

/// Most samples of a value.
pub(super) const MOST: usize = 16;
/// How long one is. Short enough to be within a line of hex and of base64.
pub(super) const LENGTH: usize = 24;
/// How many different bytes one has at least: fewer are padding, or a pattern that many files have.
pub(super) const LEAST_VARIETY: usize = 8;

/// From each of up to sixteen stretches of a text the first sample that is none of padding; one that no line cuts when
/// the text is wrapped, and that says most, if there is one. The text has no blanks at its end; its places count from
/// the value's beginning, as the lines do.
pub(super) fn of(text: &[u8], weights: &Weights<'_>) -> Vec<Range<usize>> {
    if text.len() <= LENGTH {
        return (text.len() >= LEAST).then_some(0..text.len()).into_iter().collect();
    }
    let count = (text.len() / LENGTH).clamp(1, MOST);
    let stretch = |n| text.len() * n / count..text.len() * (n + 1) / count;
    (0..count).filter_map(|n| from(text, weights, stretch(n))).collect()
}

/// What a sample should have, the best first: whether no line cuts it, and what it says at least.
const WANTED: [(bool, Weight); 4] = [
    (true, Weight::Alone),
    (true, Weight::Part),
    (true, Weight::Nothing),
    (false, Weight::Nothing),
];

fn from(text: &[u8], weights: &Weights<'_>, stretch: Range<usize>) -> Option<Range<usize>> {
    WANTED.into_iter().find_map(|(uncut, least)| {
        let starts = stretch.start..(stretch.end + 1).saturating_sub(LENGTH);
        starts.map(|start| start..start + LENGTH).find(|sample| {
            (!uncut || wrapped::is_uncut(sample))
                && variety(&text[sample.clone()]) >= LEAST_VARIETY
                && weights.of(sample.clone()) >= least
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(value: &[u8]) -> Vec<&[u8]> {
        let samples = super::of(value, &Weights::new(value));
        samples.into_iter().map(|sample| &value[sample]).collect()
    }

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
        assert!(of(&vec![0; 100_000]).is_empty());
        assert!(of(&b"1234567".repeat(10_000)).is_empty());
        let mut value = vec![0; 100_000];
        value[70_000..70_024].copy_from_slice(b"abcdefghijklmnopqrstuvwx");
        let samples = of(&value);
        assert_eq!(samples.len(), 1);
        assert!(
            samples.iter().all(|sample| variety(sample) == LEAST_VARIETY || sample.len() == LENGTH)
        );
    }

    #[test]
    fn a_value_of_any_length_has_samples() {
        let value: Vec<u8> = (0..200).collect();
        for (length, count) in [(7, 0), (8, 1), (24, 1), (25, 1), (47, 1), (48, 2), (160, 6)] {
            assert_eq!(of(&value[33..33 + length]).len(), count, "{length}");
        }
    }

    #[test]
    fn a_sample_is_what_says_most() {
        let common = b"-----BEGIN CERTIFICATE-----\n\"type\": \"service_account\",\n".repeat(4);
        let value = [&common[..], b"0123456789abcdefghijklmnopqrstuvwxyz\n", &common].concat();
        let weights = Weights::new(&value);
        let samples = super::of(&value, &weights);
        assert_eq!(samples.len(), MOST);
        // Armor is a sample where its stretch has nothing else, and then says nothing by itself.
        for sample in samples {
            let weight = weights.of(sample.clone());
            let text = String::from_utf8_lossy(&value[sample]);
            assert_eq!(weight == Weight::Alone, text.contains("0123456789"), "{text}");
        }
    }
}
