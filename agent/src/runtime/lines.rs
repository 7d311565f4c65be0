//! From a pipe's bytes to log events: split at newlines, bounded, nothing lost.

use std::time::Duration;

use kiln_protocol::event::{Event, Log, LogStream, MAX_LOG_BYTES};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::events::{Report, Reporter};

/// After so long without a byte, the begun line is shown: a prompt or a progress bar has no
/// newline, and people watch it. Long enough that an ordinary line is not torn into parts.
const SILENCE: Duration = Duration::from_millis(200);

/// How much is read at once.
const CHUNK: usize = 16 * 1024;

/// Reads a stream to its end and reports it as [`Log`] events. `watch` sees every part first and
/// may change it. An error counts as the end: a pipe that can be read has none.
pub async fn report_lines(
    from: impl AsyncRead + Unpin,
    stream: LogStream,
    step: Option<u32>,
    reporter: &Reporter,
    watch: impl FnMut(&mut Part),
) {
    report(from, stream, step, reporter, watch, Splitter::end).await;
}

/// The same for a stream whose every byte counts: a last line without a newline is a part that is never
/// completed.
pub async fn report_bytes(from: impl AsyncRead + Unpin, stream: LogStream, reporter: &Reporter) {
    report(from, stream, None, reporter, |_| {}, Splitter::flush).await;
}

async fn report(
    mut from: impl AsyncRead + Unpin,
    stream: LogStream,
    step: Option<u32>,
    reporter: &Reporter,
    mut watch: impl FnMut(&mut Part),
    last: fn(&mut Splitter) -> Option<Part>,
) {
    let mut splitter = Splitter::default();
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = from.read(&mut chunk);
        let read = if splitter.has_begun() {
            tokio::time::timeout(SILENCE, read).await
        } else {
            Ok(read.await)
        };
        let mut parts = Vec::new();
        let ended = match read {
            Ok(Ok(0) | Err(_)) => {
                parts.extend(last(&mut splitter));
                true
            }
            Ok(Ok(count)) => {
                splitter.push(&chunk[..count], |part| parts.push(part));
                false
            }
            Err(_silence) => {
                parts.extend(splitter.flush());
                false
            }
        };
        for mut part in parts {
            watch(&mut part);
            let Part { content, partial } = part;
            let log = Log { stream, step, partial, content };
            reporter.report(Report::Event(Event::Log(log))).await;
        }
        if ended {
            return;
        }
    }
}

/// A line, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The bytes, without the newline; at most [`MAX_LOG_BYTES`].
    pub content: Vec<u8>,
    /// Whether the line goes on in the next part.
    pub partial: bool,
}

/// Splits at newlines. Holds at most one part.
#[derive(Debug, Default)]
pub struct Splitter {
    held: Vec<u8>,
    /// A part of this line was given out already, so the line must still be closed.
    open: bool,
}

impl Splitter {
    /// Takes bytes and gives out the parts that they complete.
    pub fn push(&mut self, mut bytes: &[u8], mut give: impl FnMut(Part)) {
        while !bytes.is_empty() {
            let room = MAX_LOG_BYTES - self.held.len();
            // One more than fits, to see whether the line ends right there.
            let window = &bytes[..bytes.len().min(room + 1)];
            if let Some(end) = window.iter().position(|&b| b == b'\n') {
                self.held.extend_from_slice(&bytes[..end]);
                self.open = false;
                give(Part { content: std::mem::take(&mut self.held), partial: false });
                bytes = &bytes[end + 1..];
            } else {
                let taken = window.len().min(room);
                self.held.extend_from_slice(&bytes[..taken]);
                bytes = &bytes[taken..];
                if !bytes.is_empty() {
                    give(self.take_partial());
                }
            }
        }
    }

    /// Whether bytes wait for the rest of their line.
    pub fn has_begun(&self) -> bool {
        !self.held.is_empty()
    }

    /// Gives out what has begun.
    pub fn flush(&mut self) -> Option<Part> {
        self.has_begun().then(|| self.take_partial())
    }

    /// The stream ended: what is left is the last line, with or without its newline.
    pub fn end(&mut self) -> Option<Part> {
        let open = std::mem::take(&mut self.open);
        (open || self.has_begun())
            .then(|| Part { content: std::mem::take(&mut self.held), partial: false })
    }

