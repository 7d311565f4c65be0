//! `kiln run`: runs an image in a microVM, as if its program ran here.
//!
//! Its stdout goes to stdout and its stderr to stderr: to a pipe or a file byte by byte, to a terminal in a form
//! that cannot do anything to it. The exit code is the program's; 125 is Kiln's own failure, 126 and 127 mean that
//! the program could not be executed or was not found.

use std::io::{ErrorKind, IsTerminal, Write};
use std::pin::Pin;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::builder::NonEmptyStringValueParser;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::client::{CallError, Client, innermost};
use super::error::{CliError, Exit, note};
use super::escape::escape;
use super::fields::{self, Pair};
use super::follow::{SILENCE, pause};
use super::interrupt::Interrupts;
use super::sse::Parser;

/// Run an image in a microVM
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Delete the instance when it has ended
    #[arg(long)]
    rm: bool,
    /// A variable for the program; without =V it is taken from the environment
    #[arg(short = 'e', long = "env", value_name = "K=V", value_parser = fields::build_arg)]
    env: Vec<Option<Pair>>,
    /// An image of this server's registry: its repository with or without a tag, or as kiln build prints it
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    image: String,
    /// Instead of the image's command
    #[arg(last = true, value_name = "CMD")]
    cmd: Vec<String>,
}

/// Runs the command; gives the program's exit code.
pub async fn run(client: &Client, patience: Duration, args: RunArgs) -> Result<u8, CliError> {
    run_as_is(client, patience, args).await.map_err(|error| CliError { exit: Exit::Own, ..error })
}

async fn run_as_is(client: &Client, patience: Duration, args: RunArgs) -> Result<u8, CliError> {
    let mut interrupts = Interrupts::listen()?;
    let mut body = json!({ "image": args.image });
    let env: Map<String, Value> =
        args.env.into_iter().flatten().map(|(key, value)| (key, value.into())).collect();
    if !env.is_empty() {
        body["env"] = env.into();
    }
    if !args.cmd.is_empty() {
        body["cmd"] = args.cmd.into();
    }
    let mut posting = Box::pin(client.post::<Value>(&["instances"], &body));
    let (answer, stop) = tokio::select! {
        answer = &mut posting => (answer?, false),
        // What is asked for may be made already: it is not to be left behind.
        () = interrupts.next() => tokio::select! {
            answer = &mut posting => (answer?, true),
            () = interrupts.next() => return Err(CliError::cancelled("left while the instance was made")),
        },
    };
    let id = answer["id"].as_str().unwrap_or_default().to_owned();
    if id.is_empty() {
        return Err(CliError::host("the server's answer is not an instance"));
    }
    let (end, deleted) = attend(client, &id, patience, stop, &mut interrupts).await?;
    if args.rm && !deleted {
        tokio::select! {
            removed = client.delete_instance(&id) => removed.map_err(|error| {
                CliError::from(error).hint(format!("instance {id} has ended, but is not deleted"))
            })?,
            () = interrupts.next() => return Err(left(&id)),
        }
    } else if !args.rm && !deleted {
        note(&format!("instance {id} has stopped and is kept with its log, until it is deleted"));
    }
    if let Some(why) = end.exit_message.as_deref().filter(|why| !why.is_empty()) {
        note(why);
    }
    end.exit_code.ok_or_else(|| CliError::failed(format!("instance {id} did not run to its end")))
}

/// How an instance ended, as its log says.
#[derive(Debug, Default)]
struct End {
    exit_code: Option<u8>,
    exit_message: Option<String>,
}

/// Shows what an instance prints until it has ended. The first Ctrl-C, or the end of stdout's reader, deletes it;
/// the second Ctrl-C leaves at once. Tells besides whether it was deleted.
async fn attend(
    client: &Client,
    id: &str,
    patience: Duration,
    stop: bool,
    interrupts: &mut Interrupts,
) -> Result<(End, bool), CliError> {
    type Deleting<'a> = Pin<Box<dyn Future<Output = Result<(), CallError>> + 'a>>;
    let gone = tokio::sync::Notify::new();
    let mut log = Log::new(client, id, patience, &gone);
    let mut following = Box::pin(log.follow());
    let delete = || -> Deleting<'_> { Box::pin(client.delete_instance(id)) };
    let mut deleting = stop.then(delete);
    let mut deleted = false;
    let mut end = None;
    loop {
        if let Some(end) = end.take_if(|_| deleting.is_none()) {
            return Ok((end, deleted));
        }
        let begun = deleting.is_some() || deleted;
        tokio::select! {
            biased;
            done = at_some_time(&mut deleting) => {
                deleting = None;
                done.map_err(|error| CliError::from(error).hint(still_there(id)))?;
                deleted = true;
            }
            ended = &mut following, if end.is_none() => end = Some(ended?),
            () = interrupts.next() => {
                if begun {
                    return Err(left(id));
                }
                note("stopping the instance; Ctrl-C again leaves at once");
                deleting = Some(delete());
            }
            () = gone.notified(), if !begun => {
                deleting = Some(delete());
            }
        }
    }
}

async fn at_some_time<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn left(id: &str) -> CliError {
    CliError::cancelled(format!("left instance {id}")).hint(still_there(id))
}

fn still_there(id: &str) -> String {
    format!("it may still be there; delete it with: DELETE /instances/{id}")
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

/// An instance's log on its way to stdout and stderr, over connections that break.
struct Log<'a> {
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
    fn new(
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

    async fn follow(&mut self) -> Result<End, CliError> {
        let mut tries = 0;
        loop {
            let before = self.quiet_since;
            let why = match self.client.instance_log(self.id, self.last.as_deref()).await {
                Ok(response) => match self.read(response).await? {
                    Ok(end) => return Ok(end),
                    Err(why) => why,
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

    /// Reads one connection: the instance's end, or why the connection broke.
    async fn read(&mut self, response: reqwest::Response) -> Result<Result<End, String>, CliError> {
        let mut stream = response.bytes_stream();
        let mut parser = Parser::default();
        loop {
            let part = match tokio::time::timeout(SILENCE, stream.next()).await {
                Ok(Some(Ok(part))) => part,
                Ok(Some(Err(error))) => return Ok(Err(innermost(&error))),
                Ok(None) => return Ok(Err("the server ended it early".into())),
                Err(_) => return Ok(Err("it fell silent".into())),
            };
            for block in parser.push(&part).map_err(|e| CliError::host(e.to_string()))? {
                self.quiet_since = Instant::now();
                self.last = block.id.or(self.last.take());
                match serde_json::from_str(&block.data) {
                    Ok(Said::Log { content, content_b64, stream, partial }) => {
                        self.show(&stream, &content, content_b64.as_deref(), partial)?;
                    }
                    Ok(Said::Status { status, exit_code, exit_message }) if status == "Stopped" => {
                        return Ok(Ok(End { exit_code, exit_message }));
                    }
                    Ok(Said::Status { .. } | Said::Other) | Err(_) => {}
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
