//! A Dockerfile as the engine understands it: what it lacks is rewritten, or refused by name and line.
//!
//! ```text
//! text ─▶ scan (logical lines) ─▶ words (flags) ─▶ rules ─▶ kept | rewritten, with a note | refused
//! ```
//! buildah 1.39 knows most of Docker's language, but not all, and it passes over some flags that it
//! does not know. **Invariant**: what Docker's reference has is built as it says there, or the build
//! fails before its first step with the line, or a note in the log says what differs.
//! docs/DOCKERFILE.md lists all three for users.
//!
//! The text is a stranger's: nothing is run, and no name in it is looked up outside the source.

mod parents;
mod pattern;
mod pin;
mod platform;
mod rules;
mod scan;
mod secret_mount;
mod shell;
mod stages;
mod variables;
mod words;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use self::rules::Rule;
use self::scan::Instruction;
use self::words::Words;

/// What the engine gets, and what the user is told about it.
#[derive(Debug, PartialEq, Eq)]
pub struct Adapted<'a> {
    /// The same text where nothing had to change.
    pub text: Cow<'a, str>,
    /// For the build's log.
    pub notes: Vec<String>,
    /// The stage to build, by the name that the engine has for it.
    pub target: Option<String>,
}

/// What Kiln cannot build.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("Dockerfile line {line}: {what}")]
pub struct Refused {
    /// From 1.
    pub line: usize,
    /// By name, with what to do instead.
    pub what: String,
    /// It is the base that is not the one that the build asks for.
    pub base: bool,
}

/// What a build asks of its Dockerfile.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    /// The stage to build; the last one otherwise.
    pub target: Option<&'a str>,
    /// The digest that the base of that stage has to have, `sha256:…`.
    pub base_digest: Option<&'a str>,
    /// `--build-arg`, by name.
    pub build_args: &'a [(String, String)],
}

/// Adapts a Dockerfile to the engine. Patterns are looked up in `source`.
pub fn adapt<'a>(text: &'a str, source: &Path, asked: Asked<'_>) -> Result<Adapted<'a>, Refused> {
    let refused = |line, what| Refused { line, what, base: false };
    let scanned = scan::scan(text).map_err(|unclosed| {
        let what = format!("the here-document has no end: no line is just `{}`", unclosed.word);
        refused(unclosed.line, what)
    })?;
    if let Some((line, syntax)) = &scanned.syntax
        && !is_dockers(syntax)
    {
        let what = format!("the syntax {syntax} is not supported, only docker/dockerfile");
        return Err(refused(*line, what));
    }
    if let Some((line, what)) = scanned.doubtful {
        return Err(refused(line, what.to_owned()));
    }
    if let Some(line) = scanned.backtick {
        let what = "`escape` is not supported: it is for Windows' paths. Use backslashes";
        return Err(refused(line, what.to_owned()));
    }
    if let Some(changed) = stages::in_own_letters(text, &scanned.instructions) {
        let Adapted { text, notes, target } = adapt(&changed, source, asked)?;
        return Ok(Adapted { text: Cow::Owned(text.into_owned()), notes, target });
    }
    let expand = |pattern: &str| pattern::names(source, pattern);
    let mut rewritten = Rewritten::default();
    let mut froms = 0_usize;
    let mut names = stages::Names::default();
    let mut platforms = platform::Platforms::new(asked.build_args);
    let mut shells = shell::Shells::default();
    for instruction in &scanned.instructions {
        let refused = |what| refused(instruction.line, what);
        let outer = Words::of(instruction);
        let onbuild = outer.keyword == "ONBUILD";
        let words = if onbuild { outer.inner(instruction) } else { outer };
        if words.keyword == "FROM" {
            froms += 1;
            names.add(words.rest).map_err(refused)?;
        }
        for left_out in platforms.see(&words).map_err(refused)? {
            rewritten.put(instruction, left_out, "");
        }
        // The stages of an ONBUILD are those of another Dockerfile.
        if !onbuild && let Some(what) = stages::refused(&words, froms.saturating_sub(1)) {
            return Err(refused(what));
        }
        if !onbuild && let Some(with) = shells.see(&words) {
            rewritten.replace(instruction, with);
            continue;
        }
        let has_link = words.flags.iter().any(|flag| flag.name == "link" && rules::is_set(flag));
        match rules::rule(&words, onbuild) {
            Rule::Keep => {}
            Rule::Refuse(what) => return Err(refused(what)),
            Rule::Change(edits) => {
                if has_link {
                    rewritten.note(LINK, instruction.line);
                }
                for (range, with) in edits {
                    rewritten.put(instruction, range, &with);
                }
            }
            Rule::Parents => {
                let copies =
                    parents::rewrite(&words, &instruction.joined, &expand).map_err(refused)?;
                rewritten.note(PARENTS, instruction.line);
                if has_link {
                    rewritten.note(LINK, instruction.line);
                }
                if parents::has_variable(&words) {
                    rewritten.note(PARENTS_VARIABLE, instruction.line);
                }
                rewritten.replace(instruction, copies);
            }
        }
    }
    if let Some(digest) = asked.base_digest {
        let places = pin::places(&scanned, asked.target, digest)
            .map_err(|(line, what)| Refused { line, what, base: true })?;
        for (instruction, end) in places {
            rewritten.insert(instruction, end, format!("@{digest}"));
        }
    }
    let target = asked.target.map(|target| names.target(target).to_owned());
    Ok(Adapted { target, ..rewritten.of(text) })
}

