//! One control connection: a reader that the session polls, and a writer task.
//!
//! The two are apart so that neither waits for the other: a guest that is slow to take the source
//! can still report, and one that reports a flood still takes its source.

use futures_util::FutureExt;
use kiln_protocol::event::{NumberedEvent, Outcome};
use kiln_protocol::frame::{self, FrameError, FrameReader};
use kiln_protocol::job::Job;
use kiln_protocol::message::{
    ACKNOWLEDGE_EVENTS, ACKNOWLEDGE_WAIT, AgentToHost, AgentUsage, HostToAgent, MAX_SOURCE_CHUNK,
    SOURCE_WINDOW,
};
use kiln_protocol::secret::{SecretAnswer, SecretId};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::{End, Stream};

/// Most frames that are taken, and stored, at once.
const MAX_BATCH: usize = 256;

/// How long the last frame of a session may take to leave. The VM is destroyed afterwards anyway.
const FINISH_DEADLINE: Duration = Duration::from_millis(200);

/// What the guest said, apart from what only this connection cares about.
#[allow(clippy::enum_variant_names, reason = "the protocol's names")]
pub(super) enum Event {
    Event(NumberedEvent),
    EngineStarted,
    Usage(AgentUsage),
    Kept,
    SecretRequest(SecretId),
    Outcome(Outcome),
}

/// Why a connection cannot go on.
pub(super) enum Broken {
    /// It may be resumed.
    Lost(String),
    /// The guest broke the protocol.
    Protocol(String),
}

impl Broken {
    /// The reason where the connection may be resumed, the session's end otherwise.
    pub(super) fn fatal(self) -> Result<String, End> {
        match self {
            Self::Lost(reason) => Ok(reason),
            Self::Protocol(reason) => Err(End::Protocol(reason)),
        }
    }
}

impl From<FrameError> for Broken {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Closed => Self::Lost("the guest closed it".into()),
            FrameError::Io(error) => Self::Lost(error.to_string()),
            error => Self::Protocol(error.to_string()),
        }
    }
}

/// What the writer is to say, as the latest state of each thing rather than as a queue.
#[derive(Clone, Default)]
struct Orders {
    acknowledge: u64,
    source_taken: u64,
    /// How many answers there were, and the last: a guest that asks again before it has one gets one.
    answers: u64,
    answer: Option<Arc<(SecretId, SecretAnswer)>>,
    cancel: bool,
    finish: bool,
}

pub(super) struct Connection<T> {
    reader: FrameReader<ReadHalf<T>>,
    orders: watch::Sender<Orders>,
    writer: JoinHandle<()>,
    /// Set by the writer once the whole source was sent.
    source_sent: watch::Receiver<Option<u64>>,
    /// Why the reader ended, while what was heard before is still being taken.
    broken: Option<Broken>,
}

impl<T: Stream> Connection<T> {
    /// A new session's connection: sends the job and then the source, if there is one.
    pub(super) fn start(stream: T, job: Job, source: Option<tokio::fs::File>) -> Self {
        Self::spawn(stream, Some((job, source)))
    }

    /// A connection that continues a session whose source was sent.
    pub(super) fn resume(stream: T) -> Self {
        Self::spawn(stream, None)
    }

