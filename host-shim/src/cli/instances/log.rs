//! What an instance prints, on its way to stdout and stderr, over connections that break.
//!
//! Its stdout goes to stdout and its stderr to stderr: to a pipe or a file byte by byte, to a terminal in a form
//! that cannot do anything to it. What Kiln itself says of it goes to stderr.

use std::io::{ErrorKind, IsTerminal, Write};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::time::Instant;

use super::still_there;
use crate::cli::client::{Client, innermost};
use crate::cli::error::{CliError, note};
use crate::cli::escape::escape;
use crate::cli::follow::{SILENCE, pause};
use crate::cli::sse::Parser;

/// How an instance ended, as its log says.
#[derive(Debug, Default)]
pub struct End {
    /// Of its program.
    pub exit_code: Option<u8>,
    /// Why, where there is more to say.
    pub exit_message: Option<String>,
}

/// How one connection ended.
enum Ending {
    /// With the instance's end.
    Stopped(End),
    /// In order, with the state of an instance that goes on.
    SoFar,
    /// Not in order, and why.
    Broken(String),
}

/// What a block of the log says.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Said {
    Log {
        #[serde(default)]
        content: String,
        content_b64: Option<String>,
        #[serde(default)]
        stream: String,
        #[serde(default)]
        partial: bool,
    },
    Status {
        status: String,
        exit_code: Option<u8>,
        exit_message: Option<String>,
    },
    #[serde(other)]
    Other,
}

/// An instance's log on its way to stdout and stderr.
pub struct Log<'a> {
    client: &'a Client,
    id: &'a str,
    patience: Duration,
    last: Option<String>,
    /// Since when nothing has come.
    quiet_since: Instant,
    raw_stdout: bool,
    raw_stderr: bool,
    stdout_is_gone: bool,
    /// Told when whoever read stdout is gone.
    gone: &'a tokio::sync::Notify,
}

impl<'a> Log<'a> {
    /// Of an instance, from the first line on.
    pub fn new(
        client: &'a Client,
        id: &'a str,
        patience: Duration,
        gone: &'a tokio::sync::Notify,
    ) -> Self {
        Self {
            client,
            id,
            patience,
            last: None,
            quiet_since: Instant::now(),
            raw_stdout: !std::io::stdout().is_terminal(),
            raw_stderr: !std::io::stderr().is_terminal(),
            stdout_is_gone: false,
            gone,
        }
    }

