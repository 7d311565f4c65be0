//! Events as lines of text. Pure; every line that comes out is safe for a terminal.

use std::collections::BTreeMap;

use super::escape::escape;
use super::flag_names::in_failure;
use super::view::{EventView, count, duration};

/// Longest line that is put together from parts, in bytes; longer ones are broken.
const MAX_LINE: usize = 1024 * 1024;
/// Most lines that may be half-way at one time: streams times steps that run at once.
const MAX_OPEN: usize = 64;

/// Who prints a line: stream and step.
type Source = (String, Option<u64>);

/// Turns events into lines, putting the parts of long ones together.
#[derive(Debug, Default)]
pub struct Lines {
    open: BTreeMap<Source, String>,
}

impl Lines {
    /// The lines that an event completes.
    pub fn event(&mut self, event: &EventView) -> Vec<String> {
        match event {
            EventView::Log { content, stream, step, partial, .. } => {
                self.log((stream.clone(), *step), content, *partial)
            }
            EventView::Status { status, queue_position } => {
                let place = queue_position.map(|n| format!(", number {n} in the queue"));
                vec![kiln(&format!("{status}{}", place.unwrap_or_default()))]
            }
            EventView::Step { index, state, .. } => {
                // What the step said last comes before its end.
                let mut lines = if state == "started" { vec![] } else { self.end(Some(*index)) };
                lines.push(step_line(event));
                lines
            }
            EventView::Failure { kind, message } => {
                let mut lines = self.end(None);
                let message = in_failure(kind, message);
                lines.push(kiln(&format!("failed ({kind}): {message}")));
                lines
            }
            EventView::Egress { host, allowed: false, step } => {
                let who = step.map_or("a step".to_owned(), |step| format!("step {step}"));
                vec![kiln(&format!("{who} was refused {host}"))]
            }
            EventView::Trimmed { from, to } => {
                // The rest of what is open is among them.
                let mut lines = self.end(None);
                lines.push(kiln(&trimmed(*from, *to)));
                lines
            }
            EventView::Egress { .. } | EventView::Other => vec![],
        }
    }

    /// The lines that were not completed.
    pub fn finish(&mut self) -> Vec<String> {
        self.end(None)
    }

    fn log(&mut self, source: Source, content: &str, partial: bool) -> Vec<String> {
        let mut lines = vec![];
        if !self.open.contains_key(&source) && self.open.len() >= MAX_OPEN {
            lines = self.finish();
        }
        let mut line = self.open.remove(&source).unwrap_or_default();
        line.push_str(content);
        if partial && line.len() < MAX_LINE {
            self.open.insert(source, line);
        } else {
            lines.push(prefixed(&source, &line));
        }
        lines
    }

    /// Ends the open lines of one step, or all.
    fn end(&mut self, step: Option<u64>) -> Vec<String> {
        self.open
            .extract_if(.., |source, _| step.is_none() || source.1 == step)
            .map(|(source, line)| prefixed(&source, &line))
            .collect()
    }
}

/// A step's name as it is shown: `#2 make -j2`.
pub fn step_name(event: &EventView) -> Option<String> {
    let EventView::Step { index, total, name, .. } = event else { return None };
    let of = total.map(|total| format!("[{index}/{total}] ")).unwrap_or_default();
    // A name may hold several lines (a heredoc): the first one tells which step it is.
    let mut lines = name.lines().filter(|line| !line.trim().is_empty());
    let first = lines.next().unwrap_or_default().trim();
    let more = if lines.next().is_some() { " …" } else { "" };
    Some(format!("#{index} {of}{}{more}", escape(first)))
}

/// How a step stands: `done in 1.2s`, `failed with exit code 7 after 0.3s`, `cached`.
pub fn step_state(event: &EventView) -> Option<String> {
    let EventView::Step { state, exit_code, duration_ms, .. } = event else { return None };
    let time = |word| duration_ms.map(|ms| format!(" {word} {}", duration(ms))).unwrap_or_default();
    Some(match state.as_str() {
        "done" => format!("done{}", time("in")),
        "failed" => {
            let code = exit_code.map(|code| format!(" with exit code {code}")).unwrap_or_default();
            format!("failed{code}{}", time("after"))
        }
        other => escape(other).into_owned(),
    })
}

/// That events are gone, and whose doing it is.
fn trimmed(from: u64, to: u64) -> String {
    let (number, s, were) = match to.saturating_sub(from).saturating_add(1) {
        1 => ("1".to_owned(), "", "was"),
        many => (count(many), "s", "were"),
    };
    format!("{number} event{s} {were} removed by the server's retention")
}

fn step_line(event: &EventView) -> String {
    let EventView::Step { index, state, .. } = event else { return String::new() };
    if state == "started" {
        step_name(event).unwrap_or_default()
    } else {
        format!("#{index} {}", step_state(event).unwrap_or_default())
    }
}

