//! `kiln show`: one build.

use clap::builder::NonEmptyStringValueParser;
use jiff::Timestamp;
use serde_json::Value;

use super::client::Client;
use super::error::{CliError, print_line};
use super::escape::{escape, escape_json};
use super::flag_names::in_failure;
use super::view::{BuildView, ReachedView, duration, size};

/// Show a build
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The build
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: String,
    /// Text for people, or the API's build
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Runs the command.
pub async fn run(client: &Client, args: ShowArgs) -> Result<(), CliError> {
    let build: Value = client.build(&args.id).await?;
    let text = match args.format {
        Format::Json => escape_json(&build.to_string()).into_owned(),
        Format::Text => sheet(&BuildView::of(&build)?, Timestamp::now()),
    };
    print_line(&text).map(drop)
}

fn sheet(build: &BuildView, now: Timestamp) -> String {
    let mut lines = vec![];
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            lines.push(format!("{name:10}{}", escape(&value)));
        }
    };
    let place = build.queue_position.map(|n| format!(", number {n} in the queue"));
    put("build", Some(build.id.clone()));
    put("status", Some(format!("{}{}", build.status, place.unwrap_or_default())));
    put("tenant", build.tenant.clone());
    put("image", build.image_ref.clone());
    put("digest", build.image_digest.clone());
    let ago = build.age_ms(now).map(|ms| format!(" ({} ago)", duration(ms))).unwrap_or_default();
    put("created", build.created_at.as_ref().map(|at| format!("{at}{ago}")));
    put("started", build.started_at.clone());
    put("completed", build.completed_at.clone());
    put("took", build.duration_ms.map(duration));
    put("attempt", build.attempt.filter(|n| *n > 1).map(|n| n.to_string()));
    let entered = build.entered.then(|| format!("yes, while it ran: kiln sessions {}", build.id));
    put("entered", entered);
    let kept = build.kept_until.as_ref();
    put("kept", kept.map(|until| format!("until {until}: kiln exec -it {} -- sh", build.id)));
    let tags = build.tags.iter().flatten().map(|(key, value)| format!("{key}={value}"));
    put("tags", Some(tags.collect::<Vec<_>>().join(" ")));
    if let Some(usage) = &build.usage {
        put("memory", usage.memory_peak_bytes.map(|n| format!("{} at most in a step", size(n))));
        put("log", usage.log_bytes.map(size));
    }
    put("reached", build.reached.as_deref().map(hosts));
    if let Some(failure) = &build.failure {
        put("failure", Some(failure.kind.clone()));
        put("step", failure.step.map(|n| n.to_string()));
        put("exit code", failure.exit_code.map(|n| n.to_string()));
    }
    let failure = build.failure.as_ref();
    let error = build.error.as_ref().or(failure.map(|failure| &failure.message));
    let kind = failure.map_or("", |failure| &failure.kind);
    put("error", error.map(|message| in_failure(kind, message)));
    let detail = build.failure.as_ref().and_then(|failure| failure.detail.as_deref());
    for line in detail.unwrap_or_default().lines() {
        put("", Some(line.to_owned()));
    }
    lines.join("\n")
}

/// Hosts in the order in which they were reached, some of many.
fn hosts(reached: &[ReachedView]) -> String {
    const MOST: usize = 10;
    let named = |ReachedView { host, port }: &ReachedView| {
        let is_v6 = host.contains(':');
        if is_v6 { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    };
    let mut shown: Vec<_> = reached.iter().take(MOST).map(named).collect();
    if let Some(more) = reached.len().checked_sub(MOST).filter(|more| *more > 0) {
        shown.push(format!("and {more} more"));
    }
    shown.join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_sheet_shows_what_is_there() {
        let build = serde_json::json!({
            "id": "b1", "status": "failed", "tenant": "dev", "created_at": "2026-01-01T00:00:00Z",
            "duration_ms": 1500, "attempt": 1, "tags": {"a": "b", "c": "d"},
            "error": "step 2 failed\u{7}",
            "failure": {"kind": "step_failed", "message": "m", "step": 2, "exit_code": 7, "detail": "x\ny"},
            "usage": {"memory_peak_bytes": 1_048_576, "log_bytes": null},
            "reached": [{"host": "a.test", "port": 443}, {"host": "::2", "port": 80}],
        });
        let now = "2026-01-01T00:01:00Z".parse().unwrap();
        let expected = "build     b1\n\
                        status    failed\n\
                        tenant    dev\n\
                        created   2026-01-01T00:00:00Z (1m00s ago)\n\
                        took      1.5s\n\
                        tags      a=b c=d\n\
                        memory    1.0 MiB at most in a step\n\
                        reached   a.test:443 [::2]:80\n\
                        failure   step_failed\n\
                        step      2\n\
                        exit code 7\n\
                        error     step 2 failed\\x07\n          x\n          y";
        assert_eq!(sheet(&BuildView::of(&build).unwrap(), now), expected);

        let failure =
            serde_json::json!({"kind": "disk_full", "message": "ask for more with disk_gb"});
        let full = serde_json::json!({"id": "b1", "status": "failed", "failure": failure});
        let shown = sheet(&BuildView::of(&full).unwrap(), now);
        assert!(shown.ends_with("error     ask for more with --disk"), "{shown}");
    }
}
