//! How a client command ends when it does not end well: an exit code and a text for people.

use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

use super::escape::escape;
use super::json_line;

/// The exit codes that scripts rely on (0 is success).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The build failed, something was not found, or its state does not allow it.
    Failed = 1,
    /// The command line, or what it asked for, makes no sense.
    Usage = 2,
    /// The host could not be reached, does not answer as it should, or refused the token.
    Host = 3,
    /// The build was cancelled or ran out of time.
    Cancelled = 4,
    /// Kiln's own failure, where the other codes are a program's.
    Own = 125,
}

/// Why a command ended.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CliError {
    /// The exit code.
    pub exit: Exit,
    /// What happened, to what. May hold a server's text: it is escaped before it is shown.
    pub message: String,
    /// More lines, such as the engine's last words.
    pub detail: Option<String>,
    /// What to do next.
    pub hint: Option<String>,
}

impl CliError {
    /// An error with a code and a text.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), detail: None, hint: None }
    }

    /// Something failed, or is not there.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// The command line makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// The host is not there, or not willing.
    pub fn host(message: impl Into<String>) -> Self {
        Self::new(Exit::Host, message)
    }

    /// Cancelled or timed out.
    pub fn cancelled(message: impl Into<String>) -> Self {
        Self::new(Exit::Cancelled, message)
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Prints the error to stderr and gives the code for the process.
    pub fn report(&self) -> ExitCode {
        // Nobody is left to tell when stderr is closed.
        let _ = std::io::stderr().lock().write_all(self.text().as_bytes());
        ExitCode::from(self.exit as u8)
    }

    /// The same as a line of JSON.
    pub fn report_json(&self) -> ExitCode {
        let line = json_line::error(self, crate::clock::now());
        let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
        ExitCode::from(self.exit as u8)
    }

    fn text(&self) -> String {
        let detail = self.detail.as_deref().unwrap_or_default().lines();
        let lines = std::iter::once(format!(
            "kiln: {}
",
            escape(&self.message)
        ))
        .chain(detail.map(|line| {
            format!(
                "    {}
",
                escape(line)
            )
        }))
        .chain(self.hint.iter().map(|hint| {
            format!(
                "kiln: {}
",
                escape(hint)
            )
        }));
        lines.collect()
    }
}

/// A line on stderr, of which it does not matter whether anybody reads it.
pub fn note(text: &str) {
    let _ = std::io::stderr().lock().write_all(format!("kiln: {}\n", escape(text)).as_bytes());
}

/// Writes to stdout. A reader that has gone (`kiln ls | head`) is no error: `Ok(false)`.
pub fn print_bytes(bytes: &[u8]) -> Result<bool, CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(CliError::failed(format!("cannot write to standard output: {error}"))),
    }
}

/// Writes a line to stdout.
pub fn print_line(line: &str) -> Result<bool, CliError> {
    print_bytes(format!("{line}\n").as_bytes())
}

/// Whether stdout is a terminal, where nothing may be printed raw.
pub fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_text_names_the_problem_then_the_detail_then_the_way_on() {
        let mut error = CliError::failed("bad\n\x1b[2J").hint("try again");
        error.detail = Some("one\ntwo\x07".into());
        let expected = "kiln: bad\\n\\x1b[2J\n    one\n    two\\x07\nkiln: try again\n";
        assert_eq!(error.text(), expected);
    }
}
