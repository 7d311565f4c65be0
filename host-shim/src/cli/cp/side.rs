//! The two sides of a copy, as a command line has them. Pure.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Which way.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Copy {
    /// Out of a VM.
    Out { from: Remote, to: Local },
    /// Into a VM.
    In { from: Local, to: Remote },
}

/// A path in a build or an instance.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Remote {
    pub id: String,
    pub path: String,
}

/// Files of this machine.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Local {
    /// At a path.
    Path(PathBuf),
    /// An archive on standard input or output.
    Stream,
}

enum Side {
    Here(Local),
    There(Remote),
}

/// Takes the two sides apart: one of them names a build or an instance.
pub(super) fn parse(from: &OsStr, to: &OsStr) -> Result<Copy, String> {
    match (side(from)?, side(to)?) {
        (Side::There(from), Side::Here(to)) => Ok(Copy::Out { from, to }),
        (Side::Here(from), Side::There(to)) => Ok(Copy::In { from, to }),
        (Side::There(_), Side::There(_)) => {
            Err("only one of the two can be ID:PATH; copy to this machine first".into())
        }
        (Side::Here(_), Side::Here(_)) => {
            Err("one of the two has to be ID:PATH, with the id of a build or an instance".into())
        }
    }
}

/// A path that begins with a dot or a slash is this machine's, whatever is in it.
fn side(text: &OsStr) -> Result<Side, String> {
    let bytes = text.as_bytes();
    if bytes.is_empty() {
        return Err("a path is empty".into());
    }
    if bytes == b"-" {
        return Ok(Side::Here(Local::Stream));
    }
    let colon = bytes.iter().position(|byte| *byte == b':').filter(|_| bytes[0] != b'.');
    let (id, path) = match colon {
        Some(at) if at > 0 && !bytes[..at].contains(&b'/') => (&bytes[..at], &bytes[at + 1..]),
        _ => return Ok(Side::Here(Local::Path(text.into()))),
    };
    let (Ok(id), Ok(path)) = (str::from_utf8(id), str::from_utf8(path)) else {
        return Err(format!("{} is not UTF-8", text.display()));
    };
    if path.is_empty() {
        return Err(format!("{id}: has no path; its directory is {id}:."));
    }
    Ok(Side::There(Remote { id: id.into(), path: path.into() }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn parse(from: &str, to: &str) -> Result<Copy, String> {
        super::parse(OsStr::new(from), OsStr::new(to))
    }

    fn there(id: &str, path: &str) -> Remote {
        Remote { id: id.into(), path: path.into() }
    }

    #[test]
    fn one_side_is_there() {
        assert_eq!(
            parse("b1:/etc/a:b", "x"),
            Ok(Copy::Out { from: there("b1", "/etc/a:b"), to: Local::Path("x".into()) })
        );
        assert_eq!(
            parse("./b1:x", "b2:y"),
            Ok(Copy::In { from: Local::Path("./b1:x".into()), to: there("b2", "y") })
        );
        assert_eq!(parse("-", "b:."), Ok(Copy::In { from: Local::Stream, to: there("b", ".") }));
        assert_eq!(
            parse("a/b:c", "b:d"),
            Ok(Copy::In { from: Local::Path("a/b:c".into()), to: there("b", "d") })
        );
    }

    #[test]
    fn both_or_none_are_refused() {
        for (from, to) in
            [("a", "b"), ("a:b", "c:d"), ("a:", "b"), ("", "a:b"), ("-", "-"), (":a", "b")]
        {
            assert!(parse(from, to).is_err(), "{from} {to}");
        }
    }
}
