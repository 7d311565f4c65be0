//! What a client says, on its way to the VM: within the agent's window, and signals first.

use std::collections::VecDeque;

use bytes::Bytes;
use kiln_protocol::exec::{HostToSession, INPUT_WINDOW, MAX_CHUNK, Open};
use kiln_protocol::frame::{self, FrameError};
use kiln_protocol::preamble::Preamble;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

use super::bridge::{ClientInput, Gone, Said};

/// Input that waits here for the command to take more. What a client sends beyond it stays in its connection.
const MAX_WAITING: usize = 1024 * 1024;

/// Takes what the client says to the VM, until the client is gone.
pub(super) async fn inward<I: ClientInput>(
    mut writer: impl AsyncWrite + Unpin + Send,
    preamble: Preamble,
    open: Open,
    window: watch::Receiver<u64>,
    input: &mut I,
) -> Gone {
    let mut sieve = Sieve::of(&open);
    let done = async {
        writer.write_all(&preamble.encode()).await.map_err(FrameError::Io)?;
        frame::write(&mut writer, &HostToSession::Open(Box::new(open))).await?;
        pass_on(&mut writer, window, input, &mut sieve).await
    };
    if let Ok(gone) = done.await {
        return gone;
    }
    // The agent has closed the connection, and its last word is heard elsewhere.
    loop {
        if let Err(gone) = input.next().await {
            return gone;
        }
    }
}

/// As [`inward`], of a session that is open.
async fn pass_on<I: ClientInput>(
    writer: &mut (impl AsyncWrite + Unpin),
    mut window: watch::Receiver<u64>,
    input: &mut I,
    sieve: &mut Sieve,
) -> Result<Gone, FrameError> {
    let mut waiting = Waiting::default();
    let mut sent = 0;
    loop {
        let taken = *window.borrow_and_update();
        while let Some(next) = waiting.next(sent, taken) {
            if let HostToSession::Input(bytes) = &next {
                sent += bytes.len() as u64;
            }
            frame::write(writer, &next).await?;
        }
        let said = tokio::select! {
            said = input.next(), if waiting.has_room() => match said {
                Ok(said) => said,
                Err(gone) => return Ok(gone),
            },
            moved = window.changed() => match moved {
                Ok(()) => continue,
                // Nobody listens to the agent any more.
                Err(_) => return Err(FrameError::Closed),
            },
        };
        if !sieve.passes(&said) {
            continue;
        }
        match said {
            Said::Input(bytes) => waiting.input(bytes),
            Said::InputEnd => waiting.ended = true,
            Said::Resize(size) => frame::write(writer, &HostToSession::Resize(size)).await?,
            Said::Signal(number) => frame::write(writer, &HostToSession::Signal(number)).await?,
        }
    }
}

/// Leaves out what a client may say and an agent need not hear.
struct Sieve {
    terminal: bool,
    input_ended: bool,
}

impl Sieve {
    fn of(open: &Open) -> Self {
        let terminal = matches!(open, Open::Exec(exec) if exec.terminal.is_some());
        Self { terminal, input_ended: false }
    }

    fn passes(&mut self, said: &Said) -> bool {
        match said {
            Said::Input(_) => !self.input_ended,
            Said::InputEnd => !std::mem::replace(&mut self.input_ended, true),
            // Without a terminal there is nothing that has a size.
            Said::Resize(_) => self.terminal,
            Said::Signal(_) => true,
        }
    }
}

/// What a piece costs beside its bytes, so that many small ones count as what they are.
const PIECE: usize = 64;

/// Input that waits for the command to take more.
#[derive(Default)]
struct Waiting {
    bytes: VecDeque<Bytes>,
    len: usize,
    ended: bool,
    told: bool,
}

impl Waiting {
    fn has_room(&self) -> bool {
        self.len < MAX_WAITING
    }

    fn input(&mut self, bytes: Bytes) {
        self.len += bytes.len() + PIECE;
        self.bytes.push_back(bytes);
    }

    /// What the agent may be told now, when it has been sent and has taken so many bytes.
    fn next(&mut self, sent: u64, taken: u64) -> Option<HostToSession> {
        let room = taken.saturating_add(INPUT_WINDOW).saturating_sub(sent);
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(MAX_CHUNK);
        while let Some(first) = self.bytes.front_mut() {
            if first.is_empty() {
                self.len -= PIECE;
                self.bytes.pop_front();
                continue;
            }
            if room == 0 {
                return None;
            }
            let chunk = first.split_to(room.min(first.len()));
            self.len -= chunk.len();
            return Some(HostToSession::Input(chunk.to_vec()));
        }
        let tell = self.ended && !self.told;
        self.told |= tell;
        tell.then_some(HostToSession::InputEnd)
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::exec::{Exec, Place, Terminal};

    use super::*;

    fn waiting(pieces: &[usize]) -> Waiting {
        let mut waiting = Waiting::default();
        for len in pieces {
            waiting.input(Bytes::from(vec![7; *len]));
        }
        waiting
    }

    fn len(message: Option<HostToSession>) -> Option<usize> {
        message.map(|message| match message {
            HostToSession::Input(bytes) => bytes.len(),
            _ => 0,
        })
    }

    #[test]
    fn the_window_is_filled_and_no_more() {
        let mut some = waiting(&[0, MAX_CHUNK + 10, 5]);
        assert_eq!(len(some.next(0, 0)), Some(MAX_CHUNK));
        assert_eq!(len(some.next(INPUT_WINDOW - 3, 0)), Some(3));
        assert_eq!(len(some.next(INPUT_WINDOW, 0)), None);
        assert_eq!(len(some.next(INPUT_WINDOW, 100)), Some(7));
        some.ended = true;
        assert_eq!(len(some.next(0, 0)), Some(5), "the end waits for its turn");
        assert_eq!(some.next(INPUT_WINDOW, 0), Some(HostToSession::InputEnd));
        assert_eq!(some.next(0, 0), None, "it is told once");
        assert_eq!(some.len, 0);
        // An agent that says that it took more than there was gains a larger window of its own memory.
        assert_eq!(len(waiting(&[9]).next(0, u64::MAX)), Some(9));
    }

    #[test]
    fn what_waits_is_bounded() {
        assert!(waiting(&[MAX_WAITING - PIECE - 1]).has_room());
        assert!(!waiting(&[MAX_WAITING - PIECE - 1, 1]).has_room());
        let small = vec![0; MAX_WAITING / PIECE];
        assert!(!waiting(&small).has_room(), "small pieces count too");
    }

    #[test]
    fn sizes_are_of_terminals_and_input_ends_once() {
        let size = Terminal { rows: 1, cols: 2 };
        for terminal in [None, Some(size)] {
            let exec = Exec {
                place: Place::Vm,
                command: vec![],
                env: vec![],
                directory: None,
                user: None,
                terminal,
            };
            let mut sieve = Sieve::of(&Open::Exec(exec));
            assert_eq!(sieve.passes(&Said::Resize(size)), terminal.is_some());
            let input = Said::Input(Bytes::from_static(b"x"));
            assert!(sieve.passes(&input) && sieve.passes(&Said::InputEnd));
            assert!(!sieve.passes(&input) && !sieve.passes(&Said::InputEnd));
            assert!(sieve.passes(&Said::Signal(2)));
        }
    }
}
