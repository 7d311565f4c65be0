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

/// The names below `source` that a pattern matches, in order. Links are not followed. `None`: the
/// pattern is not one, or matches too many.
pub fn names(source: &Path, pattern: &str) -> Option<Vec<String>> {
    // Go's class of other characters is [^a].
    let pattern = Pattern::new(&pattern.replace("[^", "[!")).ok()?;
    let mut found = Vec::new();
    let mut walk = walkdir::WalkDir::new(source).min_depth(1).sort_by_file_name().into_iter();
    while let Some(entry) = walk.next() {
        let Ok(entry) = entry else { continue };
        let Some(name) = entry.path().strip_prefix(source).ok().and_then(Path::to_str) else {
            continue;
        };
        if pattern.matches_with(name, OPTIONS) {
            found.push(name.to_owned());
            if found.len() > MAX_NAMES {
                return None;
            }
            // What is in it comes with it.
            if entry.file_type().is_dir() {
                walk.skip_current_dir();
            }
        }
    }
    Some(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

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
        assert_eq!(names(&source, "a["), None);
    }
}