fn kiln(text: &str) -> String {
    format!("kiln | {}", escape(text))
}

fn prefixed((stream, step): &Source, line: &str) -> String {
    // The CR of a CRLF is no attack.
    let line = escape(line.strip_suffix('\r').unwrap_or(line));
    match (step, stream.as_str()) {
        (Some(step), _) => format!("#{step} | {line}"),
        (None, "kiln") => format!("kiln | {line}"),
        (None, _) => format!("engine | {line}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn log(content: &str, stream: &str, step: Option<u64>, partial: bool) -> EventView {
        let (content, stream) = (content.to_owned(), stream.to_owned());
        EventView::Log { content, content_b64: None, stream, step, partial }
    }

    fn step(state: &str, exit_code: Option<i64>) -> EventView {
        EventView::Step {
            index: 2,
            total: None,
            name: "make\x07 -j2".into(),
            state: state.into(),
            exit_code,
            duration_ms: (state != "started").then_some(1234),
        }
    }

    fn all(events: &[EventView]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut out: Vec<_> = events.iter().flat_map(|event| lines.event(event)).collect();
        out.extend(lines.finish());
        out
    }

    #[test]
    fn lines_say_who_prints() {
        let lines = all(&[
            log("a", "stdout", Some(2), false),
            log("b", "stderr", None, false),
            log("c", "kiln", None, false),
            step("started", None),
            step("done", Some(0)),
            step("failed", Some(7)),
            step("cached", None),
            EventView::Status { status: "queued".into(), queue_position: Some(3) },
            EventView::Egress { host: "h".into(), allowed: false, step: Some(2) },
            EventView::Egress { host: "h".into(), allowed: false, step: None },
            EventView::Egress { host: "h".into(), allowed: true, step: Some(2) },
        ]);
        let expected = [
            "#2 | a",
            "engine | b",
            "kiln | c",
            "#2 make\\x07 -j2",
            "#2 done in 1.2s",
            "#2 failed with exit code 7 after 1.2s",
            "#2 cached",
            "kiln | queued, number 3 in the queue",
            "kiln | step 2 was refused h",
            "kiln | a step was refused h",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn what_is_gone_is_counted_and_leaves_no_line_open() {
        let lines = all(&[
            log("open", "stdout", Some(1), true),
            EventView::Trimmed { from: 2, to: 1235 },
            EventView::Trimmed { from: 7, to: 7 },
        ]);
        let expected = [
            "#1 | open",
            "kiln | 1,234 events were removed by the server's retention",
            "kiln | 1 event was removed by the server's retention",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn parts_are_joined_by_their_source() {
        let lines = all(&[
            log("one ", "stdout", Some(1), true),
            log("other", "stderr", Some(1), false),
            log("line", "stdout", Some(1), false),
            log("left", "stdout", Some(1), true),
        ]);
        assert_eq!(lines, ["#1 | other", "#1 | one line", "#1 | left"]);
    }

    #[test]
    fn a_sequence_in_two_parts_is_escaped_as_one_in_one() {
        let lines = all(&[log("\x1b", "stdout", None, true), log("[2J\r", "stdout", None, false)]);
        assert_eq!(lines, ["engine | \\x1b[2J"]);
    }

    #[test]
    fn what_a_step_left_open_comes_before_its_end() {
        let lines = all(&[log("x", "stdout", Some(2), true), step("failed", Some(1))]);
        assert_eq!(lines, ["#2 | x", "#2 failed with exit code 1 after 1.2s"]);
    }

    #[test]
    fn a_heredoc_is_named_by_its_first_line() {
        let EventView::Step { index, total, state, exit_code, duration_ms, .. } =
            step("started", None)
        else {
            panic!("a step is a step");
        };
        let name = "\n set -e\nmake\n".into();
        let event = EventView::Step { index, total, name, state, exit_code, duration_ms };
        assert_eq!(step_name(&event).unwrap(), "#2 set -e …");
    }

    #[test]
    fn memory_is_bounded_by_line_and_by_source() {
        let part = "x".repeat(MAX_LINE / 4);
        let mut lines = Lines::default();
        let mut push = |step| lines.event(&log(&part, "stdout", Some(step), true));
        assert!(push(0).is_empty() && push(0).is_empty() && push(0).is_empty());
        assert_eq!(push(0).len(), 1, "a line at the bound is broken");

        let mut lines = Lines::default();
        let mut push = |step| lines.event(&log("x", "stdout", Some(step), true)).len();
        assert!((0..MAX_OPEN as u64).all(|step| push(step) == 0));
        assert_eq!(push(MAX_OPEN as u64), MAX_OPEN);
    }
}
