//! The API's names of fields, as `kiln build` calls them. Pure.
//!
//! A refusal of the API begins with the name of the field to blame (`memory_mb is "1"; it must be …`), or has it in
//! its text. Whoever typed `--memory` is to read `--memory`. What a message quotes is the user's own, and stays.

/// Names that are no words of English: they are a field's wherever they stand.
const NAMES: [(&str, &str); 8] = [
    ("memory_mb", "--memory"),
    ("disk_gb", "--disk"),
    ("timeout_seconds", "--timeout"),
    ("network_mode", "--network"),
    ("allowed_domains", "--allow"),
    ("build_args", "--build-arg"),
    ("image_name", "-t"),
    ("keep_failed_seconds", "--keep-failed"),
];

/// Names that are words too: they are a field's at the beginning.
const WORDS: [(&str, &str); 6] = [
    ("cpus", "--cpus"),
    ("dockerfile", "-f"),
    ("priority", "--priority"),
    ("secrets", "--secret"),
    ("tags", "--tag"),
    ("target", "--target"),
];

/// The server's words with the flags of `kiln build`.
pub fn with_flags(detail: &str) -> String {
    let mut out = String::with_capacity(detail.len());
    let mut rest = detail;
    while let Some(c) = rest.chars().next() {
        let length = if is_of_a_name(c) {
            rest.find(|c| !is_of_a_name(c)).unwrap_or(rest.len())
        } else if c == '"' {
            quoted(rest)
        } else {
            c.len_utf8()
        };
        let (token, after) = rest.split_at(length);
        let flag = |names: &[(&str, &'static str)]| {
            names.iter().find(|(name, _)| *name == token).map(|(_, flag)| *flag)
        };
        let flag = flag(&NAMES).or_else(|| flag(&WORDS).filter(|_| out.is_empty()));
        out.push_str(flag.unwrap_or(token));
        rest = after;
    }
    out
}

/// A build's failure with them. It quotes steps as they are written: only its last word, what to ask for more with, is
/// surely a field's.
pub fn in_failure(kind: &str, message: &str) -> String {
    let is_limit = matches!(kind, "out_of_memory" | "disk_full");
    let (text, field) = message.rsplit_once(' ').unwrap_or_default();
    match NAMES.iter().find(|(name, _)| *name == field) {
        Some((_, flag)) if is_limit => format!("{text} {flag}"),
        _ => message.to_owned(),
    }
}

fn is_of_a_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '-'
}

/// How long the quoted text is that begins here; all that is left, where it does not end.
fn quoted(text: &str) -> usize {
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|(_, c)| {
        let ends = *c == '"' && !escaped;
        escaped = *c == '\\' && !escaped;
        ends
    });
    end.map_or(text.len(), |(at, _)| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_to_ask_for_more_with() {
        let message =
            "step 2 ran out of memory: RUN cp disk_gb memory_mb: ask for more with memory_mb";
        let told = "step 2 ran out of memory: RUN cp disk_gb memory_mb: ask for more with --memory";
        assert_eq!(in_failure("out_of_memory", message), told);
        assert_eq!(
            in_failure("disk_full", "ask for more with disk_gb"),
            "ask for more with --disk"
        );
        let step = "step 2 failed with exit code 1: RUN cat disk_gb";
        assert_eq!(in_failure("step_failed", step), step);
        assert_eq!(in_failure("disk_full", "full"), "full");
    }

    #[test]
    fn fields_are_told_as_flags_and_what_is_quoted_stays() {
        for (said, told) in [
            ("memory_mb is \"1\"; it must be", "--memory is \"1\"; it must be"),
            ("cpus is \"cpus\"", "--cpus is \"cpus\""),
            ("tags has more than 64 tags", "--tag has more than 64 tags"),
            (
                "target is \"a \\\" memory_mb \\\\\"; disk_gb",
                "--target is \"a \\\" memory_mb \\\\\"; --disk",
            ),
            ("network_mode none, with allowed_domains", "--network none, with --allow"),
            ("the secrets of the target", "the secrets of the target"),
            (
                "my_memory_mb, memory_mb_too, memory_mb-x",
                "my_memory_mb, memory_mb_too, memory_mb-x",
            ),
            ("build_args, \"unclosed disk_gb", "--build-arg, \"unclosed disk_gb"),
            ("żółć: disk_gb", "żółć: --disk"),
            ("", ""),
        ] {
            assert_eq!(with_flags(said), told);
        }
    }
}
