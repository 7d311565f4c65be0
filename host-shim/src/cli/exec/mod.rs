//! `kiln exec`: a command in a running build or instance, or in the failed step of a build that was kept, as if it ran
//! here.
//!
//! ```text
//! stdin (-i) ─┐                        ┌─▶ stdout
//! signals ────┼─▶ WebSocket ⇄ server ──┼─▶ stderr
//! resizes (-t)┘                        └─▶ the exit code
//! ```
//! What the command prints goes out byte by byte, to a terminal as well: it is the user's own command. The exit code
//! is the command's; 124 means that its time was over, 125 is Kiln's own failure, 126 and 127 mean that it could not
//! be executed or was not found.

mod caught;
mod stdio;
mod talk;
mod terminal;

use std::io::IsTerminal;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use reqwest::StatusCode;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use self::caught::{Caught, Signals};
use self::talk::{End, Talk};
use self::terminal::Raw;
use super::client::{Client, Socket};
use super::error::{CliError, Exit, note};
use super::fields::{self, Pair};

/// A second Ctrl-C within this leaves.
const AGAIN: Duration = Duration::from_secs(1);

/// Run a command in a running build or instance, or in the failed step of a kept build
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct ExecArgs {
    /// Send standard input to the command
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal; with -i, this terminal's keys go to it as they are
    #[arg(short, long)]
    tty: bool,
    /// In the VM itself, as root; for administrators
    #[arg(long)]
    vm: bool,
    /// With the secrets that the step has
    #[arg(long, conflicts_with = "vm")]
    with_secrets: bool,
    /// A variable for the command; without =V it is taken from the environment
    #[arg(short = 'e', long = "env", value_name = "K=V", value_parser = fields::build_arg)]
    env: Vec<Option<Pair>>,
    /// The directory to run it in; the step's or the image's own otherwise
    #[arg(short = 'w', long = "workdir", value_name = "DIR")]
    workdir: Option<String>,
    /// The user to run it as, a name or number, with or without :GROUP; the step's or the image's own otherwise
    #[arg(short, long)]
    user: Option<String>,
    /// End the command after so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// The build or the instance; builds that failed with --keep-failed are listed by: kiln kept ls
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: String,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Runs the command; gives its exit code.
pub async fn run(client: &Client, args: ExecArgs) -> Result<u8, CliError> {
    run_as_is(client, args).await.map_err(|error| CliError { exit: Exit::Own, ..error })
}

async fn run_as_is(client: &Client, args: ExecArgs) -> Result<u8, CliError> {
    let mut signals = Signals::listen()?;
    let socket = tokio::select! {
        socket = enter(client, &args.id) => socket?,
        number = signals.end() => return Ok(ended_by(number)),
    };
    let keys = args.tty && args.interactive && std::io::stdin().is_terminal();
    let raw = if keys { Some(Raw::enter()?) } else { None };
    let first = args.first_message(args.tty.then(terminal::size).flatten());
    let stdin = args.interactive;
    // A terminal's input has no end of its own.
    let close_input = !args.interactive && !args.tty;
    let talk = Talk::begin(socket, first, stdin, close_input);
    let end = attend(talk, &mut signals, raw.as_ref(), args.tty).await;
    // Before anything is said here.
    drop(raw);
    match end {
        End::Exited { code, error } => {
            if let Some(error) = error {
                note(&error);
            }
            Ok(code)
        }
        End::Left(number) => {
            note("left the session; what ran in it is ended");
            Ok(ended_by(number))
        }
        // As a program that writes to nobody ends.
        End::ReaderGone => Ok(ended_by(nix::libc::SIGPIPE)),
        End::Lost(why) => {
            let id = &args.id;
            Err(CliError::host(format!("lost the session in {id}: {why}"))
                .hint("what ran in it is ended; look at it with: kiln sessions"))
        }
    }
}

/// Opens a session in the build or instance of that id: they have one kind of id, and never the same one.
async fn enter(client: &Client, id: &str) -> Result<Socket, CliError> {
    let missing = |error: &super::client::CallError| error.status() == Some(StatusCode::NOT_FOUND);
    match client.websocket(&["builds", id, "exec"]).await {
        Err(error) if missing(&error) => {}
        answer => return Ok(answer?),
    }
    match client.websocket(&["instances", id, "exec"]).await {
        Err(error) if missing(&error) => {
            Err(CliError::failed(format!("there is no build or instance {id}")))
        }
        answer => Ok(answer?),
    }
}

/// Stays until the session ends, and passes on what happens here.
async fn attend(mut talk: Talk, signals: &mut Signals, raw: Option<&Raw>, tty: bool) -> End {
    let mut last_interrupt: Option<Instant> = None;
    loop {
        let caught = tokio::select! {
            biased;
            end = talk.end() => return end,
            caught = signals.next() => caught,
        };
        match caught {
            // A key's signal goes to the command as a key; one from outside is meant for this process.
            Caught::End(number) if raw.is_some() => return End::Left(number),
            Caught::End(number @ nix::libc::SIGINT) => {
                let again = last_interrupt.is_some_and(|at| at.elapsed() < AGAIN);
                if again {
                    return End::Left(number);
                }
                last_interrupt = Some(Instant::now());
                talk.say(json!({ "signal": number }));
            }
            Caught::End(number @ nix::libc::SIGTERM) => talk.say(json!({ "signal": number })),
            Caught::End(number) => return End::Left(number),
            Caught::Resized => resize(&talk, tty),
            Caught::Continued => {
                if let Some(raw) = raw {
                    raw.again();
                }
                resize(&talk, tty);
            }
        }
    }
}

/// Tells the terminal's size, where the command has one.
fn resize(talk: &Talk, tty: bool) {
    if tty && let Some((rows, cols)) = terminal::size() {
        talk.say(json!({ "resize": { "rows": rows, "cols": cols } }));
    }
}

/// The exit code of a process that a signal ended, as shells have it.
fn ended_by(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

impl ExecArgs {
    /// The first message of docs/EXEC.md.
    fn first_message(&self, size: Option<(u16, u16)>) -> Value {
        let mut env: Map<String, Value> = Map::new();
        if self.tty
            && let Ok(term) = std::env::var("TERM")
        {
            env.insert("TERM".into(), term.into());
        }
        env.extend(self.env.iter().flatten().map(|(k, v)| (k.clone(), v.clone().into())));
        let mut first = json!({ "command": self.command, "multiplex": true });
        if !env.is_empty() {
            first["env"] = env.into();
        }
        for (name, flag) in
            [("tty", self.tty), ("vm", self.vm), ("with_secrets", self.with_secrets)]
        {
            if flag {
                first[name] = true.into();
            }
        }
        for (name, value) in [("cwd", &self.workdir), ("user", &self.user)] {
            if let Some(value) = value {
                first[name] = value.clone().into();
            }
        }
        if let Some(seconds) = self.timeout {
            first["timeout"] = seconds.into();
        }
        if let Some((rows, cols)) = size {
            (first["rows"], first["cols"]) = (rows.into(), cols.into());
        }
        first
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: ExecArgs,
    }

    fn first(line: &str, size: Option<(u16, u16)>) -> Value {
        let line = Line::try_parse_from(line.split(' ')).unwrap();
        line.args.first_message(size)
    }

    #[test]
    fn a_line_is_the_first_message() {
        assert_eq!(
            first("exec b1 -- ls -l", None),
            json!({ "command": ["ls", "-l"], "multiplex": true })
        );
        let all = first(
            "exec -it --with-secrets -e TERM=dumb -e A=b=c -w /srv -u app:1 --timeout 9 b1 -- sh -c x",
            Some((24, 80)),
        );
        let expected = json!({
            "command": ["sh", "-c", "x"], "multiplex": true, "tty": true, "with_secrets": true,
            "env": { "TERM": "dumb", "A": "b=c" }, "cwd": "/srv", "user": "app:1", "timeout": 9,
            "rows": 24, "cols": 80,
        });
        assert_eq!(all, expected);
    }

    #[test]
    fn the_help_names_all_that_can_be_entered() {
        use clap::{Args as _, Command};
        let help = ExecArgs::augment_args(Command::new("exec")).render_help().to_string();
        // Its lines are broken.
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for subject in ["running build or instance", "failed step of a kept build", "kiln kept ls"]
        {
            assert!(help.contains(subject), "{subject}: {help}");
        }
    }

    #[test]
    fn a_line_without_sense_is_refused() {
        for line in [
            "exec b1",
            "exec -- ls",
            "exec --vm --with-secrets b1 -- ls",
            "exec --timeout 0 b1 -- ls",
        ] {
            assert!(Line::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
        assert_eq!((ended_by(2), ended_by(15)), (130, 143));
    }
}
