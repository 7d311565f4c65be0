//! How long and how far the search of one image may go.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::LeakError;

/// What is left of an image's search: all its layers share it, since a guest chooses how many there are.
#[derive(Debug)]
pub struct Bounds {
    bytes: u64,
    left: Cell<u64>,
    patience: Duration,
    deadline: Option<Instant>,
    stops: Vec<CancellationToken>,
    ended: Cell<Option<Ended>>,
}

/// Why there is nothing left. It stays so: a decoder may hide the error that it was told with.
#[derive(Clone, Copy, Debug)]
enum Ended {
    Spent,
    Late,
    Stopped,
}

impl Bounds {
    /// For an image that may unpack to so many bytes and be searched for so long, unless one of the tokens is
    /// cancelled.
    pub fn new(bytes: u64, patience: Duration, stops: Vec<CancellationToken>) -> Self {
        // A patience that no clock can hold has no end.
        let deadline = Instant::now().checked_add(patience);
        let (left, ended) = (Cell::new(bytes), Cell::new(None));
        Self { bytes, left, patience, deadline, stops, ended }
    }

    /// Fails when the search is to end now.
    pub(super) fn check(&self) -> io::Result<()> {
        if self.ended.get().is_none() {
            if self.stops.iter().any(CancellationToken::is_cancelled) {
                self.ended.set(Some(Ended::Stopped));
            } else if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                self.ended.set(Some(Ended::Late));
            }
        }
        if self.ended.get().is_some() { Err(over()) } else { Ok(()) }
    }

    /// Counts what was unpacked.
    pub(super) fn spend(&self, length: usize) -> io::Result<()> {
        match self.left.get().checked_sub(length as u64) {
            Some(left) => self.left.set(left),
            None => self.ended.set(self.ended.get().or(Some(Ended::Spent))),
        }
        if self.ended.get().is_some() { Err(over()) } else { Ok(()) }
    }

    /// Why the search ended before its end, if it did.
    pub(super) fn ended(&self) -> Option<LeakError> {
        self.ended.get().map(|ended| match ended {
            Ended::Spent => LeakError::TooLarge(self.bytes),
            Ended::Late => LeakError::Late(self.patience),
            Ended::Stopped => LeakError::Stopped,
        })
    }
}

fn over() -> io::Error {
    io::Error::other("the search is over")
}

/// A blob as it is stored. What unpacks to nothing, however long, is read within the bounds too.
pub(super) struct Stored<'s> {
    pub file: File,
    pub bounds: &'s Bounds,
}

impl Read for Stored<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bounds.check()?;
        self.file.read(buffer)
    }
}
