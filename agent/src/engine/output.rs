//! What the engine itself prints: log events without a step, and its last lines for a cause.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_protocol::event::LogStream;
use tokio::io::AsyncRead;

use super::parse;
use crate::events::Reporter;
use crate::runtime::{Begun, Part, report_lines};

/// How many lines are kept: what fits a screen and tells the cause.
const LAST_LINES: usize = 20;

/// buildah prints its inner value of an instruction that it does not know, the environment with
/// the build arguments included. What follows this is left out.
const DUMP: &[u8] = b"&imagebuilder.Step{";

/// Between these, buildah prints the inner value of what it asked a process of its own for: long, full of addresses in memory. What
/// went wrong stands behind it.
const REQUEST: [&[u8]; 2] = [b" for copier.request{", b"}: "];

/// How buildah begins to say why it ends.
const ERROR: &str = "Error: ";

/// The engine's last lines, of stdout and stderr together.
#[derive(Clone, Debug, Default)]
pub struct LastLines {
    kept: Arc<Mutex<Kept>>,
}

#[derive(Debug, Default)]
struct Kept {
    /// An error that more lines follow than are kept: where a process of the engine breaks down, it quotes
    /// that one's stack.
    error: Option<(LogStream, String)>,
    lines: VecDeque<(LogStream, String)>,
    /// The first instruction that the engine did only in part.
    passed_over: Option<String>,
}

impl Kept {
    fn all(&self) -> impl Iterator<Item = &(LogStream, String)> {
        self.error.iter().chain(&self.lines)
    }
}

impl LastLines {
    /// The last lines of stderr, oldest first.
    pub fn stderr(&self) -> Vec<String> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let stderr = kept.all().filter(|(stream, _)| *stream == LogStream::Stderr);
        stderr.map(|(_, line)| line.clone()).collect()
    }

    /// All the last lines as text, oldest first.
    pub fn text(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.all().map(|(_, line)| line.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// The first instruction that the engine did only in part, without a word of it.
    pub fn passed_over(&self) -> Option<String> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).passed_over.clone()
    }

    fn push(&self, stream: LogStream, line: String) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.passed_over.is_none() {
            kept.passed_over = parse::passed_over(&line).map(str::to_owned);
        }
        if kept.lines.len() == LAST_LINES {
            let oldest = kept.lines.pop_front();
            let error = oldest.filter(|(_, line)| line.starts_with(ERROR));
            kept.error = error.or_else(|| kept.error.take());
        }
        kept.lines.push_back((stream, line));
    }
}

/// Reports an output of the engine until its end.
pub async fn report(
    from: impl AsyncRead + Unpin,
    stream: LogStream,
    reporter: Reporter,
    last: LastLines,
) {
    let (mut dump, mut line) = (DumpCutter::default(), Begun::default());
    report_lines(from, stream, None, &reporter, |part| {
        dump.cut(part);
        cut_request(&mut part.content);
        if let Some(line) = line.take(part) {
            last.push(stream, line);
        }
    })
    .await;
}

/// Cuts a [`REQUEST`] that is whole: no line with one is longer than a part.
fn cut_request(content: &mut Vec<u8>) {
    let [head, tail] = REQUEST;
    let begin = content.windows(head.len()).position(|window| window == head);
    let end = content.windows(tail.len()).rposition(|window| window == tail);
    if let (Some(begin), Some(end)) = (begin, end)
        && begin < end
    {
        content.drain(begin..=end);
    }
}

/// Cuts a line from [`DUMP`] on, however many parts it has.
#[derive(Debug, Default)]
struct DumpCutter {
    in_dump: bool,
}

impl DumpCutter {
    fn cut(&mut self, part: &mut Part) {
        if self.in_dump {
            part.content.clear();
        } else if let Some(start) = dump_start(&part.content, part.partial) {
            self.in_dump = true;
            part.content.truncate(start);
        }
        self.in_dump &= part.partial;
    }
}

