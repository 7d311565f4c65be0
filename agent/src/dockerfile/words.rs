//! The words of one instruction: its flags and its arguments. Pure.

use std::ops::Range;

use super::scan::Instruction;

/// A flag such as `--chown=1000:1000`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// Without the dashes, in lower case.
    pub name: String,
    /// What follows `=`.
    pub value: Option<String>,
    /// Where it is in the instruction's one line.
    pub range: Range<usize>,
}

/// An instruction's parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words<'a> {
    /// In upper case.
    pub keyword: String,
    /// Those before the first argument.
    pub flags: Vec<Flag>,
    /// What follows them.
    pub rest: &'a str,
    /// The length of the instruction's one line.
    end: usize,
}

impl<'a> Words<'a> {
    /// The words of an instruction.
    pub fn of(instruction: &'a Instruction) -> Self {
        Self::at(&instruction.joined, 0)
    }

    /// The words of the instruction that an `ONBUILD` holds.
    pub fn inner(&self, instruction: &'a Instruction) -> Self {
        let rest = instruction.joined.len() - self.rest.len();
        Self::at(&instruction.joined, rest)
    }

    fn at(line: &'a str, start: usize) -> Self {
        let length = line[start..].find([' ', '\t']).unwrap_or(line.len() - start);
        let keyword = line[start..start + length].to_ascii_uppercase();
        let mut next = start + length;
        let mut flags = Vec::new();
        loop {
            next += line[next..].len() - line[next..].trim_start().len();
            let rest = &line[next..];
            let word = &rest[..word_length(rest)];
            let Some(flag) = word.strip_prefix("--").filter(|flag| !flag.is_empty()) else {
                let rest = if word == "--" { rest[2..].trim_start() } else { rest };
                return Self { keyword, flags, rest, end: line.len() };
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(unquoted(value))),
                None => (flag, None),
            };
            let name = name.to_ascii_lowercase();
            flags.push(Flag { name, value, range: next..next + word.len() });
            next += word.len();
        }
    }

    /// Where the arguments are in the instruction's one line, which they end.
    pub fn rest_range(&self) -> Range<usize> {
        self.end - self.rest.len()..self.end
    }

    /// The arguments: a JSON list, or words between blanks.
    pub fn arguments(&self) -> Vec<String> {
        serde_json::from_str(self.rest)
            .unwrap_or_else(|_| self.rest.split_whitespace().map(str::to_owned).collect())
    }
}

/// To the first blank that is not in quotes.
fn word_length(text: &str) -> usize {
    let mut quote = None;
    for (index, c) in text.char_indices() {
        match quote {
            None if c.is_whitespace() => return index,
            None if ['"', '\''].contains(&c) => quote = Some(c),
            Some(open) if open == c => quote = None,
            _ => {}
        }
    }
    text.len()
}

fn unquoted(value: &str) -> String {
    value.chars().filter(|c| !['"', '\''].contains(c)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::scan::scan;
    use super::*;

    fn instruction(text: &str) -> Instruction {
        scan(text).unwrap().instructions.remove(0)
    }

    #[test]
    fn flags_end_at_the_first_argument() {
        let instruction = instruction("copy --Link \\\n --chown='a b:c' -- a --b");
        let words = Words::of(&instruction);
        assert_eq!((words.keyword.as_str(), words.rest), ("COPY", "a --b"));
        let flags: Vec<_> =
            words.flags.iter().map(|f| (f.name.as_str(), f.value.as_deref())).collect();
        assert_eq!(flags, [("link", None), ("chown", Some("a b:c"))]);
        let range = words.flags[1].range.clone();
        assert_eq!(&instruction.joined[range], "--chown='a b:c'");
    }

    #[test]
    fn arguments_are_words_or_a_list() {
        let list = instruction(r#"COPY ["a b", "/c"]"#);
        assert_eq!(Words::of(&list).arguments(), ["a b", "/c"]);
        let words = instruction("COPY a  [b] /c");
        assert_eq!(Words::of(&words).arguments(), ["a", "[b]", "/c"]);
        for empty in ["COPY", "COPY ", "COPY --x"] {
            assert!(Words::of(&instruction(empty)).arguments().is_empty());
        }
    }

    #[test]
    fn an_onbuild_holds_an_instruction() {
        let onbuild = instruction("ONBUILD copy --link a /b");
        let outer = Words::of(&onbuild);
        let inner = outer.inner(&onbuild);
        assert_eq!((inner.keyword.as_str(), inner.rest), ("COPY", "a /b"));
        assert_eq!(&onbuild.joined[inner.flags[0].range.clone()], "--link");
    }
}