const LINK: &str = "COPY --link is built without --link: the files become part of the image's one \
                    layer, and links in the destination's path are followed";
const PARENTS: &str = "COPY --parents is built as one COPY for each source: directories that it makes \
                       have mode 0755, whatever theirs is";
const PARENTS_VARIABLE: &str = "COPY --parents with a variable in a source: its value is taken for a plain name, without \
                                a pattern, `..` or `/./`";

/// `docker/dockerfile:1`, as it is or with the name of Docker's registry.
fn is_dockers(syntax: &str) -> bool {
    let name = syntax.strip_prefix("docker.io/").unwrap_or(syntax);
    let name = name.split_once([':', '@']).map_or(name, |(name, _)| name);
    matches!(name, "docker/dockerfile" | "docker/dockerfile-upstream")
}

/// The changes to a text, in its order.
#[derive(Default)]
struct Rewritten {
    edits: Vec<(std::ops::Range<usize>, String)>,
    notes: BTreeMap<&'static str, Vec<usize>>,
}

impl Rewritten {
    fn note(&mut self, note: &'static str, line: usize) {
        self.notes.entry(note).or_default().push(line);
    }

    /// Puts a text over a part of an instruction. Continuations within the part stay, and what is left
    /// of it is blank.
    fn put(&mut self, instruction: &Instruction, part: Range<usize>, with: &str) {
        let mut with = with.to_owned();
        for at in &instruction.at[part] {
            let with = if with.is_empty() { " ".to_owned() } else { std::mem::take(&mut with) };
            self.edits.push((*at..*at + 1, with));
        }
    }

    fn replace(&mut self, instruction: &Instruction, with: String) {
        self.edits.push((instruction.range.clone(), with));
    }

    fn insert(&mut self, instruction: &Instruction, before: usize, what: String) {
        // After the byte before: what follows may begin in another line.
        let at = instruction.at[before - 1] + 1;
        self.edits.push((at..at, what));
    }

    fn of(mut self, text: &str) -> Adapted<'_> {
        self.edits.sort_by_key(|(range, _)| range.start);
        let notes = self.notes.into_iter().map(|(note, lines)| {
            let lines: Vec<_> = lines.iter().map(usize::to_string).collect();
            format!("Dockerfile line {}: {note}", lines.join(", "))
        });
        let notes = notes.collect();
        if self.edits.is_empty() {
            return Adapted { text: Cow::Borrowed(text), notes, target: None };
        }
        let mut out = String::with_capacity(text.len());
        let mut from = 0;
        for (range, with) in self.edits {
            out.push_str(&text[from..range.start]);
            out.push_str(&with);
            from = range.end;
        }
        out.push_str(&text[from..]);
        Adapted { text: Cow::Owned(out), notes, target: None }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn adapted(text: &str) -> Result<(String, Vec<String>), String> {
        let source = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(source.path().join("a/b")).unwrap();
        std::fs::write(source.path().join("a/b/c.md"), "").unwrap();
        adapt(text, source.path(), Asked::default())
            .map(|adapted| (adapted.text.into_owned(), adapted.notes))
            .map_err(|refused| refused.to_string())
    }

    #[test]
    fn commands_get_the_shell_of_their_stage() {
        let text = "FROM x AS a\nCMD before\nSHELL [\"/bin/bash\", \"-c\"]\nCMD echo \"$A\" \\\n  && b\nFROM a\n\
                    ENTRYPOINT exec it\nCMD [\"as\", \"is\"]\nFROM y\nCMD other\n";
        let (out, notes) = adapted(text).unwrap();
        let expected = "FROM x AS a\nCMD before\nSHELL [\"/bin/bash\", \"-c\"]\n\
                        CMD [\"/bin/bash\",\"-c\",\"echo \\\"$A\\\"   && b\"]\nFROM a\n\
                        ENTRYPOINT [\"/bin/bash\",\"-c\",\"exec it\"]\nCMD [\"as\", \"is\"]\nFROM y\nCMD other\n";
        assert_eq!((out.as_str(), notes.len()), (expected, 0));
    }

