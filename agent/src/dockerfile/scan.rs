//! A Dockerfile's logical lines: directives, comments, continuations and here-documents. Pure.
//!
//! The rules are those of BuildKit's parser (docs.docker.com/reference/dockerfile, *Format*): it knows
//! where an instruction begins and ends, and nothing of what it means.

use std::ops::Range;

/// A Dockerfile that was taken apart. Everything refers to its text.
#[derive(Debug, PartialEq, Eq)]
pub struct Scanned {
    /// `# syntax=`, when it is there, and its line.
    pub syntax: Option<(usize, String)>,
    /// The first line that the engine takes apart in another way than this, and why.
    pub doubtful: Option<(usize, &'static str)>,
    /// The line of an `# escape=` that makes it a backtick.
    pub backtick: Option<usize>,
    /// In their order.
    pub instructions: Vec<Instruction>,
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// The line that it begins in, from 1.
    pub line: usize,
    /// Its bytes in the text, without the end of its last line and without its here-documents.
    pub range: Range<usize>,
    /// The instruction in one line: without continuations and the comments between them.
    pub joined: String,
    /// For every byte of `joined` and its end: where it is in the text.
    pub at: Vec<usize>,
    /// How many here-documents follow.
    pub heredocs: usize,
    /// Whether one of its lines ends in more than one escape character.
    pub doubled: bool,
}

/// A here-document that does not end.
#[derive(Debug, PartialEq, Eq)]
pub struct Unclosed {
    /// The line of its instruction.
    pub line: usize,
    /// The word that should have ended it.
    pub word: String,
}

/// Takes a Dockerfile apart.
pub fn scan(text: &str) -> Result<Scanned, Unclosed> {
    let mut lines = Lines { text, next: 0, number: 0 };
    let mut escape = '\\';
    let (mut syntax, mut backtick) = (None, None);
    let mut instructions = Vec::new();
    let mut heading = true;
    let mut doubtful = None;
    while let Some(line) = lines.next() {
        let content = line.content.trim_start_matches('\u{feff}').trim_start();
        if heading {
            match directive(content) {
                Some((name, value)) if name == "escape" => {
                    escape = value.chars().next().unwrap_or('\\');
                    backtick = (escape == '`').then_some(line.number);
                    continue;
                }
                Some((name, value)) if name == "syntax" => {
                    syntax = Some((line.number, value.to_owned()));
                    continue;
                }
                Some((name, _)) if name == "check" => continue,
                _ => heading = false,
            }
        }
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let mut instruction = instruction(&line, &mut lines, escape);
        let why = doubt(&instruction, escape).map(|why| (instruction.line, why));
        doubtful = doubtful.or(why);
        for here in heredocs(&instruction.joined, escape) {
            instruction.heredocs += 1;
            // What is doubtful is the reason to name: the word may be another one.
            if !lines.any(|line| here.ends(line.content)) && doubtful.is_none() {
                return Err(Unclosed { line: instruction.line, word: here.word });
            }
        }
        instructions.push(instruction);
    }
    Ok(Scanned { syntax, doubtful, backtick, instructions })
}

struct Line<'a> {
    number: usize,
    start: usize,
    /// Without its end.
    content: &'a str,
}

struct Lines<'a> {
    text: &'a str,
    next: usize,
    number: usize,
}

impl<'a> Iterator for Lines<'a> {
    type Item = Line<'a>;

    fn next(&mut self) -> Option<Line<'a>> {
        let start = self.next;
        let rest = self.text.get(start..).filter(|rest| !rest.is_empty())?;
        let length = rest.find('\n').map_or(rest.len(), |end| end + 1);
        self.next += length;
        self.number += 1;
        let line = &rest[..length];
        let line = line.strip_suffix('\n').unwrap_or(line);
        Some(Line { number: self.number, start, content: line.strip_suffix('\r').unwrap_or(line) })
    }
}

/// `# name=value`
fn directive(line: &str) -> Option<(String, &str)> {
    let (name, value) = line.strip_prefix('#')?.split_once('=')?;
    let (name, value) = (name.trim(), value.trim());
    let plain = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric());
    (plain && !value.is_empty()).then(|| (name.to_ascii_lowercase(), value))
}