/// Where the dump begins; in a part that goes on, also where it may have begun.
fn dump_start(content: &[u8], goes_on: bool) -> Option<usize> {
    let whole = content.windows(DUMP.len()).position(|window| window == DUMP);
    whole.or_else(|| {
        let longest = (DUMP.len() - 1).min(content.len());
        let begun = (1..=longest).rev().find(|&n| content.ends_with(&DUMP[..n]));
        begun.filter(|_| goes_on).map(|n| content.len() - n)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::events::{Report, channel};
    use kiln_protocol::event::{Event, Log, MAX_LOG_BYTES};

    async fn events(text: Vec<u8>) -> (Vec<Log>, LastLines) {
        let last = LastLines::default();
        let (reporter, mut reports) = channel();
        let mut logs = vec![];
        let reporting = report(&text[..], LogStream::Stderr, reporter, last.clone());
        let taking = async {
            while let Some(Report::Event(Event::Log(log))) = reports.recv().await {
                logs.push(log);
            }
        };
        tokio::join!(reporting, taking);
        (logs, last)
    }

    #[tokio::test]
    async fn the_environment_in_a_dump_is_left_out_however_long_it_is() {
        let head = "Error: Unknown instruction: \"FOO\" ";
        for secret_at in [0, 10, MAX_LOG_BYTES - DUMP.len() - head.len() - 30, 3 * MAX_LOG_BYTES] {
            for shift in 0..=DUMP.len() {
                let pad = "x".repeat(shift);
                let filler = "y".repeat(secret_at);
                let line =
                    format!("{head}{pad}&imagebuilder.Step{{Env:\"{filler}hunter2\"}}\nnext\n");
                let (logs, last) = events(line.into_bytes()).await;
                let all: Vec<u8> = logs.iter().flat_map(|log| log.content.clone()).collect();
                let all = String::from_utf8(all).unwrap();
                assert_eq!(all, format!("{head}{pad}next"));
                assert_eq!(last.text(), format!("{head}{pad}\nnext"));
            }
        }
    }

    #[tokio::test]
    async fn a_dump_that_begins_at_a_parts_end_is_left_out() {
        for overlap in 0..=DUMP.len() {
            let head = "h".repeat(MAX_LOG_BYTES - overlap);
            let line = format!("{head}&imagebuilder.Step{{hunter2}}");
            let (logs, _) = events(line.into_bytes()).await;
            let all: Vec<u8> = logs.iter().flat_map(|log| log.content.clone()).collect();
            assert!(all == head.as_bytes(), "overlap {overlap}");
        }
    }

    #[tokio::test]
    async fn what_the_engine_asked_itself_for_is_left_out() {
        let request = "copier.request{Get:copier.GetOptions{Dirs:(*idtools.IDPair)(0xc0003fbd40)}, Paths:[]string(nil)}";
        let line =
            format!("Error: reading \"/x\": error for {request}: copier: stat: no such file\n");
        let (logs, last) = events(line.into_bytes()).await;
        let said = "Error: reading \"/x\": error: copier: stat: no such file";
        assert_eq!((logs[0].content.as_slice(), last.text().as_str()), (said.as_bytes(), said));
        let (_, last) = events(b"a }: b for copier.request{ c\n".to_vec()).await;
        assert_eq!(last.text(), "a }: b for copier.request{ c");
    }

    #[tokio::test]
    async fn the_last_lines_are_kept_and_bounded() {
        let text: String = (0..25).map(|n| format!("{n}\n")).collect();
        let (logs, last) = events(text.into_bytes()).await;
        assert_eq!(logs.len(), 25);
        let kept: Vec<String> = (5..25).map(|n| n.to_string()).collect();
        assert_eq!(last.stderr(), kept);
        // What an error quotes does not drown it.
        let text = format!("first\nError: a\nError: b\n{}", "frame\n".repeat(30));
        let (_, last) = events(text.into_bytes()).await;
        assert_eq!(last.stderr().len(), LAST_LINES + 1);
        assert!(last.text().starts_with("Error: b\nframe\n"), "{}", last.text());
        let (_, last) = events("z".repeat(3 * MAX_LOG_BYTES).into_bytes()).await;
        assert_eq!(last.text().len(), 1024 + '…'.len_utf8());
    }
}
