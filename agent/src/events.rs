//! Events on their way to the host: in order, bounded, and never dropped.
//!
//! ```text
//! engine, wrapper ─▶ Reporter ─▶ (channel) ─▶ session ─▶ Outbox ─▶ connection
//!                                                          ▲ acknowledgements prune it
//! ```
//! Both the channel and the outbox are bounded. When the outbox is full, the session stops taking
//! reports, the channel fills up, reporters wait, and in the end a program's pipe is full.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::event::{Event, Failure, MAX_LOG_BYTES, NumberedEvent, cut_text};
use kiln_protocol::frame::{self, FrameError};
use kiln_protocol::message::AgentToHost;
use kiln_protocol::secret::{SecretAnswer, SecretId};
use tokio::sync::{mpsc, oneshot};

/// Reports that wait between the parts of the agent and the session. Enough to fill one write to
/// the host with lines; with the longest lines it is 1 MiB.
pub const WAITING_REPORTS: usize = 64;

/// Most events that the host has not acknowledged. A host that stores a batch in 4 ms, as measured
/// for SQLite, lets a million lines a second through.
pub const MAX_UNACKNOWLEDGED: usize = 4096;

/// Most bytes of the events that the host has not acknowledged, as frames. It holds several of the
/// host's batches, and little of the agent's 15 MB.
pub const MAX_UNACKNOWLEDGED_BYTES: usize = 1024 * 1024;

/// What the parts of the agent report while they work.
#[derive(Debug)]
pub enum Report {
    /// Something happened.
    Event(Event),
    /// The engine's process is running.
    EngineStarted {
        /// How long the kernel took to start it.
        spawn: Duration,
    },
    /// A step failed, and stays to be entered: the build has ended, but not what runs it.
    Held(Box<Failure>),
    /// A secret is needed. One at a time.
    Ask {
        /// Which one.
        id: SecretId,
        /// Where the host's answer goes.
        answer: oneshot::Sender<SecretAnswer>,
    },
}

/// Takes reports from any part of the agent. A full buffer makes the reporter wait, so that a
/// program's pipe fills up rather than the agent's memory.
#[derive(Clone, Debug)]
pub struct Reporter {
    reports: mpsc::Sender<Report>,
}

impl Reporter {
    /// Reports, in order. Waits while the buffer is full; ends at once when the session is over.
    pub async fn report(&self, report: Report) {
        // The session ended: nobody is left to tell.
        let _ = self.reports.send(report).await;
    }

    /// Asks the host for a secret; `None` when the session is over. The asker has a deadline of its own.
    pub async fn ask(&self, id: SecretId) -> Option<SecretAnswer> {
        let (answer, answered) = oneshot::channel();
        self.report(Report::Ask { id, answer }).await;
        answered.await.ok()
    }
}

/// A reporter and the end where its reports arrive.
pub fn channel() -> (Reporter, mpsc::Receiver<Report>) {
    let (reports, arriving) = mpsc::channel(WAITING_REPORTS);
    (Reporter { reports }, arriving)
}

/// The events that the host has not acknowledged, numbered and ready to be sent (again).
#[derive(Debug)]
pub struct Outbox {
    /// Frames of the events `acknowledged + 1 …`, without a gap.
    frames: VecDeque<Frame>,
    /// What they take of the memory.
    bytes: usize,
    acknowledged: u64,
    /// How many of `frames` this connection has been given.
    sent: usize,
}

/// A frame that is ready to be sent. Long content is as its reporter had it: copying it would cost a good part of what
/// sending it costs.
#[derive(Debug)]
pub struct Frame {
    /// Its bytes up to the long content; all of them, if there is none.
    pub before: Vec<u8>,
    /// The long content.
    pub content: Option<Arc<Vec<u8>>>,
    /// Its bytes behind that.
    pub behind: Vec<u8>,
}

/// Content that is not copied. Of less, pieces of its own cost as much as the copy.
const LONG: usize = 4 * 1024;

impl Frame {
    fn of(event: NumberedEvent) -> Result<Self, FrameError> {
        let message = AgentToHost::Event(event);
        let around = frame::encode_around(&message, least(&message))?;
        let content = match message {
            AgentToHost::Event(NumberedEvent { event: Event::Log(log), .. }) => log.content,
            _ => Vec::new(),
        };
        let content = (around.left_out > 0).then(|| Arc::new(content));
        Ok(Self { before: around.before, content, behind: around.behind })
    }

