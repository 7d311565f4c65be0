//! The agent's side of a session as the host hears it: in order, within its bounds, and with an end. Pure but for
//! reading.

use std::time::Duration;

use kiln_protocol::exec::{Cause, Ended, MAX_CHUNK, MAX_WHY, SessionToHost, Stream};
use kiln_protocol::frame::{FrameError, FrameReader};
use tokio::io::AsyncRead;

/// How long the agent may take to start a command. Generous, as a guest under software emulation may be busy.
pub(super) const START_DEADLINE: Duration = Duration::from_secs(60);

/// What the agent said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The command runs.
    Started,
    /// The command printed this; never nothing.
    Output(Stream, Vec<u8>),
    /// So many bytes of input have been taken since the start.
    Taken(u64),
    /// The command ended.
    Exited(u8),
    /// No command was started, or the session failed.
    Failed { cause: Cause, why: String, started: bool },
}

/// Why nothing more is heard.
#[derive(Debug, thiserror::Error)]
pub(super) enum Deaf {
    /// The connection is over, without an end of the session.
    #[error("the connection to the VM's agent broke")]
    Broken,
    /// The agent says what it may not.
    #[error("the VM's agent broke the protocol: {0}")]
    Protocol(String),
}

/// Listens to the agent.
pub(super) struct Agent<R> {
    frames: FrameReader<R>,
    started: bool,
    /// Bytes of input that it has taken.
    taken: u64,
}

impl<R: AsyncRead + Unpin> Agent<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { frames: FrameReader::new(reader), started: false, taken: 0 }
    }

    /// Whether the command was started.
    pub(super) fn started(&self) -> bool {
        self.started
    }

    /// The next that counts. Cancel-safe. After an end it is not to be asked again.
    pub(super) async fn hear(&mut self) -> Result<Heard, Deaf> {
        loop {
            let message = self.frames.read().await.map_err(|error| match error {
                FrameError::Closed | FrameError::Io(_) => Deaf::Broken,
                error => Deaf::Protocol(error.to_string()),
            })?;
            if let Some(heard) = self.take(message)? {
                return Ok(heard);
            }
        }
    }

    fn take(&mut self, message: SessionToHost) -> Result<Option<Heard>, Deaf> {
        let protocol = |what: &str| Err(Deaf::Protocol(what.to_owned()));
        match message {
            SessionToHost::Started if self.started => protocol("it started twice"),
            SessionToHost::Started => {
                self.started = true;
                Ok(Some(Heard::Started))
            }
            SessionToHost::Output { .. } if !self.started => {
                protocol("there is output of a command that was not started")
            }
            SessionToHost::Output { bytes, .. } if bytes.len() > MAX_CHUNK => {
                protocol("a piece of output is larger than it may be")
            }
            SessionToHost::Output { bytes, .. } if bytes.is_empty() => {
                protocol("a piece of output is empty")
            }
            SessionToHost::Output { stream, bytes } => Ok(Some(Heard::Output(stream, bytes))),
            SessionToHost::InputTaken { .. } if !self.started => {
                protocol("a command took input that was not started")
            }
            SessionToHost::InputTaken { total } if total <= self.taken => {
                protocol("it took no more input than it had")
            }
            SessionToHost::InputTaken { total } => {
                self.taken = total;
                Ok(Some(Heard::Taken(total)))
            }
            SessionToHost::Ended(Ended::Exited { .. }) if !self.started => {
                protocol("a command ended that was not started")
            }
            SessionToHost::Ended(Ended::Exited { code }) => Ok(Some(Heard::Exited(code))),
            SessionToHost::Ended(Ended::Failed { why, .. }) if why.len() > MAX_WHY => {
                protocol("a reason is longer than it may be")
            }
            SessionToHost::Ended(Ended::Failed { cause, why }) => {
                Ok(Some(Heard::Failed { cause, why, started: self.started }))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::frame;

    use super::*;

    /// All that is heard of these frames, and how it ends.
    async fn heard(messages: &[SessionToHost]) -> (Vec<Heard>, Result<(), String>) {
        let bytes: Vec<u8> = messages.iter().flat_map(|m| frame::encode(m).unwrap()).collect();
        let mut agent = Agent::new(&bytes[..]);
        let mut all = vec![];
        loop {
            match agent.hear().await {
                Ok(end @ (Heard::Exited(_) | Heard::Failed { .. })) => {
                    all.push(end);
                    return (all, Ok(()));
                }
                Ok(heard) => all.push(heard),
                Err(error) => return (all, Err(error.to_string())),
            }
        }
    }

    fn output(len: usize) -> SessionToHost {
        SessionToHost::Output { stream: Stream::Err, bytes: vec![7; len] }
    }

    fn failed(len: usize) -> SessionToHost {
        let why = "w".repeat(len);
        SessionToHost::Ended(Ended::Failed { cause: Cause::NotFound, why })
    }

    const EXITED: SessionToHost = SessionToHost::Ended(Ended::Exited { code: 3 });

    #[tokio::test]
    async fn a_session_is_heard_to_its_end_and_no_further() {
        let (all, end) = heard(&[SessionToHost::Started, output(1), EXITED, output(5)]).await;
        assert_eq!(end, Ok(()));
        assert_eq!(all, [Heard::Started, Heard::Output(Stream::Err, vec![7]), Heard::Exited(3)]);
        let (all, end) = heard(&[failed(2)]).await;
        assert_eq!(end, Ok(()));
        let why = "ww".to_owned();
        assert_eq!(all, [Heard::Failed { cause: Cause::NotFound, why, started: false }]);
    }

    #[tokio::test]
    async fn bounds_hold_at_them_and_not_above() {
        let started = SessionToHost::Started;
        assert!(heard(&[started.clone(), output(MAX_CHUNK), EXITED]).await.1.is_ok());
        assert!(heard(&[failed(MAX_WHY)]).await.1.is_ok());
        for broken in [
            vec![started.clone(), output(MAX_CHUNK + 1)],
            vec![started.clone(), output(0)],
            vec![started.clone(), SessionToHost::InputTaken { total: 0 }],
            vec![failed(MAX_WHY + 1)],
            vec![output(1)],
            vec![EXITED],
            vec![SessionToHost::InputTaken { total: 1 }],
            vec![started.clone(), started.clone()],
        ] {
            let end = heard(&broken).await.1.unwrap_err();
            assert!(end.contains("broke the protocol"), "{end}");
        }
        for broken in [vec![], vec![started]] {
            assert_eq!(heard(&broken).await.1.unwrap_err(), Deaf::Broken.to_string());
        }
        let mut agent = Agent::new(&[0xff; 8][..]);
        assert!(matches!(agent.hear().await, Err(Deaf::Protocol(_))));
    }
}
