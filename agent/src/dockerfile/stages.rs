//! Stages: their names, references to earlier ones by number, and the one to build. Pure.
//!
//! Docker takes names without regard to case and the engine does not; of two with one name one takes the first and
//! the other the last. Where a number is no earlier stage's, Docker says so and the engine breaks down.

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
        let image = words.next().unwrap_or_default();
        if let Some(name) = self.known(image)
            && name != image
        {
            return Err(format!("FROM {image}: the stage's name is {name}, in these letters"));
        }
        if words.next().is_none_or(|word| !word.eq_ignore_ascii_case("as")) {
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

/// Why an instruction of stage `stage` (from 0) is refused: what it takes files from is a number, and not that
/// of an earlier stage.
pub fn refused(words: &Words<'_>, stage: usize) -> Option<String> {
    words.flags.iter().find_map(|flag| {
        let from = from(&words.keyword, flag)?;
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
    }
}
