//! The pin of a base: the image that the built stage is made from gets a digest. Pure.

use super::scan::{Instruction, Scanned};
use super::words::Words;

/// A `FROM` in its place.
struct Stage<'a> {
    instruction: &'a Instruction,
    image: String,
    name: Option<String>,
}

/// Where `@digest` is to be put in, by instruction: every `FROM` of the same image, so that all of
/// them are the same one. Or why there is no such place, with the line.
pub fn places<'a>(
    scanned: &'a Scanned,
    target: Option<&str>,
    digest: &str,
) -> Result<Vec<(&'a Instruction, usize)>, (usize, String)> {
    let stages: Vec<_> = scanned.instructions.iter().filter_map(stage).collect();
    let Some(mut at) = built(&stages, target) else {
        // The engine says that there is no such stage.
        return Ok(Vec::new());
    };
    while let Some(earlier) = named(&stages[..at], &stages[at].image) {
        at = earlier;
    }
    let base = &stages[at];
    let line = base.instruction.line;
    if base.image.eq_ignore_ascii_case("scratch") {
        return Err((line, format!("FROM scratch has no base image that could be {digest}")));
    }
    if let Some((_, given)) = base.image.split_once('@') {
        return if given == digest {
            Ok(Vec::new())
        } else {
            Err((line, format!("FROM {} is not {digest}, which the build asks for", base.image)))
        };
    }
    // An earlier stage may have the image's name.
    let same = |at: &usize| {
        stages[*at].image == base.image && named(&stages[..*at], &base.image).is_none()
    };
    let places = (0..stages.len()).filter(same).map(|at| &stages[at]);
    Ok(places.map(|stage| (stage.instruction, image_end(stage))).collect())
}

fn stage(instruction: &Instruction) -> Option<Stage<'_>> {
    let words = Words::of(instruction);
    if words.keyword != "FROM" {
        return None;
    }
    let mut arguments = words.rest.split_whitespace();
    let image = arguments.next().unwrap_or_default().to_owned();
    let named = arguments.next().is_some_and(|word| word.eq_ignore_ascii_case("as"));
    let name = arguments.next().filter(|_| named).map(str::to_owned);
    Some(Stage { instruction, image, name })
}

fn built(stages: &[Stage<'_>], target: Option<&str>) -> Option<usize> {
    let Some(target) = target else { return stages.len().checked_sub(1) };
    named(stages, target).or_else(|| target.parse().ok().filter(|index| *index < stages.len()))
}

fn named(stages: &[Stage<'_>], name: &str) -> Option<usize> {
    let is = |stage: &Stage<'_>| stage.name.as_ref().is_some_and(|n| n.eq_ignore_ascii_case(name));
    stages.iter().rposition(is)
}

/// Where the image's name ends in the instruction's one line.
fn image_end(stage: &Stage<'_>) -> usize {
    let joined = &stage.instruction.joined;
    let rest = Words::of(stage.instruction).rest.len();
    joined.len() - rest + stage.image.len()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::scan::scan;
    use super::*;

    fn pinned(text: &str, target: Option<&str>) -> Result<String, (usize, String)> {
        let scanned = scan(text).unwrap();
        let mut out = text.to_owned();
        for (instruction, end) in places(&scanned, target, "D")?.into_iter().rev() {
            out.insert_str(instruction.at[end - 1] + 1, "@D");
        }
        Ok(out)
    }

    #[test]
    fn the_base_of_the_built_stage_is_pinned() {
        let text = "FROM --platform=x a:1 AS one\nFROM b\nFROM One as two\nRUN true\n";
        assert_eq!(
            pinned(text, None).unwrap(),
            "FROM --platform=x a:1@D AS one\nFROM b\nFROM One as two\nRUN true\n"
        );
        assert!(pinned(text, Some("1")).unwrap().contains("FROM b@D\n"));
        assert_eq!(pinned(text, Some("nosuch")).unwrap(), text);
        let own_name = "FROM a AS a\nFROM a\nCOPY x /y\n";
        assert_eq!(pinned(own_name, None).unwrap(), "FROM a@D AS a\nFROM a\nCOPY x /y\n");
        assert_eq!(
            pinned("FROM \\\n ${X}\nFROM ${X} AS b", None).unwrap(),
            "FROM \\\n ${X}@D\nFROM ${X}@D AS b"
        );
    }

    #[test]
    fn what_cannot_be_pinned_is_refused() {
        assert_eq!(pinned("FROM scratch", None).unwrap_err().0, 1);
        assert_eq!(pinned("\nFROM a@E", None).unwrap_err().0, 2);
        assert_eq!(pinned("FROM a@D", None).unwrap(), "FROM a@D");
        assert_eq!(pinned("RUN true", None).unwrap(), "RUN true");
    }
}
