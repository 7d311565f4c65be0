//! The signals that a session is about.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::error::CliError;

/// What was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caught {
    /// One that asks for an end: its number.
    End(i32),
    /// The terminal has another size.
    Resized,
    /// The process goes on after it was stopped.
    Continued,
}

/// Takes these signals away from their defaults for as long as the process lives.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
    resized: Signal,
    continued: Signal,
}

impl Signals {
    pub(super) fn listen() -> Result<Self, CliError> {
        let listen = |kind| {
            signal(kind).map_err(|e| CliError::failed(format!("cannot listen for signals: {e}")))
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            quit: listen(SignalKind::quit())?,
            resized: listen(SignalKind::window_change())?,
            continued: listen(SignalKind::from_raw(nix::libc::SIGCONT))?,
        })
    }

    /// The next. Cancel-safe.
    pub(super) async fn next(&mut self) -> Caught {
        tokio::select! {
            _ = self.interrupt.recv() => Caught::End(nix::libc::SIGINT),
            _ = self.terminate.recv() => Caught::End(nix::libc::SIGTERM),
            _ = self.hangup.recv() => Caught::End(nix::libc::SIGHUP),
            _ = self.quit.recv() => Caught::End(nix::libc::SIGQUIT),
            _ = self.resized.recv() => Caught::Resized,
            _ = self.continued.recv() => Caught::Continued,
        }
    }

    /// The next that asks for an end.
    pub(super) async fn end(&mut self) -> i32 {
        loop {
            if let Caught::End(number) = self.next().await {
                return number;
            }
        }
    }
}
