//! Stages: their names, references to earlier ones by number, and the one to build. Pure.
//!
//! Docker takes names without regard to case and the engine does not, so references get their stage's own letters; of
//! two with one name one takes the first and the other the last. Where a number is no earlier stage's, Docker says so and the engine breaks down.

use std::ops::Range;

use super::scan::Instruction;
use super::words::{Flag, Words};

/// The stages so far, each with its name where it has one.
#[derive(Default)]
pub struct Names(Vec<Option<String>>);

impl Names {
    /// Takes the arguments of a `FROM`; or tells why they could be read in two ways.
    pub fn add(&mut self, arguments: &str) -> Result<(), String> {
        let odd = |c: char| !c.is_ascii() && c.is_whitespace() || c.is_control() && c != '\t';
        if arguments.contains(odd) {
            return Err("FROM: a blank or a control character that is no space".to_owned());
        }
        let mut words = arguments.split_ascii_whitespace();
        if words.nth(1).is_none_or(|word| !word.eq_ignore_ascii_case("as")) {
            self.0.push(None);
            return Ok(());
        }
        let name = words.next().unwrap_or_default();
        let plain = |c: char| c.is_ascii_alphanumeric() || ['_', '.', '-'].contains(&c);
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(plain) {
            return Err(format!(
                "FROM … AS {name}: a stage's name is of letters, digits, `_`, `.` and `-`, the first a letter"
            ));
        }
        if self.known(name).is_some() {
            return Err(format!("FROM … AS {name}: an earlier stage has that name"));
        }
        self.0.push(Some(name.to_owned()));
        Ok(())
    }

    /// The stage to build by the name that the engine has for it: in the Dockerfile's letters, and a number only where
    /// the stage has nothing else. One that is not there stays as it is; the engine says so.
    pub fn target<'a>(&'a self, target: &'a str) -> &'a str {
        let numbered = || self.0.get(target.parse::<usize>().ok()?)?.as_deref();
        self.known(target).or_else(numbered).unwrap_or(target)
    }

    /// A name in the Dockerfile's own letters.
    fn known(&self, name: &str) -> Option<&str> {
        self.0.iter().flatten().find(|known| known.eq_ignore_ascii_case(name)).map(String::as_str)
    }
}

/// The text with every reference to a stage in that stage's own letters; `None` where they are. Nothing changes its place.
pub fn in_own_letters(text: &str, instructions: &[Instruction]) -> Option<String> {
    let mut names: Vec<String> = Vec::new();
    let mut changed = text.to_owned();
    for instruction in instructions {
        let words = Words::of(instruction);
        for range in references(&words, &instruction.joined) {
            let given = &instruction.joined[range.clone()];
            let own = names.iter().find(|name| name.eq_ignore_ascii_case(given));
            for (at, letter) in range.zip(own.map_or(given, String::as_str).chars()) {
                let at = instruction.at[at];
                changed.replace_range(at..=at, letter.encode_utf8(&mut [0; 4]));
            }
        }
        let mut given = words.rest.split_ascii_whitespace().skip(1);
        if words.keyword == "FROM"
            && given.next().is_some_and(|word| word.eq_ignore_ascii_case("as"))
        {
            names.extend(given.next().map(str::to_owned));
        }
    }
    (changed != text).then_some(changed)
}

/// Where an instruction names what may be a stage, in its one line. Only ASCII.
fn references(words: &Words<'_>, line: &str) -> Vec<Range<usize>> {
    let found = |within: Range<usize>, name: &str| {
        let start = within.start + line[within].find(name)?;
        (!name.is_empty() && name.is_ascii()).then(|| start..start + name.len())
    };
    if words.keyword == "FROM" {
        let image = words.rest.split_ascii_whitespace().next().unwrap_or_default();
        return found(words.rest_range(), image).into_iter().collect();
    }
    let of_flag = |flag: &Flag| {
        let name = from(&words.keyword, flag)?;
        let written = &line[flag.range.clone()];
        // A target may hold these letters too.
        let edges = if words.keyword == "COPY" { "-" } else { ",=\"'" };
        let is_key = |at: &usize| written[..*at].ends_with(|c| edges.contains(c));
        let written = written.to_ascii_lowercase();
        let at = written.match_indices("from=").map(|(at, _)| at).find(is_key)?;
        found(flag.range.start + at + "from=".len()..flag.range.end, name)
    };
    words.flags.iter().filter_map(of_flag).collect()
}