    fn memory(&self) -> usize {
        let content = self.content.as_ref().map_or(0, |content| content.capacity());
        self.before.capacity() + content + self.behind.capacity()
    }
}

/// From what length on a slice is the content of a log.
fn least(message: &AgentToHost) -> usize {
    let log = matches!(message, AgentToHost::Event(NumberedEvent { event: Event::Log(_), .. }));
    if log { LONG } else { usize::MAX }
}

/// The host acknowledged an event that never was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host acknowledged event {acknowledged}, but the last one is {last}")]
pub struct BadAcknowledgement {
    /// What the host said.
    pub acknowledged: u64,
    /// The last number that was given.
    pub last: u64,
}

impl Outbox {
    /// Nothing has happened yet.
    pub fn new() -> Self {
        Self { frames: VecDeque::new(), bytes: 0, acknowledged: 0, sent: 0 }
    }

    /// Whether another report may be taken.
    pub fn has_room(&self) -> bool {
        self.frames.len() < MAX_UNACKNOWLEDGED && self.bytes < MAX_UNACKNOWLEDGED_BYTES
    }

    /// Numbers an event and keeps it. It is kept even without room: who has a choice asks
    /// [`Outbox::has_room`] first; the last reports of an engine that has ended have none.
    pub fn push(&mut self, at_ms: u64, event: Event) -> Result<(), FrameError> {
        let event = NumberedEvent { seq: self.last() + 1, at_ms, event: fit(event) };
        let frame = Frame::of(event)?;
        self.bytes += frame.memory();
        self.frames.push_back(frame);
        Ok(())
    }

    /// The frame of the next event for this connection.
    pub fn next_frame(&mut self) -> Option<&Frame> {
        let frame = self.frames.get(self.sent)?;
        self.sent += 1;
        Some(frame)
    }

    /// The host has stored everything up to `seq`. An older number than a known one is old news.
    pub fn acknowledge(&mut self, seq: u64) -> Result<(), BadAcknowledgement> {
        if seq > self.last() {
            return Err(BadAcknowledgement { acknowledged: seq, last: self.last() });
        }
        while self.acknowledged < seq {
            self.acknowledged += 1;
            self.sent = self.sent.saturating_sub(1);
            self.bytes -= self.frames.pop_front().map_or(0, |frame| frame.memory());
        }
        Ok(())
    }

    /// A new connection: what is not acknowledged is sent again.
    pub fn rewind(&mut self) {
        self.sent = 0;
    }

    /// The highest number that the host acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    fn last(&self) -> u64 {
        self.acknowledged + self.frames.len() as u64
    }
}

