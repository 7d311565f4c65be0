//! `COPY --parents`, which the engine lacks, as one plain COPY for each source.
//!
//! Docker keeps the directories of a source's name, from the context or from a `/./` in it on
//! (docs.docker.com/reference/dockerfile, *COPY --parents*): `COPY --parents x/./y/z /d/` makes
//! `/d/y/z`. A COPY of `x/y/z` to exactly `/d/y/z` does the same for a file and for a directory.

use super::rules::is_dropped;
use super::words::Words;

/// Finds the names in the source that a pattern means; `None` when there is no telling.
pub type Expand<'a> = &'a dyn Fn(&str) -> Option<Vec<String>>;

/// The instructions that do the same, in lines; or why there are none.
pub fn rewrite(words: &Words<'_>, line: &str, expand: Expand<'_>) -> Result<String, String> {
    let no = |why: &str| Err(format!("COPY --parents is not supported {why}"));
    let arguments = words.arguments();
    let Some((destination, sources)) = arguments.split_last().filter(|(_, s)| !s.is_empty()) else {
        return no("without a source and a destination");
    };
    if sources.iter().any(|source| source.starts_with("<<")) {
        return no("with a here-document");
    }
    let flags: Vec<_> = words.flags.iter().filter(|flag| !is_dropped(flag)).collect();
    let from_stage = flags.iter().any(|flag| flag.name == "from");
    let flags: String =
        flags.iter().map(|flag| format!("{} ", &line[flag.range.clone()])).collect();
    let mut copies = Vec::new();
    for source in sources {
        let (root, kept) = pivot(source);
        if kept.split('/').any(|part| part == "..") {
            return no("with `..` in a source");
        }
        let names = if !is_pattern(source) {
            vec![kept]
        } else if from_stage {
            return no("with --from and a pattern: name the files, or copy their directory");
        } else if source.contains('$') {
            return no("with a variable and a pattern in one source");
        } else {
            match expand(&join(&root, &kept)) {
                None => return no("with this pattern"),
                Some(found) if found.is_empty() => {
                    return Err(format!("COPY: nothing in the source matches {source}"));
                }
                Some(found) => {
                    let below = format!("{root}/");
                    let cut = |name: String| name.strip_prefix(&below).unwrap_or(&name).to_owned();
                    found.into_iter().map(cut).collect()
                }
            }
        };
        for name in names {
            let pair = [join(&root, &name), under(destination, &name)];
            let list = serde_json::to_string(&pair).map_err(|error| error.to_string())?;
            copies.push(format!("COPY {flags}{list}"));
        }
    }
    Ok(copies.join("\n"))
}

/// A source's part up to `/./`, and the part that is kept.
fn pivot(source: &str) -> (String, String) {
    let source = source.strip_prefix("./").unwrap_or(source);
    let (root, kept) = source.split_once("/./").unwrap_or(("", source));
    (root.trim_start_matches('/').to_owned(), clean(kept))
}

fn clean(path: &str) -> String {
    let parts: Vec<_> = path.split('/').filter(|part| !["", "."].contains(part)).collect();
    parts.join("/")
}

/// A name in the context.
fn join(root: &str, name: &str) -> String {
    match (root, name) {
        ("", "") => ".".to_owned(),
        ("", only) | (only, "") => only.to_owned(),
        (root, name) => format!("{root}/{name}"),
    }
}

/// A name below the destination.
fn under(destination: &str, name: &str) -> String {
    if name.is_empty() {
        return destination.to_owned();
    }
    format!("{}/{name}", destination.trim_end_matches('/'))
}

fn is_pattern(source: &str) -> bool {
    source.contains(['*', '?', '[', '\\'])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::scan::scan;
    use super::*;

    fn of(text: &str) -> Result<String, String> {
        let instruction = scan(text).unwrap().instructions.remove(0);
        let expand = |pattern: &str| match pattern {
            "x/*/z" => Some(vec!["x/a/z".into(), "x/b/z".into()]),
            "x/*.md" => Some(vec!["x/a.md".into()]),
            _ => Some(vec![]),
        };
        rewrite(&Words::of(&instruction), &instruction.joined, &expand)
    }

    #[test]
    fn every_source_keeps_its_directories() {
        assert_eq!(
            of("COPY --parents --chown=1 --link a/b.txt dir/ /d/").unwrap(),
            "COPY --chown=1 [\"a/b.txt\",\"/d/a/b.txt\"]\nCOPY --chown=1 [\"dir\",\"/d/dir\"]"
        );
        assert_eq!(of("COPY --parents ./x/./y/z d").unwrap(), "COPY [\"x/y/z\",\"d/y/z\"]");
        assert_eq!(of("COPY --parents . /").unwrap(), "COPY [\".\",\"/\"]");
        assert_eq!(
            of("COPY --from=s --parents /src/./a /").unwrap(),
            "COPY --from=s [\"src/a\",\"/a\"]"
        );
    }

    #[test]
    fn patterns_are_expanded_in_the_source() {
        assert_eq!(
            of("COPY --parents x/*/z /d/").unwrap(),
            "COPY [\"x/a/z\",\"/d/x/a/z\"]\nCOPY [\"x/b/z\",\"/d/x/b/z\"]"
        );
        assert_eq!(of("COPY --parents x/./*.md /d").unwrap(), "COPY [\"x/a.md\",\"/d/a.md\"]");
        assert!(of("COPY --parents none* /d").unwrap_err().contains("none*"));
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        for line in [
            "COPY --parents a",
            "COPY --parents",
            "COPY --parents ../a /d",
            "COPY --parents --from=s a* /d",
            "COPY --parents $A* /d",
        ] {
            assert!(of(line).is_err(), "{line}");
        }
        assert!(of("COPY --parents <<EOF /d\nEOF").is_err());
        of("COPY --parents $A/b /d").unwrap();
    }
}
