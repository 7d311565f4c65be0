//! Text from programs and registries, made safe for a terminal.

/// Longest text that is passed on: an error page of a registry is cut here.
const MAX_CHARS: usize = 4096;

/// Replaces what could steer a terminal, and cuts what is too long. Line feeds stay.
pub fn printable(text: &str) -> String {
    let safe = |c: char| if c == '\n' || !unsafe_on_terminal(c) { c } else { '\u{fffd}' };
    let mut out: String = text.chars().take(MAX_CHARS).map(safe).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        out.push_str(" […]");
    }
    out
}

/// Control characters, and those that reorder the text around them.
fn unsafe_on_terminal(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_do_not_pass() {
        assert_eq!(
            printable("a\u{1b}[31mb\r\u{9b}c\n\u{202e}d"),
            "a\u{fffd}[31mb\u{fffd}\u{fffd}c\n\u{fffd}d"
        );
    }

    #[test]
    fn the_bound_holds_at_and_above_it() {
        let full = "x".repeat(MAX_CHARS);
        assert_eq!(printable(&full), full);
        assert_eq!(printable(&format!("{full}y")), format!("{full} […]"));
    }
}
