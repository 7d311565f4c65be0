//! The few system calls of the wrapper that Rust cannot check.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::cmsg_space;
use nix::libc;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork};

/// Which of the two processes this is.
pub enum Forked {
    /// The one that forked.
    Parent,
    /// The new one.
    Child,
}

/// Forks. Only for a process with one thread.
pub fn fork_single_threaded() -> io::Result<Forked> {
    // SAFETY: the wrapper never starts a thread, so no lock can be held by one that does not exist
    // in the child, and the child may do whatever the parent may.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => Ok(Forked::Parent),
        ForkResult::Child => Ok(Forked::Child),
    }
}

/// Closes what the caller left open. buildah leaves both ends of its stdio pipes open in the
/// runtime; a monitor that kept them would keep buildah reading for ever. To be called first, while
/// nothing of this process' own is open.
pub fn close_inherited() -> io::Result<()> {
    // SAFETY: called before this process opened any descriptor, so no owner of one is left with a
    // closed one; standard input, output and error stay.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Points standard input, output and error at nothing.
pub fn detach_stdio() -> io::Result<()> {
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&nothing)?;
    dup2_stdout(&nothing)?;
    dup2_stderr(&nothing)?;
    Ok(())
}

/// Sends one byte and two descriptors with it.
pub fn send_with_pipes(socket: impl AsFd, byte: u8, pipes: [BorrowedFd<'_>; 2]) -> io::Result<()> {
    let raw = pipes.map(|pipe| pipe.as_raw_fd());
    let rights = [ControlMessage::ScmRights(&raw)];
    let bytes = [byte];
    let data = [IoSlice::new(&bytes)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    match sendmsg::<()>(socket.as_fd().as_raw_fd(), &data, &rights, flags, None)? {
        1 => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Receives one byte and the descriptors that came with it; no byte at the end of the stream.
pub fn receive_with_pipes(socket: impl AsFd) -> io::Result<(Option<u8>, Vec<OwnedFd>)> {
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let (count, pipes) = receive(socket, &mut data)?;
    Ok(((count == 1).then_some(byte[0]), pipes))
}

fn receive(socket: impl AsFd, data: &mut [IoSliceMut<'_>]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = cmsg_space!([libc::c_int; 2]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_fd().as_raw_fd(), data, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for this process; nobody else
            // knows their numbers.
            descriptors
                .extend(received.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    Ok((message.bytes, descriptors))
}

/// Receives the descriptors that come with a message, whose bytes nobody wants.
pub fn receive_descriptors(socket: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let mut bytes = [0; 4096];
    let mut data = [IoSliceMut::new(&mut bytes)];
    Ok(receive(socket, &mut data)?.1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _, pipe};
    use std::os::unix::net::UnixStream;

    #[test]
    fn pipes_travel_and_the_end_is_seen() {
        let (here, there) = UnixStream::pair().unwrap();
        let (out, mut out_writer) = pipe().unwrap();
        let (err, _err_writer) = pipe().unwrap();
        send_with_pipes(&here, b'K', [out.as_fd(), err.as_fd()]).unwrap();
        drop((out, here));
        let (byte, mut pipes) = receive_with_pipes(&there).unwrap();
        assert_eq!((byte, pipes.len()), (Some(b'K'), 2));
        out_writer.write_all(b"through").unwrap();
        drop(out_writer);
        let mut text = String::new();
        File::from(pipes.remove(0)).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        let (byte, pipes) = receive_with_pipes(&there).unwrap();
        assert_eq!((byte, pipes.len()), (None, 0));
    }
}
