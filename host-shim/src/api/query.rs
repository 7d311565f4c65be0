//! Queries, taken apart strictly: what is not UTF-8, not known or given twice is refused. Pure.

use std::ops::RangeInclusive;

use super::error::{ApiError, shown};

/// The pairs of a query, by the rules of `application/x-www-form-urlencoded`.
pub(super) fn pairs(query: Option<&str>) -> Result<Vec<(String, String)>, ApiError> {
    let pieces = query.unwrap_or_default().split('&').filter(|piece| !piece.is_empty());
    let pair = |piece: &str| {
        let (name, value) = piece.split_once('=').unwrap_or((piece, ""));
        Some((decoded(name)?, decoded(value)?))
    };
    pieces.map(|piece| pair(piece).ok_or_else(|| not_utf8(piece))).collect()
}

/// A decimal number and nothing else: no sign, no space.
pub(super) fn number(text: &str, allowed: &RangeInclusive<u64>) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|n| plain && allowed.contains(n))
}

/// A parameter that says yes or no.
pub(super) fn flag(name: &str, value: &str) -> Result<bool, ApiError> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(invalid(name, value, "true or false")),
    }
}

/// A value that the parameter may not have.
pub(super) fn invalid(name: &str, value: &str, allowed: &str) -> ApiError {
    refused(format!("{name} is {}; it must be {allowed}", shown(value)))
}

/// A parameter that there is not; `known` are those that there are.
pub(super) fn unknown(name: &str, known: &str) -> ApiError {
    let message = format!("there is no parameter {}; there are {known}", shown(name));
    ApiError::bad_request("unknown_parameter", message)
}

/// A parameter that came before.
pub(super) fn twice(name: &str) -> ApiError {
    refused(format!("the parameter {} is given twice", shown(name)))
}

/// Any other fault of a query.
pub(super) fn refused(message: impl Into<String>) -> ApiError {
    ApiError::bad_request("invalid_query", message)
}

fn not_utf8(piece: &str) -> ApiError {
    refused(format!("{} of the query is not UTF-8", shown(piece)))
}

/// A `%` that begins no byte stays what it is, as in every browser.
fn decoded(text: &str) -> Option<String> {
    let mut rest = text.as_bytes();
    let mut bytes = Vec::with_capacity(rest.len());
    while let [first, after @ ..] = rest {
        rest = after;
        match (first, after) {
            (b'+', _) => bytes.push(b' '),
            (b'%', [high, low, after @ ..]) => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => {
                    bytes.push(high << 4 | low);
                    rest = after;
                }
                _ => bytes.push(b'%'),
            },
            _ => bytes.push(*first),
        }
    }
    String::from_utf8(bytes).ok()
}

fn digit(b: u8) -> Option<u8> {
    char::from(b).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use url::form_urlencoded;

    use super::*;

    proptest! {
        #[test]
        fn what_is_utf8_is_read_as_others_read_it(query in "[a%0-9cC3A=&+é]{0,40}") {
            let theirs: Vec<(String, String)> =
                form_urlencoded::parse(query.as_bytes()).into_owned().collect();
            if let Ok(ours) = pairs(Some(&query)) {
                prop_assert_eq!(ours, theirs);
            } else {
                // Theirs has it repaired.
                let text: String = theirs.into_iter().map(|(name, value)| name + &value).collect();
                prop_assert!(text.contains(char::REPLACEMENT_CHARACTER));
            }
        }
    }

    #[test]
    fn what_is_not_utf8_is_refused() {
        for bad in ["a=%ff", "%c3=1", "a=1&b=%80"] {
            assert_eq!(pairs(Some(bad)).unwrap_err().code(), "invalid_query", "{bad}");
        }
        assert_eq!(pairs(Some("a=%ef%bf%bd")).unwrap(), [("a".into(), "\u{fffd}".into())]);
        assert_eq!(pairs(None).unwrap(), []);
    }

    #[test]
    fn numbers_are_digits_within_bounds() {
        let number = |text| number(text, &(1..=20));
        assert_eq!((number("1"), number("020")), (Some(1), Some(20)));
        for bad in ["", "0", "21", "+1", "-1", " 1", "1.0", "99999999999999999999999"] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }
}
