//! A bound on what tar's reader takes to find the next entry.
//!
//! It reads long names, extended headers and sparse maps into memory, whatever their size. While
//! it looks for an entry, this reader gives it so many bytes and then an error.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// Most bytes of headers for one entry. Linux allows 64 KiB in an extended attribute, and a name
/// has 4 KiB: real headers stay far below.
pub const MAX_HEADERS: u64 = 1024 * 1024;

/// The guarded reader.
pub struct Guard<R> {
    inner: R,
    state: Rc<State>,
}

/// Tells the guard what is being read.
pub struct Control(Rc<State>);

#[derive(Default)]
struct State {
    /// Bytes that are left for headers; `None` while content is read.
    left: Cell<Option<u64>>,
    ended: Cell<bool>,
}

impl<R: Read> Guard<R> {
    /// Guards a reader.
    pub fn new(inner: R) -> (Self, Control) {
        let state = Rc::<State>::default();
        (Self { inner, state: Rc::clone(&state) }, Control(state))
    }
}

impl Control {
    /// From now on headers are read.
    pub fn headers_begin(&self) {
        self.0.left.set(Some(MAX_HEADERS));
    }

    /// From now on content is read.
    pub fn headers_end(&self) {
        if !self.headers_too_long() {
            self.0.left.set(None);
        }
    }

    /// Whether headers went over the bound.
    pub fn headers_too_long(&self) -> bool {
        self.0.left.get() == Some(0)
    }

    /// Whether the data ended where tar's reader wanted more. An archive that is complete says so
    /// by a block of zeros before.
    pub fn has_ended(&self) -> bool {
        self.0.ended.get()
    }
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let allowed = match self.state.left.get() {
            Some(0) => return Err(io::Error::other("headers are too long")),
            Some(left) => into.len().min(usize::try_from(left).unwrap_or(usize::MAX)),
            None => into.len(),
        };
        let len = self.inner.read(&mut into[..allowed])?;
        if let Some(left) = self.state.left.get() {
            self.state.left.set(Some(left - len as u64));
        }
        if len == 0 && allowed > 0 {
            self.state.ended.set(true);
        }
        Ok(len)
    }
}
