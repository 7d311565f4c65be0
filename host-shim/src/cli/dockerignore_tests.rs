//! The cases of moby/patternmatcher's own test-suite, and Kiln's.

use super::*;

fn excluded(patterns: &[&str], path: &str) -> bool {
    Excludes::parse(&patterns.join("\n")).unwrap().excludes(path.trim_end_matches('/'))
}

#[test]
fn single_patterns_match_as_in_moby() {
    let cases = [
        ("**", "file", true),
        ("**/", "file", true),
        ("**", "dir/file", true),
        ("**/", "dir/file", true),
        ("**/**", "dir/file", true),
        ("dir/**", "dir/file", true),
        ("dir/**", "dir/dir2/file", true),
        ("**/dir", "dir", true),
        ("**/dir", "dir/file", true),
        ("**/dir2/*", "dir/dir2/file", true),
        ("**/dir2/**", "dir/dir2/dir3/file", true),
        ("**file", "file", true),
        ("**file", "dir/file", true),
        ("**/file", "dir/file", true),
        ("**file", "dir/dir/file", true),
        ("**/file", "dir/dir/file", true),
        ("**/file*", "dir/dir/file", true),
        ("**/file*", "dir/dir/file.txt", true),
        ("**/file*txt", "dir/dir/file.txt", true),
        ("**/file*.txt", "dir/dir/file.txt", true),
        ("**/file*.txt*", "dir/dir/file.txt", true),
        ("**/**/*.txt", "dir/dir/file.txt", true),
        ("**/**/*.txt2", "dir/dir/file.txt", false),
        ("**/*.txt", "file.txt", true),
        ("**/**/*.txt", "file.txt", true),
        ("a**/*.txt", "a/file.txt", true),
        ("a**/*.txt", "a/dir/file.txt", true),
        ("a**/*.txt", "a/dir/dir/file.txt", true),
        ("a/*.txt", "a/dir/file.txt", false),
        ("a/*.txt", "a/file.txt", true),
        ("a/*.txt**", "a/file.txt", true),
        ("a[b-d]e", "ae", false),
        ("a[b-d]e", "ace", true),
        ("a[b-d]e", "aae", false),
        ("a[^b-d]e", "aze", true),
        (".*", ".foo", true),
        (".*", "foo", false),
        ("abc.def", "abcdef", false),
        ("abc.def", "abc.def", true),
        ("abc.def", "abcZdef", false),
        ("abc?def", "abcZdef", true),
        ("abc?def", "abcdef", false),
        ("a\\\\", "a\\", true),
        ("**/foo/bar", "foo/bar", true),
        ("**/foo/bar", "dir/foo/bar", true),
        ("**/foo/bar", "dir/dir2/foo/bar", true),
        ("abc/**", "abc", false),
        ("abc/**", "abc/def", true),
        ("abc/**", "abc/def/ghi", true),
        ("**/.foo", ".foo", true),
        ("**/.foo", "bar.foo", false),
        ("a(b)c/def", "a(b)c/def", true),
        ("a(b)c/def", "a(b)c/xyz", false),
        ("a.|)$(}+{bc", "a.|)$(}+{bc", true),
        ("dist/*.whl", "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", true),
        ("a\\*b", "a*b", true),
    ];
    for (pattern, path, expected) in cases {
        assert_eq!(excluded(&[pattern], path), expected, "{pattern:?} on {path:?}");
    }
}

#[test]
fn gos_match_tests_hold() {
    let cases = [
        ("abc", "abc", true),
        ("*", "abc", true),
        ("*c", "abc", true),
        ("a*", "a", true),
        ("a*", "ab/c", true),
        ("a*/b", "abc/b", true),
        ("a*/b", "a/c/b", false),
        ("a*b*c*d*e*/f", "axbxcxdxe/f", true),
        ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", false),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", false),
        ("a*b?c*x", "abxbbxdbxebxczzx", true),
        ("a*b?c*x", "abxbbxdbxebxczzy", false),
        ("ab[c]", "abc", true),
        ("ab[e-g]", "abc", false),
        ("ab[^c]", "abc", false),
        ("ab[^e-g]", "abc", true),
        ("a\\*b", "ab", false),
        ("a?b", "a☺b", true),
        ("a[^a]b", "a☺b", true),
        ("a???b", "a☺b", false),
        ("[a-ζ]*", "α", true),
        ("*[a-ζ]", "A", false),
        ("a?b", "a/b", false),
        ("a*b", "a/b", false),
        ("[\\]a]", "]", true),
        ("[\\-]", "-", true),
        ("[x\\-]", "-", true),
        ("[x\\-]", "z", false),
        ("[\\-x]", "x", true),
        ("*x", "xxx", true),
        // `!` is no negation inside brackets; `*` and `&&` are plain there.
        ("[!a]", "!", true),
        ("[!a]", "b", false),
        ("[*]", "*", true),
        ("[*]", "a", false),
        ("[a&&b]", "&", true),
    ];
    for (pattern, path, expected) in cases {
        assert_eq!(excluded(&[pattern], path), expected, "{pattern:?} on {path:?}");
    }
}

