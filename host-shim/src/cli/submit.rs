//! Sends a build: the form's fields, and the source as a stream.

use std::time::Duration;

use reqwest::Body;
use reqwest::multipart::{Form, Part};
use tokio::time::{Instant, MissedTickBehavior};

use super::client::{CallError, Client};
use super::error::CliError;
use super::flag_names::with_flags;
use super::interrupt::Interrupts;
use super::pack::{self, Meter, Packing, Source, Summary};
use super::render::Renderer;
use super::secret_flag::SecretPart;
use super::view::{BuildView, size};

/// How long the server may take nothing of what waits for it, or leave a complete source unanswered.
const STALL: Duration = Duration::from_mins(2);
/// How often progress is shown and a stall is looked for.
const GLANCE: Duration = Duration::from_millis(250);
/// How long to wait, after Ctrl-C, for the id of a build that was sent completely.
const LATE_ANSWER: Duration = Duration::from_secs(10);
/// How long to wait for the thread that packs to say why it ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The fields of a form beside the source; those not given are not sent.
pub type Fields = Vec<(&'static str, String)>;

/// Sends everything; gives the build that the server made of it. A Ctrl-C before the source is
/// complete ends it without a build; after that the build is cancelled.
pub async fn submit(
    client: &Client,
    fields: Fields,
    secrets: Vec<SecretPart>,
    dockerfile: Option<Vec<u8>>,
    source: Source,
    renderer: &Renderer,
    interrupts: &mut Interrupts,
) -> Result<BuildView, CliError> {
    let (stream, packing) = pack::start(source);
    let form = form(fields, secrets, dockerfile, Body::wrap_stream(stream));
    let Packing { meter, task } = packing;
    let mut call = std::pin::pin!(client.submit(form));
    let answer = tokio::select! {
        answer = &mut call => answer,
        why = stalled(&meter, renderer) => Err(client.unreachable(why.into())),
        () = interrupts.next() => {
            if !meter.is_complete() {
                return Err(CliError::cancelled("interrupted while sending the source; there is no build"));
            }
            renderer.note("waiting for the build's id to cancel it; Ctrl-C again leaves at once");
            tokio::select! {
                answer = &mut call => return cancel_late(client, answer).await,
                () = tokio::time::sleep(LATE_ANSWER) => {}
                () = interrupts.next() => {}
            }
            return Err(CliError::cancelled("interrupted before the server answered")
                .hint("a build may have been made; look with: kiln ls"));
        }
    };
    match answer {
        Ok(build) => {
            // The server has everything, so the thread has nothing left to do.
            if let Ok(Ok(summary)) = task.await {
                report(renderer, &summary, meter.taken());
            }
            BuildView::of(&build)
        }
        // A refusal stands by itself; a body that broke has its reason in the thread.
        Err(CallError::Refused { status, detail }) => {
            Err(CallError::Refused { status, detail: with_flags(&detail) }.into())
        }
        Err(error) => match tokio::time::timeout(LAST_WORDS, task).await {
            Ok(Ok(Err(why))) if why.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(CliError::failed(format!("cannot send the source: {why}")))
            }
            _ if meter.taken() > 0 => Err(why_cut_off(client, error).await),
            _ => Err(error.into()),
        },
    }
}

/// A server that refuses in the middle of a source may close the connection before its answer is read:
/// TCP then throws the answer away. A token that is not good is not good for a small question either.
async fn why_cut_off(client: &Client, error: CallError) -> CliError {
    match client.builds(None, 1, None).await {
        Err(refused @ CallError::Refused { .. }) => refused.into(),
        Err(_) => error.into(),
        Ok(_) => CliError::from(error).hint(
            "the server is there but cut the source off: try again, or check its size against \
             the server's --max-source-mb",
        ),
    }
}

fn form(
    fields: Fields,
    secrets: Vec<SecretPart>,
    dockerfile: Option<Vec<u8>>,
    source: Body,
) -> Form {
    let mut form = Form::new();
    for (name, value) in fields {
        form = form.text(name, value);
    }
    for (name, value) in secrets {
        form = form.part(name, Part::bytes(value.to_vec()));
    }
    if let Some(dockerfile) = dockerfile {
        form = form.part("dockerfile", Part::bytes(dockerfile).file_name("Dockerfile"));
    }
    // Last, so that a server knows all the rest before the large part begins.
    form.part("source", Part::stream(source).file_name("source.tar"))
}

/// Returns when the server has taken nothing for too long though it could.
async fn stalled(meter: &Meter, renderer: &Renderer) -> &'static str {
    let mut glance = tokio::time::interval(GLANCE);
    glance.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        glance.tick().await;
        let taken = meter.taken();
        renderer.sending(taken);
        if taken != seen || !meter.is_servers_turn() {
            (seen, since) = (taken, Instant::now());
        } else if since.elapsed() > STALL {
            return if meter.is_complete() {
                "it has the whole source and does not answer"
            } else {
                "it has stopped taking the source"
            };
        }
    }
}

async fn cancel_late(
    client: &Client,
    answer: Result<serde_json::Value, CallError>,
) -> Result<BuildView, CliError> {
    let build = BuildView::of(&answer?)?;
    client.cancel(&build.id).await?;
    Err(CliError::cancelled(format!("build {} was cancelled", build.id)))
}

fn report(renderer: &Renderer, summary: &Summary, bytes: u64) {
    for skipped in &summary.skipped {
        renderer.note(&format!("warning: not sent: {skipped}"));
    }
    let entries = match summary.entries {
        0 => String::new(),
        1 => ", 1 entry".into(),
        n => format!(", {n} entries"),
    };
    renderer.note(&format!("source sent: {}{entries}", size(bytes)));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::render::Progress;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_slow_disk_is_no_stall_and_a_server_that_takes_nothing_is() {
        let renderer = Renderer::new(Progress::Json);
        let idle = Meter::default();
        let patient = tokio::time::timeout(STALL * 10, stalled(&idle, &renderer));
        assert!(patient.await.is_err(), "nothing was made yet: not the server's fault");

        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), "x").unwrap();
        let context = super::super::context::Context::open(dir.path(), None).unwrap();
        let (_stream, packing) = pack::start(Source::Directory(context));
        packing.task.await.unwrap().unwrap();
        let why = stalled(&packing.meter, &renderer).await;
        assert_eq!(why, "it has stopped taking the source");
    }
}
