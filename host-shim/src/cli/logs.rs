//! `kiln logs`: what a build printed.
//!
//! Log lines go to stdout. To a pipe or a file they go byte by byte as they were printed; to a terminal
//! in a form that cannot do anything to it. Steps, their ends and failures go to stderr.

use std::io::Write;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::builder::NonEmptyStringValueParser;

use super::client::Client;
use super::error::{CliError, print_bytes, stdout_is_terminal};
use super::follow::{Follower, Received, Seen};
use super::lines::Lines;
use super::view::EventView;

/// Show what a build printed
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// Go on until the build ends
    #[arg(short, long)]
    follow: bool,
    /// The build
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: String,
}

/// Runs the command. It succeeds when the log was shown, whatever became of the build.
pub async fn run(client: &Client, patience: Duration, args: LogsArgs) -> Result<(), CliError> {
    let mut printer = Printer { raw: !stdout_is_terminal(), ..Printer::default() };
    let mut see = |seen: Seen<'_>| match seen {
        Seen::Event(received) => printer.event(received),
        Seen::Reconnecting(why) => {
            error_line(&format!("kiln | the connection was lost ({why}); connecting again"))
        }
    };
    let mut follower = Follower::new(client, &args.id, patience);
    let end = if args.follow {
        follower.to_the_end(&mut see).await
    } else {
        follower.what_there_is(&mut see).await
    };
    // `Gone` is how a closed stdout gets out of the stream.
    if printer.gone {
        return Ok(());
    }
    printer.finish()?;
    end
}

#[derive(Debug, Default)]
struct Printer {
    raw: bool,
    lines: Lines,
    /// A part of a line was the last that went out.
    inside_line: bool,
    /// Whoever read stdout does not any more.
    gone: bool,
}

impl Printer {
    fn event(&mut self, received: &Received) -> Result<(), CliError> {
        let event = &received.event;
        let EventView::Log { content, content_b64, partial, .. } = event else {
            if matches!(event, EventView::Trimmed { .. }) && self.inside_line {
                // The rest of the line is not kept any more.
                self.inside_line = false;
                self.out(b"\n")?;
            }
            return self.lines.event(event).iter().try_for_each(|line| error_line(line));
        };
        if !self.raw {
            let lines = self.lines.event(event);
            return lines.iter().try_for_each(|line| self.out(format!("{line}\n").as_bytes()));
        }
        // Where the base64 does not decode, the text is the best there is.
        let exact = content_b64.as_ref().and_then(|text| BASE64_STANDARD.decode(text).ok());
        let mut bytes = exact.unwrap_or_else(|| content.clone().into_bytes());
        if !partial {
            bytes.push(b'\n');
        }
        self.inside_line = *partial;
        self.out(&bytes)
    }

    fn finish(&mut self) -> Result<(), CliError> {
        if self.inside_line {
            self.out(b"\n")?;
        }
        let lines = self.lines.finish();
        lines.iter().try_for_each(|line| self.out(format!("{line}\n").as_bytes()))
    }

    fn out(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        if print_bytes(bytes)? {
            return Ok(());
        }
        self.gone = true;
        Err(CliError::failed("standard output is closed"))
    }
}

/// A line on stderr, of which it does not matter whether anybody reads it.
#[expect(clippy::unnecessary_wraps, reason = "stands where errors are passed on")]
fn error_line(line: &str) -> Result<(), CliError> {
    let line = super::escape::escape(line);
    let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
    Ok(())
}