    fn spawn(stream: T, work: Option<(Job, Option<tokio::fs::File>)>) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        let (orders, listen) = watch::channel(Orders::default());
        let sent = if work.is_none() { Some(0) } else { None };
        let (report_sent, source_sent) = watch::channel(sent);
        let writer = Writer { writer, orders: listen, sent: report_sent };
        let writer = tokio::spawn(async move {
            if let Err(error) = writer.run(work).await {
                tracing::debug!(%error, "the control connection's writer ended");
            }
        });
        Self { reader: FrameReader::new(reader), orders, writer, source_sent, broken: None }
    }

    /// What the guest says next: at least one message, and all that have arrived already.
    /// Cancel-safe.
    pub(super) async fn hear(&mut self) -> Result<Vec<Event>, Broken> {
        if let Some(broken) = self.broken.take() {
            return Err(broken);
        }
        let mut heard = Vec::new();
        while heard.len() < MAX_BATCH {
            let next = self.reader.read::<AgentToHost>();
            // Wait for the first message only.
            let next = if heard.is_empty() { Some(next.await) } else { next.now_or_never() };
            match next {
                None => break,
                Some(Ok(AgentToHost::Event(event))) => heard.push(Event::Event(event)),
                Some(Ok(AgentToHost::EngineStarted)) => heard.push(Event::EngineStarted),
                Some(Ok(AgentToHost::Kept)) => heard.push(Event::Kept),
                Some(Ok(AgentToHost::Usage(usage))) => heard.push(Event::Usage(usage)),
                Some(Ok(AgentToHost::SecretRequest { id })) => {
                    heard.push(Event::SecretRequest(id));
                }
                Some(Ok(AgentToHost::Outcome(outcome))) => {
                    heard.push(Event::Outcome(outcome));
                    break;
                }
                Some(Ok(AgentToHost::SourceTaken { total })) => {
                    self.orders.send_modify(|o| o.source_taken = o.source_taken.max(total));
                }
                Some(Err(error)) if heard.is_empty() => return Err(error.into()),
                Some(Err(error)) => {
                    self.broken = Some(error.into());
                    break;
                }
            }
        }
        Ok(heard)
    }

    /// Whether another connection may continue this one: not while the source is being sent.
    pub(super) fn can_resume(&self) -> bool {
        self.source_sent.borrow().is_some()
    }

    /// Tells the guest, at once or a little later, that every event up to `seq` is stored.
    pub(super) fn acknowledge(&self, seq: u64) {
        self.orders.send_modify(|o| o.acknowledge = o.acknowledge.max(seq));
    }

    /// Gives the guest what it asked for.
    pub(super) fn answer(&self, id: SecretId, answer: SecretAnswer) {
        self.orders.send_modify(|o| {
            o.answers += 1;
            o.answer = Some(Arc::new((id, answer)));
        });
    }

    /// Tells the guest to stop.
    pub(super) fn cancel(&self) {
        self.orders.send_modify(|o| o.cancel = true);
    }

    /// Tells the guest that its outcome was taken, and waits a moment for that to leave.
    pub(super) async fn finish(mut self) {
        self.orders.send_modify(|o| o.finish = true);
        let _ = tokio::time::timeout(FINISH_DEADLINE, &mut self.writer).await;
    }
}

impl<T> Drop for Connection<T> {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

struct Writer<T> {
    writer: WriteHalf<T>,
    orders: watch::Receiver<Orders>,
    sent: watch::Sender<Option<u64>>,
}

impl<T: Stream> Writer<T> {
    async fn run(mut self, work: Option<(Job, Option<tokio::fs::File>)>) -> Result<(), FrameError> {
        let mut told = Orders::default();
        // When what is stored has waited long enough to be acknowledged.
        let mut due = None::<Instant>;
        let mut source = None;
        if let Some((job, file)) = work {
            frame::write(&mut self.writer, &HostToAgent::Job(Box::new(job))).await?;
            source = file.map(|file| (file, 0_u64));
            if source.is_none() {
                self.sent.send_replace(Some(0));
            }
        }
        loop {
            let orders = self.orders.borrow_and_update().clone();
            if orders.cancel && !told.cancel {
                told.cancel = true;
                source = None;
                frame::write(&mut self.writer, &HostToAgent::Cancel).await?;
            }
            let news = orders.acknowledge - told.acknowledge;
            if news > 0 {
                due = due.or_else(|| Some(Instant::now() + ACKNOWLEDGE_WAIT));
            }
            if news >= ACKNOWLEDGE_EVENTS || due.is_some_and(|due| due <= Instant::now()) {
                due = None;
                told.acknowledge = orders.acknowledge;
                let seq = orders.acknowledge;
                frame::write(&mut self.writer, &HostToAgent::Acknowledge { seq }).await?;
            }
            if let Some(answer) = orders.answer.filter(|_| orders.answers > told.answers) {
                told.answers = orders.answers;
                let (id, answer) = (*answer).clone();
                frame::write(&mut self.writer, &HostToAgent::Secret { id, answer }).await?;
            }
            if orders.finish {
                return frame::write(&mut self.writer, &HostToAgent::Finish).await;
            }
            match &mut source {
                Some((file, total)) if *total < orders.source_taken + SOURCE_WINDOW => {
                    let room = orders.source_taken + SOURCE_WINDOW - *total;
                    let chunk = read_chunk(file, room).await?;
                    if chunk.is_empty() {
                        let total = *total;
                        source = None;
                        frame::write(&mut self.writer, &HostToAgent::SourceEnd { total }).await?;
                        self.sent.send_replace(Some(total));
                    } else {
                        *total += chunk.len() as u64;
                        frame::write(&mut self.writer, &HostToAgent::Source(chunk)).await?;
                    }
                }
                // Nothing to say until the orders change; the session that gives them may be gone.
                _ => tokio::select! {
                    changed = self.orders.changed() => if changed.is_err() {
                        return Ok(());
                    },
                    () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                },
            }
        }
    }
}

/// The next piece of the source; empty at its end.
async fn read_chunk(file: &mut tokio::fs::File, room: u64) -> Result<Vec<u8>, FrameError> {
    let size = usize::try_from(room).unwrap_or(usize::MAX).min(MAX_SOURCE_CHUNK);
    let mut chunk = vec![0; size];
    let read = file.read(&mut chunk).await.map_err(FrameError::Io)?;
    chunk.truncate(read);
    Ok(chunk)
}
