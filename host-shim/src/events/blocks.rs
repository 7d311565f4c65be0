//! Events as they are sent: blocks of an SSE stream (WHATWG HTML, 9.2.6), made once however many follow. Pure.

use std::fmt::Write;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use super::payload;
use crate::build::{Millis, Status};
use crate::clock::rfc3339;
use crate::store::StoredEvent;

/// Some events of a build in order, at least one. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    page: Arc<Page>,
    /// So many of the page's events are not among these.
    skipped: usize,
}

#[derive(Debug, PartialEq, Eq)]
struct Page {
    text: Bytes,
    /// Of each event: its number, and where its block ends.
    marks: Vec<(u64, usize)>,
    is_final: bool,
}

impl Blocks {
    /// The blocks of these events; `None` without any.
    pub(super) fn new(events: Vec<StoredEvent>) -> Option<Self> {
        let mut text = String::new();
        let mut marks = Vec::with_capacity(events.len());
        let mut is_final = false;
        for event in events {
            is_final = payload::status_of(&event.payload).is_some_and(Status::is_final);
            block(&mut text, Some(event.seq), event.at, event.payload);
            marks.push((event.seq, text.len()));
        }
        let page = Arc::new(Page { text: text.into(), marks, is_final });
        (!page.marks.is_empty()).then_some(Self { page, skipped: 0 })
    }

    /// The text, as it goes on the wire.
    pub fn text(&self) -> Bytes {
        let begin = self.skipped.checked_sub(1).map_or(0, |last| self.page.marks[last].1);
        self.page.text.slice(begin..)
    }

    /// The numbers of the events.
    pub fn seqs(&self) -> impl Iterator<Item = u64> {
        self.page.marks[self.skipped..].iter().map(|(seq, _)| *seq)
    }

    /// The number of the last of them.
    pub fn last(&self) -> u64 {
        self.page.marks.last().map_or(0, |(seq, _)| *seq)
    }

    /// Whether the last of them is the build's final status.
    pub(super) fn is_final(&self) -> bool {
        self.page.is_final
    }

    /// Those after a number; `None` where there are none.
    pub(super) fn after(&self, seq: u64) -> Option<Self> {
        let skipped = self.page.marks.partition_point(|(number, _)| *number <= seq);
        let page = Arc::clone(&self.page);
        (skipped < self.page.marks.len()).then(|| Self { page, skipped: skipped.max(self.skipped) })
    }
}

/// A block that tells that the stream is alive.
pub fn heartbeat(at: Millis) -> Bytes {
    let mut text = String::new();
    block(&mut text, None, at, json!({ "type": "heartbeat" }));
    text.into()
}

/// One block. JSON escapes every line break, so that data is always one line.
fn block(out: &mut String, id: Option<u64>, at: Millis, mut data: Value) {
    data["timestamp"] = rfc3339(at).into();
    // A string takes all that it is given.
    if let Some(id) = id {
        let _ = writeln!(out, "id: {id}");
    }
    if let Some(kind) = data["type"].as_str() {
        let _ = writeln!(out, "event: {kind}");
    }
    let _ = write!(out, "data: {data}\n\n");
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
impl Blocks {
    /// Numbers and payloads, as a client reads them.
    pub(crate) fn parsed(&self) -> Vec<(u64, Value)> {
        let text = String::from_utf8(self.text().to_vec()).unwrap();
        let block = |block: &str| {
            let (mut id, mut data) = (None, None);
            for line in block.lines() {
                match line.split_once(": ").unwrap() {
                    ("id", text) => id = Some(text.parse().unwrap()),
                    ("data", text) => data = Some(serde_json::from_str::<Value>(text).unwrap()),
                    (name, _) => assert_eq!(name, "event"),
                }
            }
            let mut data = data.unwrap();
            data.as_object_mut().unwrap().remove("timestamp").unwrap();
            (id.unwrap(), data)
        };
        text.split_terminator("\n\n").map(block).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn line(seq: u64) -> StoredEvent {
        StoredEvent { seq, at: 1_500, payload: payload::kiln_log(&format!("a\n{seq}")) }
    }

    #[test]
    fn what_comes_after_a_number_is_the_rest_of_the_text() {
        let all = Blocks::new((3..=6).map(line).collect()).unwrap();
        assert_eq!(all.after(0), Some(all.clone()));
        for seq in 2..6 {
            let rest = all.after(seq).unwrap();
            let alone = Blocks::new((seq + 1..=6).map(line).collect()).unwrap();
            assert_eq!(rest.text(), alone.text());
            assert_eq!(rest.seqs().collect::<Vec<_>>(), (seq + 1..=6).collect::<Vec<_>>());
            assert_eq!(
                (rest.last(), rest.after(2), rest.after(5)),
                (6, Some(rest.clone()), all.after(5))
            );
        }
        assert_eq!((all.after(6), all.after(u64::MAX)), (None, None));
        assert_eq!(Blocks::new(vec![]), None);
        assert_eq!(all.parsed()[1], (4, line(4).payload));
    }

    #[test]
    fn the_end_is_a_final_status_that_is_the_last() {
        let status =
            |seq, status| StoredEvent { payload: payload::status(status, None), ..line(seq) };
        let is_final = |events| Blocks::new(events).unwrap().is_final();
        assert!(is_final(vec![line(1), status(2, Status::Ready)]));
        assert!(!is_final(vec![status(1, Status::Building)]));
        assert!(!is_final(vec![line(1)]));
    }
}
