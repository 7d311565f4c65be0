//! `kiln run`: runs an image in a microVM, as if its program ran here.
//!
//! Its stdout goes to stdout and its stderr to stderr: to a pipe or a file byte by byte, to a terminal in a form
//! that cannot do anything to it. The exit code is the program's; 125 is Kiln's own failure, 126 and 127 mean that
//! the program could not be executed or was not found. Standard input is not forwarded.

use std::pin::Pin;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use serde_json::{Map, Value, json};

use super::client::{CallError, Client};
use super::error::{CliError, Exit, note};
use super::fields::{self, Pair};
use super::instances::log::{End, Log};
use super::instances::still_there;
use super::interrupt::Interrupts;

/// Run an image in a microVM
///
/// Shows what its program prints, and exits as the program exits. Standard input is not forwarded: the program's own
/// is empty.
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
    // Before what may fail: where the server has stopped, this says so.
    if let Some(why) = end.exit_message.as_deref().filter(|why| !why.is_empty()) {
        note(why);
    }
    if args.rm && !deleted {
        tokio::select! {
            removed = client.delete_instance(&id) => removed.map_err(|error| {
                CliError::from(error).hint(format!("instance {id} has ended, but is not deleted"))
            })?,
            () = interrupts.next() => return Err(left(&id)),
        }
    } else if !args.rm && !deleted {
        note(&format!(
            "instance {id} has stopped and is kept with its log, until it is deleted: kiln instances rm {id}"
        ));
    }
    end.exit_code.ok_or_else(|| CliError::failed(format!("instance {id} did not run to its end")))
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
