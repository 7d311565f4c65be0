//! The last lines that a step printed, of both its streams in the order in which they were read: what somebody wants
//! to see first when it failed.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::lines::Part;

/// How many lines are kept: what fits a screen.
const LINES: usize = 20;
/// How much of one line is kept.
const LINE_BYTES: usize = 1024;
/// Ends a line of which more was printed. The host takes secrets out of what it gets: in front of this mark it takes
/// what is the beginning of one for one.
const CUT: char = '…';

/// Shared by those who read the two streams.
#[derive(Debug, Default)]
pub struct Tail(Mutex<VecDeque<String>>);

/// One stream's line that has begun.
#[derive(Debug, Default)]
pub struct Begun {
    bytes: Vec<u8>,
    is_cut: bool,
}

impl Begun {
    /// Takes a part; gives the line once it is over. Of a long one its beginning, as whole characters, and the mark: a
    /// line is never cut at its start, where nobody could tell the end of a secret from anything else.
    pub fn take(&mut self, part: &Part) -> Option<String> {
        let room = LINE_BYTES.saturating_sub(self.bytes.len());
        let taken = part.content.len().min(room);
        self.bytes.extend_from_slice(&part.content[..taken]);
        self.is_cut |= taken < part.content.len();
        if part.partial {
            return None;
        }
        let Self { mut bytes, is_cut } = std::mem::take(self);
        if is_cut {
            let broken = bytes.utf8_chunks().last().map_or(0, |chunk| chunk.invalid().len());
            bytes.truncate(bytes.len() - broken);
        }
        let mut line = String::from_utf8_lossy(&bytes).into_owned();
        if is_cut {
            line.push(CUT);
        }
        Some(line)
    }
}

impl Tail {
    /// Takes a part of a line.
    pub fn see(&self, begun: &mut Begun, part: &Part) {
        let Some(line) = begun.take(part) else { return };
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// The lines, oldest first.
    pub fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_both_streams_are_kept_and_bounded() {
        let tail = Tail::default();
        let (mut out, mut err) = (Begun::default(), Begun::default());
        let part = |content: &str, partial| Part { content: content.into(), partial };
        for n in 0..30 {
            tail.see(&mut out, &part(&n.to_string(), false));
        }
        tail.see(&mut out, &part("a line that ", true));
        tail.see(&mut err, &part("an error \u{1b}[31m", false));
        tail.see(&mut out, &part("goes on", false));
        let text = tail.text();
        assert_eq!(text.lines().count(), LINES);
        assert!(text.starts_with("12\n13\n"), "{text}");
        assert!(text.ends_with("29\nan error \u{1b}[31m\na line that goes on"), "{text}");
        tail.see(&mut out, &part(&"z".repeat(9000), false));
        assert!(tail.text().len() < 3 * LINE_BYTES);
    }

    /// The line that comes of these parts, the last of which ends it.
    fn line(parts: &[&[u8]]) -> String {
        let mut begun = Begun::default();
        let lines: Vec<_> = parts
            .iter()
            .enumerate()
            .filter_map(|(index, content)| {
                let partial = index + 1 < parts.len();
                begun.take(&Part { content: content.to_vec(), partial })
            })
            .collect();
        lines.concat()
    }

    #[test]
    fn a_line_that_is_cut_says_so_and_a_whole_one_does_not() {
        let at = "x".repeat(LINE_BYTES);
        assert_eq!(line(&[at.as_bytes()]), at);
        assert_eq!(line(&[at.as_bytes(), b""]), at);
        assert_eq!(line(&[at.as_bytes(), b"y"]), format!("{at}…"));
        assert_eq!(line(&[format!("{at}y").as_bytes()]), format!("{at}…"));
        let mut begun = Begun::default();
        let long = Part { content: vec![b'z'; LINE_BYTES + 1], partial: false };
        assert!(begun.take(&long).is_some_and(|line| line.ends_with(CUT)));
        let short = Part { content: b"next".to_vec(), partial: false };
        assert_eq!(begun.take(&short).as_deref(), Some("next"));
    }

    /// What is in front of the mark is the beginning of what was printed, to the byte: half a character there would
    /// hide the beginning of a secret from the host.
    #[test]
    fn a_cut_is_between_characters() {
        for before in LINE_BYTES - 3..=LINE_BYTES {
            let printed = format!("{}€uro", "x".repeat(before));
            let shown = line(&[printed.as_bytes()]);
            let kept = shown.strip_suffix(CUT).unwrap_or_default();
            assert!(printed.starts_with(kept) && kept.len() > LINE_BYTES - 3, "{shown}");
        }
        assert_eq!(line(&[b"\xff whole \xe2\x82"]), "\u{fffd} whole \u{fffd}");
    }
}