    fn take_partial(&mut self) -> Part {
        self.open = true;
        Part { content: std::mem::take(&mut self.held), partial: true }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(chunks: &[&[u8]]) -> Vec<Part> {
        let (mut splitter, mut parts) = (Splitter::default(), vec![]);
        for chunk in chunks {
            splitter.push(chunk, |part| parts.push(part));
        }
        parts.extend(splitter.end());
        parts
    }

    fn whole(text: &[u8]) -> Part {
        Part { content: text.to_vec(), partial: false }
    }

    #[test]
    fn lines_come_one_by_one_however_they_arrive() {
        let expected = vec![whole(b"one"), whole(b""), whole(b"two\r"), whole(b"\xff\x00 three")];
        assert_eq!(split(&[b"one\n\ntwo\r\n\xff\x00 three"]), expected);
        assert_eq!(split(&[b"on", b"e", b"\n\ntw", b"o\r\n", b"\xff\x00 three\n"]), expected);
        assert_eq!(split(&[b""]), vec![]);
    }

    #[test]
    fn a_long_line_comes_in_parts_at_the_bound() {
        let at = vec![b'x'; MAX_LOG_BYTES];
        assert_eq!(split(&[&at, b"\n"]), vec![whole(&at)]);
        assert_eq!(split(&[&at]), vec![whole(&at)]);
        let above = vec![b'x'; MAX_LOG_BYTES + 1];
        let parts = vec![Part { content: at, partial: true }, whole(b"x")];
        assert_eq!(split(&[&above, b"\n"]), parts);
        assert_eq!(split(&[&above]), parts);
    }

    #[test]
    fn a_flushed_line_is_closed_by_its_newline_or_the_end() {
        for tail in [&b"\n"[..], b""] {
            let mut splitter = Splitter::default();
            let mut parts = vec![];
            splitter.push(b"name: ", |part| parts.push(part));
            parts.extend(splitter.flush());
            assert_eq!(splitter.flush(), None);
            splitter.push(tail, |part| parts.push(part));
            parts.extend(splitter.end());
            assert_eq!(parts, [Part { content: b"name: ".to_vec(), partial: true }, whole(b"")]);
        }
    }

    #[tokio::test]
    async fn bytes_are_reported_with_the_newline_that_they_end_with_and_no_other() {
        let long = "y".repeat(MAX_LOG_BYTES + 1);
        for sent in ["", "\n", "one\n\ntwo\n", "one\ntwo", &long, &format!("{long}\n")] {
            let (reporter, mut reports) = crate::events::channel();
            report_bytes(sent.as_bytes(), LogStream::Stderr, &reporter).await;
            drop(reporter);
            let mut got = vec![];
            while let Some(Report::Event(Event::Log(log))) = reports.recv().await {
                assert_eq!((log.stream, log.step), (LogStream::Stderr, None));
                got.extend(log.content);
                if !log.partial {
                    got.push(b'\n');
                }
            }
            assert!(got == sent.as_bytes(), "{:?}", sent.get(..20));
        }
    }

    proptest! {
        #[test]
        fn parts_put_together_are_the_lines(
            chunks in proptest::collection::vec((
                proptest::collection::vec((0..2 * MAX_LOG_BYTES, any::<bool>()), 0..4),
                any::<bool>(),
            ), 0..5)
        ) {
            let chunks: Vec<(Vec<u8>, bool)> = chunks
                .into_iter()
                .map(|(runs, flush)| {
                    let bytes = runs.into_iter().flat_map(|(length, newline)| {
                        let end = if newline { &b"\n"[..] } else { b"" };
                        [vec![b'x'; length], end.to_vec()].concat()
                    });
                    (bytes.collect(), flush)
                })
                .collect();
            let (mut splitter, mut parts) = (Splitter::default(), vec![]);
            for (chunk, flush) in &chunks {
                splitter.push(chunk, |part| parts.push(part));
                if *flush {
                    parts.extend(splitter.flush());
                }
            }
            parts.extend(splitter.end());
            let mut joined = vec![];
            for part in &parts {
                prop_assert!(part.content.len() <= MAX_LOG_BYTES);
                joined.extend_from_slice(&part.content);
                if !part.partial {
                    joined.push(b'\n');
                }
            }
            let mut sent: Vec<u8> = chunks.iter().flat_map(|(chunk, _)| chunk.clone()).collect();
            if sent.last().is_some_and(|&b| b != b'\n') {
                sent.push(b'\n');
            }
            prop_assert!(joined == sent);
        }
    }
}
