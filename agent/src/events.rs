//! Events on their way to the host: in order, bounded, and never dropped.

use kiln_protocol::event::Event;
use tokio::sync::mpsc;

/// What the parts of the agent report while they work.
#[derive(Debug)]
pub enum Report {
    /// Something happened.
    Event(Event),
    /// The engine's process is running.
    EngineStarted,
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
}

/// A reporter and where its reports come out.
pub fn channel() -> (Reporter, mpsc::Receiver<Report>) {
    let (reports, receiver) = mpsc::channel(64);
    (Reporter { reports }, receiver)
}
