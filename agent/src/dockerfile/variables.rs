//! Variables in arguments. Pure.

/// The first `${name…}` of a form that the engine lacks: it knows `${name}`, `:-`, `:+` and patterns.
/// (On `:?` it never comes back.)
pub fn unsupported(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let mut from = 0;
    while let Some(found) = text[from..].find("${") {
        let start = from + found;
        from = start + 2;
        let escaped =
            bytes[..start].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1;
        if escaped {
            continue;
        }
        let name =
            bytes[from..].iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_').count();
        let after = &bytes[from + name..];
        // A name that does not end is the engine's to refuse; one that is not there it takes for empty.
        let named = name > 0 || after.is_empty();
        let known = named
            && matches!(after, [] | [b'}' | b'#' | b'%' | b'/', ..] | [b':', b'-' | b'+', ..]);
        if !known {
            let end = text[start..].find('}').map_or(text.len(), |end| start + end + 1);
            return Some(&text[start..end]);
        }
    }
    None
}

/// The text without its `${…}`.
pub fn removed(text: &str) -> String {
    let mut depth = 0_usize;
    let mut kept = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '$' if chars.peek() == Some(&'{') => {
                chars.next();
                depth += 1;
            }
            '}' if depth > 0 => depth -= 1,
            _ if depth == 0 => kept.push(c),
            _ => {}
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_that_the_engine_has_not_are_found() {
        for known in ["a", "$a ${b}", "${a:-${b:+c}}", "${a#x}${b%%y}${c//x/y}", r"\${a?b}", "${a"]
        {
            assert_eq!(unsupported(known), None, "{known}");
        }
        assert_eq!(unsupported("x ${a:?say} y"), Some("${a:?say}"));
        assert_eq!(unsupported("${a:-${b-c}}"), Some("${b-c}"));
        assert_eq!(unsupported("${a+b"), Some("${a+b"));
        assert_eq!(unsupported(r"\\${a!}"), Some("${a!}"));
        assert_eq!(unsupported("${é}"), Some("${é}"));
        assert_eq!(unsupported("a${}b"), Some("${}"));
        assert_eq!(unsupported("${:-a}"), Some("${:-a}"));
    }

    #[test]
    fn what_is_not_in_braces_stays() {
        assert_eq!(removed("${a:-1}-${b:-${c:-2}}/x$y}"), "-/x$y}");
        assert_eq!(removed("${a"), "");
    }
}