#[test]
fn bad_patterns_are_refused() {
    let bad =
        ["[]a]", "[-]", "[x-]", "[-x]", "\\", "[a-b-c]", "[", "[^", "[^bc", "a[", "a\\", "[z-a]"];
    for pattern in bad {
        let error = Excludes::parse(pattern).unwrap_err();
        assert!(matches!(error, BadPattern::Syntax(_)), "{pattern:?}: {error}");
    }
    for pattern in ["!", "! ", "!/"] {
        assert_eq!(Excludes::parse(pattern).unwrap_err(), BadPattern::OnlyNegation, "{pattern:?}");
    }
}

#[test]
fn the_last_matching_line_wins() {
    let cases: [(&[&str], &str, bool); 12] = [
        (&["**", "!util/docker/web"], "util/docker/web/foo", false),
        (&["**", "!util/docker/web", "util/docker/web/foo"], "util/docker/web/foo", true),
        (&["**", "!dist/*.whl"], "dist/a.whl", false),
        (&["!fileutils.go", "*.go"], "fileutils.go", true),
        (&["*.go", "!fileutils.go"], "fileutils.go", false),
        (&["docs", "!docs/README.md"], "docs/README.md", false),
        (&["docs/", "!docs/README.md"], "docs/README.md", false),
        (&["docs/*", "!docs/README.md"], "docs/README.md", false),
        (&["docs", "!docs/README.md"], "docs/other.md", true),
        (&["*.md", "!README*.md", "README-secret.md"], "README-secret.md", true),
        (&["*.md", "README-secret.md", "!README*.md"], "README-secret.md", false),
        (&["a", "!a/b", "a/b/c"], "a/b/d", false),
    ];
    for (patterns, path, expected) in cases {
        assert_eq!(excluded(patterns, path), expected, "{patterns:?} on {path:?}");
    }
}

#[test]
fn patterns_are_anchored_unlike_gits() {
    assert!(!excluded(&["target"], "sub/target"));
    assert!(excluded(&["target"], "target/debug/x"));
    assert!(excluded(&["*/temp*"], "somedir/temporary.txt"));
    assert!(!excluded(&["*/temp*"], "a/b/temp"));
}

#[test]
fn a_file_is_read_as_docker_reads_it() {
    let text =
        "\u{feff}# comment\n  \n  spaced  \n/rooted\n./dotted/\n! kept\n #no-comment\r\na/../b\n";
    let excludes = Excludes::parse(text).unwrap();
    let shown: Vec<_> = excludes.patterns.iter().map(|p| (p.includes, p.text.as_str())).collect();
    let expected = [
        (false, "spaced"),
        (false, "rooted"),
        (false, "dotted"),
        (true, "kept"),
        (false, "#no-comment"),
        (false, "b"),
    ];
    assert_eq!(shown, expected);
}

#[test]
fn paths_are_cleaned_as_go_does() {
    let cases = [
        ("a//b/./c/..", "a/b"),
        ("../../a", "../../a"),
        ("/../a", "/a"),
        ("a/..", "."),
        (".", "."),
        ("/", "/"),
        ("a/", "a"),
    ];
    for (path, expected) in cases {
        assert_eq!(clean(path), expected, "{path}");
    }
}

#[test]
fn directories_are_entered_only_where_something_may_come_back() {
    let below =
        |patterns: &str, dir: &str| Excludes::parse(patterns).unwrap().may_include_below(dir);
    assert!(!below("node_modules", "node_modules"));
    assert!(below("docs\n!docs/README.md", "docs"));
    assert!(!below("docs\n!docs/README.md", "docs/img"));
    assert!(!below("a\nb\n!b/x", "a"));
    assert!(below("**\n!a/b/*.txt", "a"));
    assert!(below("**\n!a/b/*.txt", "a/b"));
    assert!(below("**\n!a/b/*.txt", "a/b/c"), "`*.txt` may be a directory below");
    assert!(!below("**\n!a/b/*.txt", "c"));
    assert!(below("**\n!**/x", "anything"));
    assert!(!below("**\n!a/bc", "a/b"), "a name that only begins alike");
}

#[test]
fn what_must_be_sent_is_sent() {
    let mut excludes = Excludes::parse("*").unwrap();
    excludes.keep("odd[name]*");
    assert!(!excludes.excludes("odd[name]*"));
    assert!(excludes.excludes("oddn"));
}

proptest::proptest! {
    #[test]
    fn anything_is_read_or_refused(text in "([a-c*?!/.\\\\^\\[\\]-]|\n){0,30}", path in "[a-c/.*]{1,12}") {
        if let Ok(excludes) = Excludes::parse(&text) {
            let excluded = excludes.excludes(&path);
            // What is excluded together with its directory but taken back is below a directory
            // that is entered.
            for (end, _) in path.match_indices('/') {
                let dir = &path[..end];
                if !dir.is_empty() && !excluded && excludes.excludes(dir) {
                    assert!(excludes.may_include_below(dir), "{text:?} {path:?}");
                }
            }
        }
    }
}
