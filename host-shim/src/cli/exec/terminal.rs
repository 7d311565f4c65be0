//! The terminal that `kiln exec` runs in: its size, and its raw mode, which is left on every way out.

use std::io::{stderr, stdin, stdout};
use std::os::fd::AsFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::cli::error::CliError;

/// Lines and characters of a line, of the first of stdout, stdin and stderr that is a terminal.
pub(super) fn size() -> Option<(u16, u16)> {
    let (stdout, stdin, stderr) = (stdout(), stdin(), stderr());
    let size = [stdout.as_fd(), stdin.as_fd(), stderr.as_fd()]
        .into_iter()
        .find_map(|fd| tcgetwinsize(fd).ok())?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Standard input in raw mode: keys arrive as they are, none of them is a signal. Dropping it gives the terminal
/// back as it was, in a panic as well.
pub(super) struct Raw {
    before: Termios,
    raw: Termios,
}

impl Raw {
    /// Changes the terminal.
    pub(super) fn enter() -> Result<Self, CliError> {
        let failed =
            |error| CliError::failed(format!("cannot change the terminal's mode: {error}"));
        let before = tcgetattr(stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        // From here on its drop restores what there was.
        let this = Self { before, raw };
        tcsetattr(stdin(), OptionalActions::Now, &this.raw).map_err(failed)?;
        Ok(this)
    }

    /// Once more: a shell that had stopped this process has changed it back.
    pub(super) fn again(&self) {
        // Without it the session goes on, less well.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.raw);
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Not after what is still to be shown: a terminal that is held (Ctrl-S) would hold this.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}
