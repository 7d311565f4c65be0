//! Standard input and outputs, without holding anything else up: each is waited for by a thread.

use std::io::{self, Read, Write};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Most that is read of standard input at one time.
const CHUNK: usize = 32 * 1024;

/// Standard input, piece by piece, up to its end. One piece is read ahead.
pub(super) fn stdin() -> io::Result<mpsc::Receiver<Bytes>> {
    let (pieces, received) = mpsc::channel(1);
    // A thread of its own, which the process's end does not wait for: a read of a terminal cannot be stopped.
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut buffer = vec![0; CHUNK];
        let mut stdin = io::stdin().lock();
        loop {
            match stdin.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What cannot be read has ended.
                Ok(0) | Err(_) => return,
                Ok(read) => {
                    if pieces.blocking_send(Bytes::copy_from_slice(&buffer[..read])).is_err() {
                        return;
                    }
                }
            }
        }
    })?;
    Ok(received)
}

/// Where output goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Output {
    Stdout,
    Stderr,
}

/// Writes all of it.
pub(super) async fn put(output: Output, bytes: Bytes) -> io::Result<()> {
    let written = tokio::task::spawn_blocking(move || match output {
        Output::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(&bytes)?;
            out.flush()
        }
        Output::Stderr => io::stderr().lock().write_all(&bytes),
    });
    written.await.map_err(io::Error::other)?
}
