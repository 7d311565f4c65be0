//! The source archive on its way from the connection to the thread that unpacks it.
//!
//! The session owns the [`Feeder`] and never waits for it: the protocol's window bounds what is
//! under way. The unpacking thread owns the [`Feed`] and waits for bytes.

use std::io::{self, Read};

use kiln_protocol::message::SOURCE_WINDOW;
use tokio::sync::{mpsc, watch};

/// Most pieces under way. The window in pieces of 2 KiB; the host sends far larger ones.
const MAX_PIECES: usize = 1024;

/// Takes pieces from the session.
#[derive(Debug)]
pub struct Feeder {
    pieces: mpsc::Sender<Piece>,
    taken: watch::Receiver<u64>,
    received: u64,
}

/// Gives bytes to the unpacking thread.
#[derive(Debug)]
pub struct Feed {
    pieces: mpsc::Receiver<Piece>,
    taken: watch::Sender<u64>,
    current: Vec<u8>,
    /// How much of `current` has been read.
    at: usize,
    /// The archive's length, once it is complete.
    total: Option<u64>,
}

#[derive(Debug)]
enum Piece {
    Bytes(Vec<u8>),
    End { total: u64 },
}

/// The host broke the rules of the source stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// It did not wait for room.
    #[error("the host sent source bytes beyond the window of {SOURCE_WINDOW} bytes")]
    Window,
    /// It sent many tiny pieces.
    #[error("the host sent the source in pieces that are too small")]
    Pieces,
    /// It said that the archive is complete, and it is not.
    #[error("the host says that the source has {promised} bytes, but sent {received}")]
    Length {
        /// What it said.
        promised: u64,
        /// What it sent.
        received: u64,
    },
}

/// Both ends, with nothing under way.
pub fn feed() -> (Feeder, Feed) {
    let (to_thread, pieces) = mpsc::channel(MAX_PIECES);
    let (taken, seen) = watch::channel(0);
    let feeder = Feeder { pieces: to_thread, taken: seen, received: 0 };
    (feeder, Feed { pieces, taken, current: Vec::new(), at: 0, total: None })
}

impl Feeder {
    /// The next piece. Once the thread has ended, pieces are taken and forgotten.
    pub fn push(&mut self, bytes: Vec<u8>) -> Result<(), FeedError> {
        let received = self.received.saturating_add(bytes.len() as u64);
        if received.saturating_sub(self.taken()) > SOURCE_WINDOW {
            return Err(FeedError::Window);
        }
        self.received = received;
        self.send(Piece::Bytes(bytes))
    }

    /// The archive is complete. Saying it again after a resume is no mistake.
    pub fn end(&mut self, total: u64) -> Result<(), FeedError> {
        if total != self.received {
            return Err(FeedError::Length { promised: total, received: self.received });
        }
        self.send(Piece::End { total })
    }

    fn send(&self, piece: Piece) -> Result<(), FeedError> {
        match self.pieces.try_send(piece) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(FeedError::Pieces),
        }
    }

    /// How many bytes have been taken. All that arrived, once the thread has ended.
    pub fn taken(&self) -> u64 {
        if self.pieces.is_closed() { self.received } else { *self.taken.borrow() }
    }

    /// Whether nothing is under way.
    pub fn is_drained(&self) -> bool {
        self.taken() == self.received
    }

    /// Waits until more has been taken; for ever, once the thread has ended.
    pub async fn moved(&mut self) {
        if self.taken.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Read for Feed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        while self.at == self.current.len() {
            if self.total.is_some() {
                return Ok(0);
            }
            match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => (self.current, self.at) = (bytes, 0),
                Some(Piece::End { total }) => self.total = Some(total),
                None => return Err(io::Error::other("the session ended before the source did")),
            }
        }
        let len = into.len().min(self.current.len() - self.at);
        into[..len].copy_from_slice(&self.current[self.at..self.at + len]);
        self.at += len;
        if self.at == self.current.len() {
            self.taken.send_modify(|taken| *taken += self.current.len() as u64);
            (self.current, self.at) = (Vec::new(), 0);
        }
        Ok(len)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_in_order_and_are_counted_when_they_are_read() {
        let (mut feeder, mut feed) = feed();
        feeder.push(b"hello ".to_vec()).unwrap();
        feeder.push(vec![]).unwrap();
        feeder.push(b"world".to_vec()).unwrap();
        feeder.end(11).unwrap();
        assert!(!feeder.is_drained());
        let mut six = [0; 6];
        feed.read_exact(&mut six).unwrap();
        assert_eq!(feeder.taken(), 6);
        let mut all = six.to_vec();
        feed.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"hello world");
        assert!(feeder.is_drained());
        assert_eq!(feed.read(&mut six).unwrap(), 0);
        feeder.end(11).unwrap();
    }

    #[test]
    fn the_window_is_kept_to_the_byte() {
        let window = usize::try_from(SOURCE_WINDOW).unwrap();
        let (mut feeder, mut feed) = feed();
        feeder.push(vec![0; window]).unwrap();
        assert_eq!(feeder.push(vec![0]), Err(FeedError::Window));
        feed.read_exact(&mut vec![0; window]).unwrap();
        feeder.push(vec![0]).unwrap();
    }

    #[test]
    fn tiny_pieces_are_bounded_too() {
        let (mut feeder, _feed) = feed();
        for _ in 0..MAX_PIECES {
            feeder.push(vec![0]).unwrap();
        }
        assert_eq!(feeder.push(vec![0]), Err(FeedError::Pieces));
    }

    #[test]
    fn a_wrong_length_is_told() {
        let (mut feeder, _feed) = feed();
        feeder.push(vec![0; 3]).unwrap();
        assert_eq!(feeder.end(4), Err(FeedError::Length { promised: 4, received: 3 }));
    }

    #[test]
    fn a_thread_that_ended_takes_everything() {
        let (mut feeder, feed) = feed();
        drop(feed);
        for _ in 0..3 {
            feeder.push(vec![0; usize::try_from(SOURCE_WINDOW).unwrap()]).unwrap();
        }
        assert!(feeder.is_drained());
    }

    #[test]
    fn a_session_that_ended_is_an_error_and_not_an_end() {
        let (feeder, mut feed) = feed();
        drop(feeder);
        assert!(feed.read(&mut [0; 1]).is_err());
    }
}