/// Keeps an event within the protocol's bounds. Reporters cut by themselves and better; this is so
/// that a mistake of theirs costs some text and not the session.
fn fit(mut event: Event) -> Event {
    match &mut event {
        Event::Log(log) => log.content.truncate(MAX_LOG_BYTES),
        Event::Step(step) => step.name = cut_text(&step.name),
        // Names are read within theirs.
        Event::Phase(_) | Event::Name(_) => {}
    }
    event
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::event::{Log, LogStream, MAX_REPORT_TEXT, Phase, Step, StepState};

    use super::*;

    fn line(content: &[u8]) -> Event {
        let content = content.to_vec();
        Event::Log(Log { stream: LogStream::Stdout, step: None, partial: false, content })
    }

    fn bytes(frame: &Frame) -> Vec<u8> {
        let content = frame.content.as_ref().map_or(&[][..], |content| content.as_slice());
        [&frame.before, content, &frame.behind].concat()
    }

    fn seqs(outbox: &mut Outbox) -> Vec<u64> {
        std::iter::from_fn(|| outbox.next_frame().map(bytes))
            .map(|frame| match frame::decode(&frame[4..]).unwrap() {
                AgentToHost::Event(event) => event.seq,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    fn outbox_of(events: usize) -> Outbox {
        let mut outbox = Outbox::new();
        for _ in 0..events {
            outbox.push(0, Event::Phase(Phase::Building)).unwrap();
        }
        outbox
    }

    #[test]
    fn events_are_numbered_from_one_and_given_once_per_connection() {
        let mut outbox = outbox_of(3);
        assert_eq!(seqs(&mut outbox), [1, 2, 3]);
        assert_eq!(seqs(&mut outbox), [0u64; 0]);
        outbox.rewind();
        assert_eq!(seqs(&mut outbox), [1, 2, 3]);
    }

    #[test]
    fn acknowledged_events_never_come_back() {
        let mut outbox = outbox_of(5);
        assert_eq!(seqs(&mut outbox).len(), 5);
        outbox.acknowledge(3).unwrap();
        outbox.acknowledge(1).unwrap();
        assert_eq!(outbox.acknowledged(), 3);
        outbox.rewind();
        assert_eq!(seqs(&mut outbox), [4, 5]);
        outbox.acknowledge(5).unwrap();
        outbox.push(0, Event::Phase(Phase::Pushing)).unwrap();
        assert_eq!(seqs(&mut outbox), [6]);
    }

    #[test]
    fn events_of_an_earlier_connection_can_be_acknowledged_before_they_are_sent_again() {
        let mut outbox = outbox_of(4);
        assert_eq!(seqs(&mut outbox).len(), 4);
        outbox.rewind();
        outbox.acknowledge(2).unwrap();
        assert_eq!(seqs(&mut outbox), [3, 4]);
    }

    #[test]
    fn an_acknowledgement_of_the_future_is_refused() {
        let mut outbox = outbox_of(2);
        assert_eq!(outbox.acknowledge(3), Err(BadAcknowledgement { acknowledged: 3, last: 2 }));
        assert_eq!(outbox.acknowledged(), 0);
    }

    #[test]
    fn the_room_ends_at_its_count() {
        let mut outbox = outbox_of(MAX_UNACKNOWLEDGED - 1);
        assert!(outbox.has_room());
        outbox.push(0, Event::Phase(Phase::Building)).unwrap();
        assert!(!outbox.has_room());
        outbox.acknowledge(1).unwrap();
        assert!(outbox.has_room());
    }

    #[test]
    fn the_room_ends_at_its_bytes() {
        let mut outbox = Outbox::new();
        let mut pushed = 0;
        while outbox.has_room() {
            outbox.push(0, line(&[b'x'; MAX_LOG_BYTES])).unwrap();
            pushed += 1;
        }
        assert_eq!(pushed, MAX_UNACKNOWLEDGED_BYTES / MAX_LOG_BYTES);
        outbox.acknowledge(pushed as u64).unwrap();
        assert_eq!(outbox.bytes, 0);
    }

    #[test]
    fn what_is_not_copied_is_encoded_all_the_same() {
        let step = Step { index: 1, name: "n".repeat(LONG), state: StepState::Started };
        for (event, shared) in [
            (line(&[b'x'; LONG - 1]), false),
            (line(&[b'x'; LONG]), true),
            (line(&[b'x'; MAX_LOG_BYTES]), true),
            (Event::Step(step), false),
        ] {
            let numbered = NumberedEvent { seq: 1, at_ms: 0, event: event.clone() };
            let whole = frame::encode(&AgentToHost::Event(numbered)).unwrap();
            let mut outbox = Outbox::new();
            outbox.push(0, event).unwrap();
            let frame = outbox.next_frame().unwrap();
            assert_eq!(frame.content.is_some(), shared);
            assert_eq!(bytes(frame), whole);
        }
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let long =
            Step { index: 1, name: "n".repeat(MAX_REPORT_TEXT + 1), state: StepState::Started };
        assert!(fit(Event::Step(long)).check().is_ok());
        assert!(fit(line(&vec![0; MAX_LOG_BYTES + 1])).check().is_ok());
    }

    #[tokio::test]
    async fn a_reporter_waits_for_room_and_not_for_a_session_that_is_over() {
        let (reporter, mut reports) = channel();
        for _ in 0..WAITING_REPORTS {
            reporter.report(Report::EngineStarted { spawn: Duration::ZERO }).await;
        }
        let mut waiting =
            std::pin::pin!(reporter.report(Report::EngineStarted { spawn: Duration::ZERO }));
        tokio::select! {
            biased;
            () = &mut waiting => panic!("there is no room"),
            () = std::future::ready(()) => {}
        }
        reports.recv().await.unwrap();
        waiting.await;
        drop(reports);
        reporter.report(Report::EngineStarted { spawn: Duration::ZERO }).await;
    }
}
