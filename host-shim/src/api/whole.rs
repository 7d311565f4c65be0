//! Whole numbers in JSON, where `1.0` and `1e0` are 1 (JSON Schema 2020-12, 6.1.1): programs whose only numbers are floating
//! write them so. Pure.

use serde::Deserialize;
use serde::de::{Deserializer, Error};
use serde_json::Value;

/// The number, if it is whole and not negative.
pub(super) fn whole(value: &Value) -> Option<u64> {
    /// Up to here every whole number is one of its own as a double.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    value.as_u64().or_else(|| {
        let number = value.as_f64().filter(|n| (0.0..=EXACT).contains(n) && n.fract() == 0.0)?;
        // Lossless: it was looked at. -0.0 is 0.
        format!("{:.0}", number.abs()).parse().ok()
    })
}

/// For `#[serde(deserialize_with)]`.
pub(super) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let value = Value::deserialize(deserializer)?;
    whole(&value).ok_or_else(|| D::Error::custom("it must be a whole number"))
}

/// The same where it may be left out, or be `null`.
pub(super) fn optional<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    let value = Option::<Value>::deserialize(deserializer)?;
    let number = |value| whole(&value).ok_or_else(|| D::Error::custom("it must be a whole number"));
    value.map(number).transpose()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn whole_is_whole_however_it_is_written() {
        for (value, number) in [
            (json!(0), Some(0)),
            (json!(3), Some(3)),
            (json!(3.0), Some(3)),
            (json!(1e3), Some(1000)),
            (json!(-0.0), Some(0)),
            (json!(u64::MAX), Some(u64::MAX)),
            (json!(9_007_199_254_740_992.0), Some(9_007_199_254_740_992)),
            (json!(1e300), None),
            (json!(1.5), None),
            (json!(-1), None),
            (json!("1"), None),
            (json!(null), None),
        ] {
            assert_eq!(whole(&value), number, "{value}");
        }
    }
}
