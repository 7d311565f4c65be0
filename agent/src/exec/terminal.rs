//! The terminal of a session: the end that we hold.

use std::io;
use std::os::fd::OwnedFd;

use super::sys::watched;
use kiln_protocol::exec::Terminal;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What a person types to say that there is no more input.
pub const END_OF_INPUT: u8 = 4;

/// Our end of a terminal.
#[derive(Debug)]
pub struct Master(AsyncFd<OwnedFd>);

impl Master {
    /// Takes the descriptor.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(watched(fd, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// Waits until something may have been printed, or nobody has the other end any more.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await?.retain_ready();
        Ok(())
    }

    /// Reads what was printed: `None` when nothing is there now, 0 when nobody has the other end any more.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        // It forgets that there was something when there is nothing.
        match self.0.try_io(Interest::READABLE, |fd| read_now(fd, buffer)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            read => read.map(Some),
        }
    }

    /// Types all of it.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            let written = ready.try_io(|fd| Ok(unistd::write(fd.get_ref(), bytes)?));
            match written {
                Ok(Ok(count)) => bytes = &bytes[count..],
                Ok(Err(error)) => return Err(error),
                Err(_not_yet) => {}
            }
        }
        Ok(())
    }

    /// Gives it another size; its programs get SIGWINCH.
    pub fn resize(&self, size: Terminal) -> io::Result<()> {
        let Terminal { rows, cols } = size;
        let size = Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(self.0.get_ref(), size)?)
    }
}

/// The kernel says EIO when nobody has the other end.
fn read_now(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    match unistd::read(fd, buffer) {
        Err(Errno::EIO) => Ok(0),
        read => Ok(read?),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use nix::pty::openpty;

    use super::*;

    #[tokio::test]
    async fn what_is_typed_and_printed_goes_through_and_the_end_is_seen() {
        let pty = openpty(None, None).unwrap();
        let master = Master::new(pty.master).unwrap();
        master.write_all(b"hello\n").await.unwrap();
        let mut buffer = [0; 64];
        let read = unistd::read(&pty.slave, &mut buffer).unwrap();
        assert_eq!(&buffer[..read], b"hello\n");
        master.readable().await.unwrap();
        let read = master.try_read(&mut buffer).unwrap().unwrap();
        assert_eq!(&buffer[..read], b"hello\r\n", "the terminal echoes");
        assert_eq!(master.try_read(&mut buffer).unwrap(), None);
        master.resize(Terminal { rows: 7, cols: 9 }).unwrap();
        drop(pty.slave);
        master.readable().await.unwrap();
        assert_eq!(master.try_read(&mut buffer).unwrap(), Some(0));
    }
}