    /// Shows it until the instance has ended.
    pub async fn follow(&mut self) -> Result<End, CliError> {
        let mut tries = 0;
        loop {
            let before = self.quiet_since;
            let why = match self.client.instance_log(self.id, true, self.last.as_deref()).await {
                Ok(response) => match self.read(response).await? {
                    Ending::Stopped(end) => return Ok(end),
                    Ending::SoFar => "the server ended it early".into(),
                    Ending::Broken(why) => why,
                },
                Err(error) if error.is_passing() => error.to_string(),
                Err(error) => return Err(error.into()),
            };
            tries = if self.quiet_since > before { 0 } else { tries + 1 };
            let pause = pause(tries, None);
            if self.quiet_since.elapsed() + pause > self.patience {
                let message = format!("lost the server while instance {} ran: {why}", self.id);
                return Err(CliError::host(message).hint(still_there(self.id)));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Shows what there is by now.
    pub async fn show_stored(&mut self) -> Result<(), CliError> {
        let response = self.client.instance_log(self.id, false, None).await?;
        match self.read(response).await? {
            Ending::Stopped(_) | Ending::SoFar => Ok(()),
            Ending::Broken(why) => {
                let message = format!("the log of instance {} came in part: {why}", self.id);
                Err(CliError::host(message))
            }
        }
    }

    /// Reads one connection to its end.
    async fn read(&mut self, response: reqwest::Response) -> Result<Ending, CliError> {
        let mut stream = response.bytes_stream();
        let mut parser = Parser::default();
        let mut told = false;
        loop {
            let part = match tokio::time::timeout(SILENCE, stream.next()).await {
                Ok(Some(Ok(part))) => part,
                Ok(Some(Err(error))) => return Ok(Ending::Broken(innermost(&error))),
                Ok(None) if told => return Ok(Ending::SoFar),
                Ok(None) => return Ok(Ending::Broken("the server ended it early".into())),
                Err(_) => return Ok(Ending::Broken("it fell silent".into())),
            };
            for block in parser.push(&part).map_err(|e| CliError::host(e.to_string()))? {
                self.quiet_since = Instant::now();
                self.last = block.id.or(self.last.take());
                match serde_json::from_str(&block.data) {
                    Ok(Said::Log { content, content_b64, stream, partial }) => {
                        self.show(&stream, &content, content_b64.as_deref(), partial)?;
                    }
                    Ok(Said::Status { status, exit_code, exit_message }) if status == "Stopped" => {
                        return Ok(Ending::Stopped(End { exit_code, exit_message }));
                    }
                    Ok(Said::Status { .. }) => told = true,
                    Ok(Said::Other) | Err(_) => {}
                }
            }
        }
    }

    fn show(
        &mut self,
        stream: &str,
        content: &str,
        exact: Option<&str>,
        partial: bool,
    ) -> Result<(), CliError> {
        match stream {
            "stdout" if self.stdout_is_gone => Ok(()),
            "stdout" => {
                let bytes = shown(content, exact, partial, self.raw_stdout);
                let mut out = std::io::stdout().lock();
                match out.write_all(&bytes).and_then(|()| out.flush()) {
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                        self.stdout_is_gone = true;
                        self.gone.notify_one();
                        Ok(())
                    }
                    written => written.map_err(|error| {
                        CliError::failed(format!("cannot write to standard output: {error}"))
                    }),
                }
            }
            "stderr" => {
                // Nobody is left to tell when that is closed.
                let bytes = shown(content, exact, partial, self.raw_stderr);
                let _ = std::io::stderr().lock().write_all(&bytes);
                Ok(())
            }
            _ => {
                note(content);
                Ok(())
            }
        }
    }
}

/// The bytes of a line, or of a part of one, for a pipe or for a terminal.
fn shown(content: &str, exact: Option<&str>, partial: bool, raw: bool) -> Vec<u8> {
    let mut bytes = if raw {
        // Where the base64 does not decode, the text is the best there is.
        let exact = exact.and_then(|text| BASE64_STANDARD.decode(text).ok());
        exact.unwrap_or_else(|| content.as_bytes().to_vec())
    } else {
        // The CR of a CRLF is no attack.
        let line = if partial { content } else { content.strip_suffix('\r').unwrap_or(content) };
        escape(line).into_owned().into_bytes()
    };
    if !partial {
        bytes.push(b'\n');
    }
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_gets_every_byte_and_a_terminal_nothing_that_acts() {
        let show = |content, exact, partial, raw| {
            String::from_utf8(shown(content, exact, partial, raw)).unwrap()
        };
        assert_eq!(show("a\x1b[2J", None, false, true), "a\x1b[2J\n");
        assert_eq!(show("a\x1b[2J\r", None, false, false), "a\\x1b[2J\n");
        assert_eq!(show("end", None, true, true), "end", "no newline that was not printed");
        assert_eq!(show("", None, false, true), "\n");
        assert_eq!(shown("a\u{fffd}b", Some("Yf9i"), false, true), b"a\xffb\n");
        assert_eq!(show("a\u{fffd}b", Some("?"), true, true), "a\u{fffd}b");
    }

    #[test]
    fn what_the_log_says_is_read_leniently() {
        let said = |text: &str| serde_json::from_str::<Said>(text).unwrap();
        assert!(matches!(said(r#"{"type":"heartbeat","timestamp":"x"}"#), Said::Other));
        assert!(matches!(
            said(r#"{"type":"status","status":"Stopped","exit_code":null,"exit_message":"m"}"#),
            Said::Status { exit_code: None, .. }
        ));
        assert!(matches!(said(r#"{"type":"log","more":1}"#), Said::Log { partial: false, .. }));
    }
}