/// Why an instruction of stage `stage` (from 0) is refused: what it takes files from is in a variable, or a number, and
/// not that of an earlier stage.
pub fn refused(words: &Words<'_>, stage: usize) -> Option<String> {
    words.flags.iter().find_map(|flag| {
        let from = from(&words.keyword, flag)?;
        if from.contains('$') {
            return Some(format!(
                "{} --{}: from={from} is not supported, nor by Docker: name the stage or image, or a stage that is FROM it",
                words.keyword, flag.name
            ));
        }
        let number: i64 = from.parse().ok()?;
        let earlier = usize::try_from(number).is_ok_and(|number| number < stage);
        (!earlier).then(|| {
            format!(
                "{} --{}: there is no stage {number} before this one, whose number is {stage}",
                words.keyword, flag.name
            )
        })
    })
}

/// `COPY --from=X`, `RUN --mount=…,from=X`
fn from<'a>(keyword: &str, flag: &'a Flag) -> Option<&'a str> {
    let value = flag.value.as_deref()?;
    match (keyword, flag.name.as_str()) {
        ("COPY", "from") => Some(value),
        ("RUN", "mount") => value.split(',').find_map(|part| part.strip_prefix("from=")),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::scan::scan;
    use super::*;

    fn of(line: &str, stage: usize) -> Option<String> {
        refused(&Words::of(&scan(line).unwrap().instructions.remove(0)), stage)
    }

    #[test]
    fn a_target_is_found_in_other_letters_and_by_number() {
        let mut names = Names::default();
        for from in ["a AS Build", "b", "Build AS run-2"] {
            names.add(from).unwrap();
        }
        for (target, stage) in [
            ("Build", "Build"),
            ("build", "Build"),
            ("RUN-2", "run-2"),
            ("0", "Build"),
            ("1", "1"),
            ("2", "run-2"),
            ("3", "3"),
            ("a", "a"),
            ("buil", "buil"),
            ("", ""),
        ] {
            assert_eq!(names.target(target), stage, "{target}");
        }
    }

    #[test]
    fn references_get_the_letters_of_their_stage() {
        let own = |text: &str| in_own_letters(text, &scan(text).unwrap().instructions);
        let text = "FROM x AS Build\nFROM \\\n  bUI\\\nLD as two\nCOPY --link --from=BUILD BUILD /BUILD\n\
                    RUN --mount=target=/from=TWO,from=TWO --mount=type=bind,from=\"build\",target=/b TWO\n\
                    COPY --from=\"Two\" a /b\nONBUILD COPY --from=TWO a /b\nCOPY --from=three a /b\n\
                    COPY <<EOF /c\nFROM TWO\nEOF\nFROM y AS THREE";
        let expected = "FROM x AS Build\nFROM \\\n  Bui\\\nld as two\nCOPY --link --from=Build BUILD /BUILD\n\
                        RUN --mount=target=/from=TWO,from=two --mount=type=bind,from=\"Build\",target=/b TWO\n\
                        COPY --from=\"two\" a /b\nONBUILD COPY --from=TWO a /b\nCOPY --from=three a /b\n\
                        COPY <<EOF /c\nFROM TWO\nEOF\nFROM y AS THREE";
        assert_eq!(own(text).unwrap(), expected);
        assert_eq!(own(expected), None);
        // Its own name is no stage before it.
        assert_eq!(own("FROM Alpine AS alpine\nCOPY --from=É a /b"), None);
    }

    #[test]
    fn only_earlier_stages_have_a_number() {
        for (line, stage) in [
            ("COPY --from=0 a /b", 1),
            ("COPY --from=1 a /b", 2),
            ("COPY --from=debian:12 a /b", 0),
            ("COPY --from=a 1 2", 0),
            ("RUN --mount=type=bind,from=0,target=/x true", 1),
            ("RUN --mount=type=bind,from=a --mount=type=cache,target=/9 true", 1),
            ("RUN from=7", 0),
        ] {
            assert_eq!(of(line, stage), None, "{line}");
        }
        for (line, stage) in [
            ("COPY --from=0 a /b", 0),
            ("COPY --from=-1 a /b", 3),
            ("COPY --chown=1 --from=2 a /b", 1),
            ("RUN --mount=type=bind,from=1,target=/x true", 1),
        ] {
            assert!(of(line, stage).unwrap().contains("there is no stage"), "{line}");
        }
        for line in ["COPY --from=$A a /b", "RUN --mount=from=x${A},target=/x true"] {
            assert!(of(line, 9).unwrap().contains('$'), "{line}");
        }
    }
}
