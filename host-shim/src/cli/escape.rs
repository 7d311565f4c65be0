//! Makes a stranger's text safe for a terminal.
//!
//! Build logs, names and messages come from guests and servers. What could move the cursor, change
//! colours or titles, answer queries or reorder text is shown as an escape instead: control
//! characters but the tab (C0, DEL, C1), bidirectional controls, and Unicode's line separators.

use std::borrow::Cow;
use std::fmt::Write;

/// The text with every hostile character as `\n`, `\r`, `\xNN` or `\u{NNNN}`.
pub fn escape(text: &str) -> Cow<'_, str> {
    replace(text, |out, c| match c {
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        c if u32::from(c) < 0x100 => push(out, format_args!("\\x{:02x}", u32::from(c))),
        c => push(out, format_args!("\\u{{{:04x}}}", u32::from(c))),
    })
}

/// A JSON text with every hostile character as JSON's own `\uNNNN`: the same value, safe to show.
/// Such characters stand only inside strings of a JSON text that is one line.
pub fn escape_json(json: &str) -> Cow<'_, str> {
    // All hostile characters are in the basic plane: one escape each.
    replace(json, |out, c| push(out, format_args!("\\u{:04x}", u32::from(c))))
}

fn replace(text: &str, mut with: impl FnMut(&mut String, char)) -> Cow<'_, str> {
    if !text.chars().any(is_hostile) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_hostile(c) { with(&mut out, c) } else { out.push(c) }
    }
    Cow::Owned(out)
}

fn push(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = out.write_fmt(text);
}

fn is_hostile(c: char) -> bool {
    let bidi = matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let separator = matches!(c, '\u{2028}' | '\u{2029}');
    (c.is_control() && c != '\t') || bidi || separator
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn ordinary_text_is_left_alone() {
        for text in ["", "plain\ttext", "żółć 漢字 🦀 👩‍👩‍👧", "a\\nb"] {
            assert!(matches!(escape(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn control_sequences_are_shown() {
        assert_eq!(escape("\x1b[31mred\x1b[0m"), "\\x1b[31mred\\x1b[0m");
        assert_eq!(escape("\x1b]0;title\x07"), "\\x1b]0;title\\x07");
        assert_eq!(escape("a\0b\rc\nd\x7fe"), "a\\x00b\\rc\\nd\\x7fe");
        assert_eq!(escape("\u{9b}2J"), "\\x9b2J", "C1 starts sequences too");
    }

    #[test]
    fn text_cannot_be_reordered() {
        assert_eq!(escape("a\u{202e}b\u{2066}c\u{200f}"), "a\\u{202e}b\\u{2066}c\\u{200f}");
        assert_eq!(escape("a\u{2028}b"), "a\\u{2028}b");
    }

    #[test]
    fn json_stays_the_same_value() {
        let json = "{\"content\":\"\u{9b}2J\u{7f}\u{202e}é\"}";
        let shown = escape_json(json);
        assert_eq!(shown, "{\"content\":\"\\u009b2J\\u007f\\u202eé\"}");
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(value(&shown), value(json));
    }

    proptest::proptest! {
        #[test]
        fn nothing_hostile_is_left(text: String) {
            assert!(!escape(&text).chars().any(is_hostile));
            assert!(!escape_json(&text).chars().any(is_hostile));
        }
    }
}
