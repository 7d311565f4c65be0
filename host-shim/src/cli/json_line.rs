//! The client's own words among the events of `--progress json`: one JSON object a line, as the server's are.
//!
//! `{"type":"note","timestamp","message"}` is something to know. `{"type":"error","timestamp","message","detail"?,
//! "hint"?,"exit_code"}` is the last line where the command does not end well. No event of the server's has these types.

use std::ffi::OsString;

use serde::Serialize;

use super::error::CliError;
use super::escape::escape_json;
use crate::api::types::rfc3339;
use crate::build::Millis;

#[derive(Serialize)]
struct Words<'a> {
    r#type: &'static str,
    timestamp: String,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<u8>,
}

impl Words<'_> {
    fn line(&self) -> String {
        // Texts and numbers always serialise.
        escape_json(&serde_json::to_string(self).unwrap_or_default()).into_owned()
    }
}

/// Something to know.
pub fn note(message: &str, now: Millis) -> String {
    let timestamp = rfc3339(now);
    let (r#type, detail, hint, exit_code) = ("note", None, None, None);
    Words { r#type, timestamp, message, detail, hint, exit_code }.line()
}

/// Why the command ends.
pub fn error(error: &CliError, now: Millis) -> String {
    Words {
        r#type: "error",
        timestamp: rfc3339(now),
        message: &error.message,
        detail: error.detail.as_deref(),
        hint: error.hint.as_deref(),
        exit_code: Some(error.exit as u8),
    }
    .line()
}

/// Whether a command line asks for `kiln build --progress json`, even where the rest of it makes no sense.
pub fn is_asked_for(args: impl IntoIterator<Item = OsString>) -> bool {
    let args: Vec<_> = args.into_iter().skip(1).take_while(|arg| arg != "--").collect();
    let json = |pair: &[OsString]| pair[0] == "--progress" && pair[1] == "json";
    args.iter().any(|arg| arg == "build")
        && (args.iter().any(|arg| arg == "--progress=json") || args.windows(2).any(json))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_object_that_does_nothing_to_a_terminal() {
        let line = note("a\n\x1b[2J\u{202e}", 1_700_000_000_123);
        assert_eq!(
            line,
            r#"{"type":"note","timestamp":"2023-11-14T22:13:20.123Z","message":"a\n\u001b[2J\u202e"}"#
        );
        let mut problem = CliError::usage("m").hint("h");
        assert_eq!(
            error(&problem, 0),
            r#"{"type":"error","timestamp":"1970-01-01T00:00:00.000Z","message":"m","hint":"h","exit_code":2}"#
        );
        problem.detail = Some("one\ntwo".into());
        assert!(error(&problem, 0).contains(r#""detail":"one\ntwo","hint""#));
    }

    #[test]
    fn a_command_line_that_makes_no_sense_may_ask_for_it() {
        let asked = |line: &str| is_asked_for(line.split(' ').map(OsString::from));
        for line in [
            "kiln build --progress json --nothing",
            "kiln --url x build --nothing --progress=json .",
        ] {
            assert!(asked(line), "{line}");
        }
        for line in [
            "kiln build --progress plain json",
            "kiln ls --progress json",
            "kiln build -- --progress json",
            "kiln run image -- build --progress json",
            "build",
        ] {
            assert!(!asked(line), "{line}");
        }
    }
}