    #[test]
    fn what_the_engine_takes_apart_in_another_way_is_refused() {
        for (text, line) in [
            ("FROM evil\nRUN : \\\\\nFROM x\n", 2),
            ("FROM evil\nRUN : \\\\ \t\nFROM x\n", 2),
            ("FROM x\nRUN : <<EOF # it's\nFROM evil\nRUN : \\\nEOF\n", 2),
            ("FROM x\nRUN : <<E\\OF\nFROM evil\nEOF\n", 2),
            ("FROM x\nRUN [\"true\"] <<EOF\nFROM evil\nEOF\n", 2),
            ("FROM x\nONBUILD RUN : <<EOF ${a\nFROM evil\nEOF\n", 2),
            ("FROM x AS registry/y\nFROM z\n", 1),
            ("FROM x AS y@sha256:z\nFROM y\n", 1),
            ("FROM x AS a\nFROM y AS A\n", 2),
            ("FROM x\u{a0}AS a\nFROM a\n", 1),
            ("FROM x AS $a\n", 1),
            ("FROM x\nRUN --mount=$M true\n", 2),
            ("FROM x\nCOPY --chown=à--exclude=* a /b\n", 2),
        ] {
            let refusal = adapted(text).unwrap_err();
            assert!(refusal.starts_with(&format!("Dockerfile line {line}: ")), "{text}: {refusal}");
        }
        for text in [
            "FROM x AS Build_1.2-a\nFROM Build_1.2-a\nCOPY --from=Build_1.2-a a /b\n",
            "FROM x\nRUN echo \"a << b\" 'c' <<EOF\n\\\\\nit's\nEOF\r\nRUN cat <<<'a'\n",
            "FROM --platform=$BUILDPLATFORM x:${V} AS a\n",
            "FROM x\n# a \\\\\nRUN echo a\\\\b\n",
        ] {
            adapted(text).unwrap();
        }
    }

    #[test]
    fn a_plain_one_stays_as_it_is() {
        let text =
            "# syntax=docker/dockerfile:1.7-labs\nFROM x\nRUN <<EOF\nCOPY --exclude=a b c\nEOF\n";
        assert_eq!(adapted(text), Ok((text.to_owned(), vec![])));
    }

    #[test]
    fn flags_are_blanked_in_their_place() {
        let text = "FROM x\nCOPY --li\\\nnk --chmod=600 a /b\nONBUILD COPY --link a /b\nADD --link=false é /c\n";
        let (out, notes) = adapted(text).unwrap();
        assert_eq!(
            out,
            "FROM x\nCOPY     \\\n   --chmod=600 a /b\nONBUILD COPY        a /b\nADD              é /c\n"
        );
        assert_eq!(notes.len(), 1);
        assert!(notes[0].starts_with("Dockerfile line 2, 4: COPY --link"), "{notes:?}");
    }

    #[test]
    fn parents_become_copies() {
        let (out, notes) =
            adapted("FROM x\nCOPY --parents \\\n  # all\n  **/*.md a/b /d/\nRUN true\n").unwrap();
        assert_eq!(
            out,
            "FROM x\nCOPY [\"a/b/c.md\",\"/d/a/b/c.md\"]\nCOPY [\"a/b\",\"/d/a/b\"]\nRUN true\n"
        );
        assert!(notes[0].starts_with("Dockerfile line 2: COPY --parents"), "{notes:?}");
        assert_eq!(notes.len(), 1);
    }

    #[test]
    fn everything_that_is_dropped_from_a_copy_is_noted() {
        let (out, notes) = adapted(
            "FROM x\nCOPY --parents --link=true $A/b /d/\nCOPY --parents --link=false a /d/\n",
        )
        .unwrap();
        assert_eq!(out, "FROM x\nCOPY [\"$A/b\",\"/d/$A/b\"]\nCOPY [\"a\",\"/d/a\"]\n");
        let starts = [
            "Dockerfile line 2: COPY --link is built without",
            "Dockerfile line 2, 3: COPY --parents is built",
            "Dockerfile line 2: COPY --parents with a variable",
        ];
        assert_eq!(notes.len(), starts.len(), "{notes:?}");
        for (note, start) in notes.iter().zip(starts) {
            assert!(note.starts_with(start), "{note}");
        }
    }

    #[test]
    fn stages_are_found_in_other_letters() {
        let (out, _) = adapted(
            "FROM x AS One\nSHELL [\"/s\"]\nFROM ONE\nCOPY --from=oNE --parents a /\nCMD b\n",
        )
        .unwrap();
        let expected = "FROM x AS One\nSHELL [\"/s\"]\nFROM One\nCOPY --from=One [\"a\",\"/a\"]\nCMD [\"/s\",\"b\"]\n";
        assert_eq!(out, expected);
    }

