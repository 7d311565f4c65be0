//! `COPY --parents`, which the engine lacks, as one plain COPY for each source.
//!
//! Docker keeps the directories of a source's name, from the context or from a `/./` in it on
//! (docs.docker.com/reference/dockerfile, *COPY --parents*): `COPY --parents x/./y/z /d/` makes
//! `/d/y/z`. A COPY of `x/y/z` to exactly `/d/y/z` does the same for a file and for a directory.

use super::rules::is_dropped;
use super::words::Words;

/// Finds the names in the source that a pattern means; or tells with what there is no telling.
pub type Expand<'a> = &'a dyn Fn(&str) -> Result<Vec<String>, String>;

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
        if source.contains('\\') {
            return no("with a backslash in a source");
        }
        let mut pairs = Vec::new();
        if !is_pattern(source) {
            pairs.push([join(&root, &kept), under(destination, &kept)]);
        } else if from_stage {
            return no("with --from and a pattern: name the files, or copy their directory");
        } else if source.contains('$') {
            return no("with a variable and a pattern in one source");
        } else if is_pattern(&root) {
            return no("with a pattern before `/./`");
        } else {
            let found = expand(&join(&root, &kept))
                .map_err(|why| format!("COPY --parents is not supported {why}"))?;
            if found.is_empty() {
                return Err(format!("COPY: nothing in the source matches {source}"));
            }
            for name in found {
                if !is_speakable(&name) {
                    return no(&format!(
                        "with the name {name:?}, which {source} matches: rename it, or copy its directory"
                    ));
                }
                let kept = name.strip_prefix(&format!("{root}/")).unwrap_or(&name);
                pairs.push([as_pattern(&name), under(destination, &as_word(kept))]);
            }
        }
        for pair in pairs {
            let list = serde_json::to_string(&pair).map_err(|error| error.to_string())?;
            copies.push(format!("COPY {flags}{list}"));
        }
    }
    Ok(copies.join("\n"))
}

/// Whether a source has a variable, whose value is not known here.
pub fn has_variable(words: &Words<'_>) -> bool {
    let arguments = words.arguments();
    arguments.split_last().is_some_and(|(_, sources)| sources.iter().any(|s| s.contains('$')))
}

/// A source's part up to `/./`, and the part that is kept.
fn pivot(source: &str) -> (String, String) {
    let source = source.strip_prefix("./").unwrap_or(source);
    let (root, kept) = source.split_once("/./").unwrap_or(("", source));
    (clean(root), clean(kept))
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
    source.contains(['*', '?', '['])
}

/// Whether there is a way to write a name for the engine. It looks for quotes once more than it escapes them, takes
/// a backslash for an escape when it opens what it has found, and stumbles over `${` where it looks for
/// here-documents.
fn is_speakable(name: &str) -> bool {
    !name.contains(['"', '\\']) && !name.contains("${") && !name.contains(char::is_control)
}

/// A name as the pattern that matches nothing else.
fn as_pattern(name: &str) -> String {
    let mut pattern = String::new();
    for c in as_word(name).chars() {
        match c {
            '[' | '*' | '?' => pattern.extend(['[', c, ']']),
            _ => pattern.push(c),
        }
    }
    pattern
}

/// A name as a word in which nothing is expanded.
fn as_word(name: &str) -> String {
    let mut word = String::new();
    for c in name.chars() {
        if ['$', '\''].contains(&c) {
            word.push('\\');
        }
        word.push(c);
    }
    word
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::scan::scan;
    use super::*;

    fn of(text: &str) -> Result<String, String> {
        let instruction = scan(text).unwrap().instructions.remove(0);
        let expand = |pattern: &str| match pattern {
            "x/*/z" => Ok(vec!["x/a/z".into(), "x/b/z".into()]),
            "x/*.md" => Ok(vec!["x/a.md".into()]),
            "odd/*" => Ok(vec!["odd/x[1].md".into(), "odd/a*b?".into(), "odd/$it's".into()]),
            "bad/1*" => Ok(vec!["bad/1\"".into()]),
            "bad/2*" => Ok(vec!["bad/2\\".into()]),
            "bad/3*" => Ok(vec!["bad/3${".into()]),
            "bad/4*" => Ok(vec!["bad/4\n".into()]),
            "bad/5*" => Err("with this pattern".into()),
            _ => Ok(vec![]),
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
    fn names_that_are_found_mean_nothing_else() {
        assert_eq!(
            of("COPY --parents odd/* /d").unwrap(),
            r#"COPY ["odd/x[[]1].md","/d/odd/x[1].md"]
COPY ["odd/a[*]b[?]","/d/odd/a*b?"]
COPY ["odd/\\$it\\'s","/d/odd/\\$it\\'s"]"#
        );
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        for line in [
            "COPY --parents bad/1* /d",
            "COPY --parents bad/2* /d",
            "COPY --parents bad/3* /d",
            "COPY --parents bad/4* /d",
            "COPY --parents bad/5* /d",
            "COPY --parents a\\[b] /d",
            "COPY --parents x*/./y /d",
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
