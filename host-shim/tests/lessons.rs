//! Every test that docs/LESSONS.md names is there.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

#[test]
fn every_lesson_has_its_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let lessons = std::fs::read_to_string(root.join("docs/LESSONS.md")).unwrap();
    let tests = tests_below(root, &["host-shim", "agent", "protocol", "archive", "image-tool"]);
    let rows: Vec<_> = lessons.lines().filter(|line| line.starts_with("| ")).collect();
    let mut count = 0;
    for row in rows.iter().filter(|row| !row.ends_with("| shown by |")) {
        let shown_by = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let names: Vec<_> = shown_by.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "nothing shows this: {row}");
        let gone: Vec<_> = names.iter().filter(|name| !tests.contains(**name)).collect();
        assert!(gone.is_empty(), "no such test: {gone:?}, in: {row}");
        count += names.len();
    }
    assert!(count > 50, "only {count} tests are named");
}

/// The functions with an attribute that makes them a test.
fn tests_below(root: &Path, crates: &[&str]) -> BTreeSet<String> {
    let parts =
        crates.iter().flat_map(|name| ["src", "tests"].map(|part| root.join(name).join(part)));
    let mut tests = BTreeSet::new();
    for file in parts.flat_map(|part| files_below(&part)) {
        let mut is_test = false;
        for line in std::fs::read_to_string(file).unwrap().lines().map(str::trim) {
            is_test |= line == "#[test]" || line.starts_with("#[tokio::test");
            let function = line.strip_prefix("async fn ").or_else(|| line.strip_prefix("fn "));
            if let Some(name) = function.and_then(|rest| rest.split('(').next())
                && std::mem::take(&mut is_test)
            {
                tests.insert(name.to_owned());
            }
        }
    }
    tests
}

/// The sources in a directory, if it is there.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let paths = entries.map(|entry| entry.unwrap().path());
    let below = |path: PathBuf| if path.is_dir() { files_below(&path) } else { vec![path] };
    paths.flat_map(below).filter(|path| path.extension().is_some_and(|kind| kind == "rs")).collect()
}