    #[test]
    fn a_platform_that_is_this_machines_is_left_out() {
        let (out, notes) =
            adapted("FROM --platform=$BUILDPLATFORM x AS a\nFROM --platform=linux a\n").unwrap();
        assert_eq!(
            out.split_whitespace().collect::<Vec<_>>(),
            ["FROM", "x", "AS", "a", "FROM", "a"]
        );
        assert_eq!((out.lines().count(), notes.len()), (2, 0));
        let refused = adapted("FROM x\nFROM --platform=linux/s390x y\n").unwrap_err();
        assert!(
            refused.starts_with("Dockerfile line 2: FROM --platform=linux/s390x: "),
            "{refused}"
        );
    }

    #[test]
    fn a_base_is_pinned_among_other_changes() {
        let pin = Asked { base_digest: Some("sha256:d"), ..Asked::default() };
        let text = "FROM x AS a\nCOPY --link a /b\nFROM a\nCOPY --link a /b\n";
        let adapted = adapt(text, Path::new("/nonexistent"), pin).unwrap();
        let expected = "FROM x@sha256:d AS a\nCOPY        a /b\nFROM a\nCOPY        a /b\n";
        assert_eq!(adapted.text, expected);
        assert!(adapt("FROM scratch", Path::new("/nonexistent"), pin).unwrap_err().base);
    }

    #[test]
    fn the_stage_to_build_is_named_as_the_engine_has_it() {
        let text = "FROM x AS Wanted\nFROM --platform=linux z as other\nFROM other\n";
        let target = |target| {
            let asked = Asked { target, ..Asked::default() };
            adapt(text, Path::new("/nonexistent"), asked).unwrap().target
        };
        for (asked, stage) in
            [("wanted", "Wanted"), ("OTHER", "other"), ("1", "other"), ("2", "2"), ("x", "x")]
        {
            assert_eq!(target(Some(asked)).unwrap(), stage);
        }
        assert_eq!(target(None), None);
    }

    #[test]
    fn refusals_name_line_and_thing() {
        for (text, start) in [
            ("FROM x\n\nCOPY --exclude=a b \\\n c", "Dockerfile line 3: COPY --exclude=a "),
            (
                "# syntax=example.com/other\nFROM x",
                "Dockerfile line 1: the syntax example.com/other ",
            ),
            ("FROM x\nONBUILD COPY --parents a b", "Dockerfile line 2: ONBUILD COPY --parents "),
            ("FROM x\nRUN <<A\nB", "Dockerfile line 2: the here-document has no end"),
        ] {
            let refused = adapted(text).unwrap_err();
            assert!(refused.starts_with(start), "{refused}");
        }
    }

    /// The corpus is built in VMs (`vm_corpus.rs`), but for what is refused here: that needs no VM.
    #[test]
    fn the_corpus_is_refused_where_it_says_so_and_nowhere_else() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host-shim/tests/corpus");
        let mut refused = 0;
        for entry in std::fs::read_dir(corpus).unwrap() {
            let dir = entry.unwrap().path();
            let (Ok(expected), Ok(text)) = (
                std::fs::read_to_string(dir.join("expect.txt")),
                std::fs::read_to_string(dir.join("Dockerfile")),
            ) else {
                continue;
            };
            let build_args = build_args(&dir.join("case.toml"));
            let asked = Asked { build_args: &build_args, ..Asked::default() };
            let found =
                adapt(&text, &dir, asked).map(|_| ()).map_err(|refused| refused.to_string());
            let by_line = expected
                .strip_prefix("fails as dockerfile_invalid\n")
                .filter(|rest| rest.starts_with("Dockerfile line "));
            refused += usize::from(by_line.is_some());
            let expected = by_line.map_or(Ok(()), |line| Err(line.trim_end().to_owned()));
            assert_eq!(found, expected, "{}", dir.display());
        }
        assert!(refused > 40, "{refused}");
    }

    /// The `--build-arg` of a case: in `args = ["--build-arg", "NAME=VALUE"]`, which is JSON too.
    fn build_args(case: &Path) -> Vec<(String, String)> {
        let text = std::fs::read_to_string(case).unwrap_or_default();
        let list = text.trim().strip_prefix("args =").unwrap_or("[]");
        let args: Vec<String> = serde_json::from_str(list.trim()).unwrap();
        let given = args.windows(2).filter(|pair| pair[0] == "--build-arg");
        given
            .filter_map(|pair| pair[1].split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }
}