/// The instruction that begins in `first`, with the lines that continue it.
fn instruction(first: &Line<'_>, lines: &mut Lines<'_>, escape: char) -> Instruction {
    let content = first.content.trim_start_matches('\u{feff}').trim_start();
    let start = first.start + first.content.len() - content.len();
    let mut instruction = Instruction {
        line: first.number,
        range: start..start,
        joined: String::new(),
        at: Vec::new(),
        heredocs: 0,
        doubled: false,
    };
    let mut continues = instruction.append(start, content, escape);
    while continues {
        let Some(line) = lines.next() else { break };
        let content = line.content.trim_start();
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        continues = instruction.append(line.start, line.content, escape);
    }
    instruction.at.push(instruction.range.end);
    instruction
}

impl Instruction {
    /// Adds a line; tells whether the next one belongs to it too.
    fn append(&mut self, start: usize, line: &str, escape: char) -> bool {
        let trimmed = line.trim_end_matches([' ', '\t']);
        let before = trimmed.strip_suffix(escape);
        // Two of them are one that was written as itself.
        let continues = before.is_some_and(|before| !before.ends_with(escape));
        self.doubled |= before.is_some() && !continues;
        let kept = before.filter(|_| continues).unwrap_or(line);
        self.joined.push_str(kept);
        self.at.extend(start..start + kept.len());
        self.range.end = start + line.len();
        continues
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Heredoc {
    word: String,
    tabs: bool,
}

impl Heredoc {
    fn ends(&self, line: &str) -> bool {
        let line = if self.tabs { line.trim_start_matches('\t') } else { line };
        // As BuildKit's, whatever the ends of lines are.
        line.trim_end_matches('\r') == self.word
    }
}

/// Why the engine may read an instruction otherwise: then a stranger could hide others in it.
fn doubt(instruction: &Instruction, escape: char) -> Option<&'static str> {
    if instruction.doubled {
        return Some(
            "a line ends in two backslashes, which the engine takes for a continuation: write it in another way",
        );
    }
    let line = instruction.joined.as_str();
    let (words, open) = split(line, escape);
    let mut words = words.into_iter().skip_while(|word| word.eq_ignore_ascii_case("ONBUILD"));
    let keyword = words.next().unwrap_or_default().to_ascii_uppercase();
    if !HEREDOCS.contains(&keyword.as_str()) || !line.contains("<<") {
        return None;
    }
    if open {
        return Some(
            "a quote does not end on the line of a here-document, which the engine takes for none",
        );
    }
    let rest: Vec<&str> = words.collect();
    let heres = rest.iter().filter(|word| heredoc(word).is_some());
    let arguments = || rest.iter().find(|word| !word.starts_with("--"));
    let (mut any, mut escaped) = (false, false);
    for word in heres {
        any = true;
        escaped |= word.contains(escape);
    }
    if any
        && (escaped || line.contains("${") || arguments().is_some_and(|word| word.starts_with('[')))
    {
        return Some(
            "a here-document on a line with a JSON list, `${…}` or a backslash in its word: the engine reads it in another way",
        );
    }
    None
}

/// The instructions that may have here-documents.
const HEREDOCS: [&str; 3] = ["RUN", "COPY", "ADD"];

/// The here-documents of a line: words like `<<EOF`, `<<-EOF`, `3<<"EOF"`.
fn heredocs(joined: &str, escape: char) -> Vec<Heredoc> {
    let mut words = split(joined, escape).0.into_iter();
    let mut keyword = words.next().unwrap_or_default().to_ascii_uppercase();
    if keyword == "ONBUILD" {
        keyword = words.next().unwrap_or_default().to_ascii_uppercase();
    }
    if !HEREDOCS.contains(&keyword.as_str()) {
        return Vec::new();
    }
    words.filter_map(heredoc).collect()
}

fn heredoc(word: &str) -> Option<Heredoc> {
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (tabs, name) = match rest.strip_prefix('-') {
        Some(name) => (true, name),
        None => (false, rest),
    };
    let word: String = name.chars().filter(|c| !['"', '\''].contains(c)).collect();
    (!word.is_empty() && !name.contains('<')).then_some(Heredoc { word, tabs })
}

/// A line's words as a shell sees them: quotes keep words together and stay. Tells whether one does not end.
fn split(line: &str, escape: char) -> (Vec<&str>, bool) {
    let mut words = Vec::new();
    let mut begun = None;
    let mut quote = None;
    let mut chars = line.char_indices();
    while let Some((index, c)) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            words.extend(begun.take().map(|start| &line[start..index]));
            continue;
        }
        begun.get_or_insert(index);
        if c == escape && quote != Some('\'') {
            chars.next();
        } else if Some(c) == quote {
            quote = None;
        } else if quote.is_none() && ['"', '\''].contains(&c) {
            quote = Some(c);
        }
    }
    words.extend(begun.map(|start| &line[start..]));
    (words, quote.is_some())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn joined(text: &str) -> Vec<(usize, String)> {
        let scanned = scan(text).unwrap();
        scanned.instructions.into_iter().map(|i| (i.line, i.joined)).collect()
    }

    #[test]
    fn continuations_and_comments() {
        let text =
            "# c\n\nFROM x\nRUN a && \\\n  # between\n\n  b \\\n  c\nENV p=c:\\\\\n  COPY a b";
        assert_eq!(
            joined(text),
            [
                (3, "FROM x".into()),
                (4, "RUN a &&   b   c".into()),
                (9, "ENV p=c:\\\\".into()),
                (10, "COPY a b".into()),
            ]
        );
    }

    #[test]
    fn directives_count_only_at_the_top() {
        let scanned =
            scan("\u{feff}# syntax=docker/dockerfile:1\n#escape=`\nFROM x\nRUN a `\nb\n").unwrap();
        assert_eq!(scanned.syntax, Some((1, "docker/dockerfile:1".into())));
        assert_eq!(scanned.instructions[1].joined, "RUN a b");
        assert_eq!(scanned.backtick, Some(2));
        let late = scan("# a comment\n# escape=`\n# syntax=x\nFROM x `\n").unwrap();
        assert_eq!((late.syntax, late.instructions.len()), (None, 1));
    }

    #[test]
    fn here_documents_are_passed_over() {
        let text = "FROM x\nRUN <<EOF cat <<-\"B\" >/b\nCOPY --link\nEOF\n\tB\nCOPY <<'E' /x\nRUN <<Z\nE\nENV a=<<b\n";
        let lines: Vec<_> = joined(text).into_iter().map(|(line, _)| line).collect();
        assert_eq!(lines, [1, 2, 6, 9]);
        assert_eq!(
            scan("RUN true\nRUN <<EOF\nEOF \n"),
            Err(Unclosed { line: 2, word: "EOF".into() })
        );
        // A shell's own, which is none of Docker's; and a quoted one.
        assert_eq!(joined("RUN cat<<EOF\nRUN echo '<<EOF'\nRUN echo a << b\n").len(), 3);
    }

    #[test]
    fn windows_line_ends() {
        let text = "FROM x\r\nRUN a \\\r\n b\r\n";
        let scanned = scan(text).unwrap();
        assert_eq!(scanned.instructions[1].joined, "RUN a  b");
        assert_eq!(&text[scanned.instructions[1].range.clone()], "RUN a \\\r\n b");
    }

    proptest! {
        /// Whatever the text is: positions are within it, in order, and of the same bytes.
        #[test]
        fn positions_hold(text in "(FROM|RUN|COPY|#|\\\\|<<A|A|'|\"|`|é|\r| |\t|\n){0,40}") {
            let Ok(scanned) = scan(&text) else { return Ok(()) };
            let mut last = 0;
            for instruction in scanned.instructions {
                prop_assert!(instruction.range.start >= last);
                last = instruction.range.end;
                prop_assert!(last <= text.len());
                prop_assert_eq!(instruction.at.len(), instruction.joined.len() + 1);
                for (byte, at) in instruction.joined.bytes().zip(&instruction.at) {
                    prop_assert_eq!(byte, text.as_bytes()[*at]);
                }
            }
        }
    }
}
