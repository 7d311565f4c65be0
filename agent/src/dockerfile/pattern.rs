//! Patterns of file names, looked up in the source.

use std::path::Path;

use glob::{MatchOptions, Pattern};

/// More names than this are no list of sources any more.
const MAX_NAMES: usize = 1000;

/// As Docker has it: `*` and `?` stay within a name, `**` is any number of directories, and a
/// leading dot is nothing special.
const OPTIONS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// The names below `source` that a pattern matches, in order. Links are not followed. Or with what there is no telling.
pub fn names(source: &Path, pattern: &str) -> Result<Vec<String>, String> {
    let given = pattern;
    // Go's class of other characters is [^a].
    let pattern = Pattern::new(&given.replace("[^", "[!"))
        .map_err(|error| format!("with the pattern {given}: {}", error.msg))?;
    let mut found = Vec::new();
    let mut walk = walkdir::WalkDir::new(source).min_depth(1).sort_by_file_name().into_iter();
    while let Some(entry) = walk.next() {
        let entry = entry.map_err(|error| format!("with the pattern {given}: {error}"))?;
        let Ok(path) = entry.path().strip_prefix(source) else { continue };
        // What is not UTF-8 in it is a character that a pattern can match too.
        let name = path.to_string_lossy();
        if !pattern.matches_with(&name, OPTIONS) {
            continue;
        }
        if path.to_str().is_none() {
            return Err(format!("with the pattern {given}: it matches {name}, which is not UTF-8"));
        }
        found.push(name.into_owned());
        if found.len() > MAX_NAMES {
            return Err(format!(
                "with the pattern {given}: it matches more than {MAX_NAMES} names"
            ));
        }
        // What is in it comes with it.
        if entry.file_type().is_dir() {
            walk.skip_current_dir();
        }
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn patterns_stay_within_the_source() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        for name in ["a/x/z.txt", "a/y/z.txt", "a/.h", "top.md", "b/n.md"] {
            let path = source.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        std::fs::write(dir.path().join("out.md"), "").unwrap();
        std::os::unix::fs::symlink("..", source.join("up")).unwrap();
        let found = |pattern| names(&source, pattern).unwrap();
        assert_eq!(found("a/*/z.txt"), ["a/x/z.txt", "a/y/z.txt"]);
        assert_eq!(found("**/*.md"), ["b/n.md", "top.md"]);
        assert_eq!(found("a/*"), ["a/.h", "a/x", "a/y"]);
        assert_eq!(found("[^a]"), ["b"]);
        assert_eq!(found("up/*"), Vec::<String>::new());
        assert_eq!(found("../*"), Vec::<String>::new());
        assert!(names(&source, "a[").is_err());
    }

    #[test]
    fn names_that_are_not_utf8_are_in_the_way_of_their_patterns_only() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join(OsStr::from_bytes(b"\xff"));
        std::fs::create_dir(&odd).unwrap();
        std::fs::write(odd.join("a.md"), "").unwrap();
        std::fs::write(dir.path().join("b.md"), "").unwrap();
        assert_eq!(names(dir.path(), "*.md").unwrap(), ["b.md"]);
        for pattern in ["*/*.md", "**/*.md", "?", "[^b]"] {
            let why = names(dir.path(), pattern).unwrap_err();
            assert!(why.contains("UTF-8"), "{pattern}: {why}");
        }
    }

    #[test]
    fn more_names_than_the_bound_are_too_many() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..MAX_NAMES {
            std::fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        assert_eq!(names(dir.path(), "*").unwrap().len(), MAX_NAMES);
        std::fs::write(dir.path().join("more"), "").unwrap();
        assert!(names(dir.path(), "*").unwrap_err().contains("1000"));
    }
}
