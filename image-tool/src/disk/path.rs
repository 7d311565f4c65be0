//! Names in a layer. They are never names on the host: a normal path is a key of the tree in memory.

/// Longer paths are none to Linux: PATH_MAX without the NUL.
const MAX_PATH: usize = 4095;
/// NAME_MAX.
const MAX_NAME: usize = 255;

/// Why a name is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathProblem {
    /// Nothing.
    #[error("it is empty")]
    Empty,
    /// A name that Linux cannot have.
    #[error("it has a NUL in it")]
    Nul,
    /// What makes the disk takes no other names.
    #[error("it is not UTF-8")]
    NotUtf8,
    /// It leads upwards.
    #[error("it has \"..\" in it")]
    Upwards,
    /// PATH_MAX.
    #[error("it is longer than {MAX_PATH} bytes")]
    Long,
    /// NAME_MAX.
    #[error("a part of it is longer than {MAX_NAME} bytes")]
    LongName,
}

/// Relative to the root, with single slashes, without `.`; the root is `""`. An absolute name is one
/// in the image, as every tool takes it.
pub(super) fn normal(raw: &[u8]) -> Result<Box<str>, PathProblem> {
    let raw = text(raw, MAX_PATH)?;
    let mut path = String::with_capacity(raw.len());
    for name in raw.split('/').filter(|name| !matches!(*name, "" | ".")) {
        if name == ".." {
            return Err(PathProblem::Upwards);
        }
        if name.len() > MAX_NAME {
            return Err(PathProblem::LongName);
        }
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(name);
    }
    Ok(path.into())
}

/// Text that Linux takes as a path.
pub(super) fn text(raw: &[u8], max: usize) -> Result<&str, PathProblem> {
    if raw.is_empty() {
        return Err(PathProblem::Empty);
    }
    if raw.len() > max {
        return Err(PathProblem::Long);
    }
    if raw.contains(&0) {
        return Err(PathProblem::Nul);
    }
    str::from_utf8(raw).map_err(|_| PathProblem::NotUtf8)
}

pub(super) fn join(parent: &str, name: &str) -> Box<str> {
    if parent.is_empty() { name.into() } else { format!("{parent}/{name}").into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_relative_and_stay_below_the_root() {
        for (raw, expected) in [
            ("a/b", "a/b"),
            ("./a//b/", "a/b"),
            ("/etc/passwd", "etc/passwd"),
            (".", ""),
            ("./", ""),
            ("/", ""),
            ("a/./b", "a/b"),
            ("...", "..."),
        ] {
            assert_eq!(normal(raw.as_bytes()).as_deref(), Ok(expected), "{raw}");
        }
        for raw in ["..", "../a", "a/..", "a/../b", "/..", "./.."] {
            assert_eq!(normal(raw.as_bytes()), Err(PathProblem::Upwards), "{raw}");
        }
        assert_eq!(normal(b""), Err(PathProblem::Empty));
        assert_eq!(normal(b"a\0b"), Err(PathProblem::Nul));
        assert_eq!(normal(b"caf\xe9"), Err(PathProblem::NotUtf8));
    }

    #[test]
    fn lengths_hold_at_and_above_the_bound() {
        let name = |n: usize| "x".repeat(n);
        assert!(normal(name(MAX_NAME).as_bytes()).is_ok());
        assert_eq!(normal(name(MAX_NAME + 1).as_bytes()), Err(PathProblem::LongName));
        let path = "y/".repeat(MAX_PATH / 2) + "z";
        assert_eq!(path.len(), MAX_PATH);
        assert!(normal(path.as_bytes()).is_ok());
        assert_eq!(normal(format!("{path}z").as_bytes()), Err(PathProblem::Long));
    }
}
