//! The last lines that a step printed, of both its streams in the order in which they were read: what somebody wants
//! to see first when it failed.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::lines::Part;

/// How many lines are kept: what fits a screen.
const LINES: usize = 20;
/// How much of one line is kept.
const LINE_BYTES: usize = 1024;

/// Shared by those who read the two streams.
#[derive(Debug, Default)]
pub struct Tail(Mutex<VecDeque<String>>);

/// One stream's line that has begun.
#[derive(Debug, Default)]
pub struct Begun(Vec<u8>);

impl Tail {
    /// Takes a part of a line.
    pub fn see(&self, begun: &mut Begun, part: &Part) {
        let room = LINE_BYTES.saturating_sub(begun.0.len());
        begun.0.extend_from_slice(&part.content[..part.content.len().min(room)]);
        if part.partial {
            return;
        }
        let line = String::from_utf8_lossy(&std::mem::take(&mut begun.0)).into_owned();
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
}
