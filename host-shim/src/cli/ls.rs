//! `kiln ls`: the builds, newest first.

use clap::builder::PossibleValuesParser;
use jiff::Timestamp;
use serde_json::Value;

use super::client::Client;
use super::error::{CliError, print_line};
use super::format::{Format, print_json};
use super::table::table;
use super::view::{BuildView, duration};
use crate::build::Status;

/// Most entries that the API gives at a time.
const PAGE: usize = 200;

/// List builds, newest first
#[derive(Debug, clap::Args)]
pub struct LsArgs {
    /// How many at most
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Only builds of this status
    #[arg(long, value_parser = PossibleValuesParser::new(Status::ALL.map(Status::as_str)))]
    status: Option<String>,
    /// A table, or a JSON array of the API's builds
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs the command.
pub async fn run(client: &Client, args: LsArgs) -> Result<(), CliError> {
    let builds = collect(client, args.status.as_deref(), args.limit as usize).await?;
    match args.format {
        Format::Json => print_json(&Value::Array(builds)),
        Format::Table => {
            let views = builds.iter().map(BuildView::of).collect::<Result<Vec<_>, _>>()?;
            print_line(&listing(&views, Timestamp::now())).map(drop)
        }
    }
}

async fn collect(
    client: &Client,
    status: Option<&str>,
    limit: usize,
) -> Result<Vec<Value>, CliError> {
    let (mut builds, mut cursor) = (vec![], None);
    while builds.len() < limit {
        let wanted = (limit - builds.len()).min(PAGE);
        let page = client.builds(status, wanted, cursor.as_deref()).await?;
        // A page without entries would be asked for again for ever.
        if page.items.is_empty() {
            break;
        }
        builds.extend(page.items);
        match page.cursor {
            Some(next) => cursor = Some(next),
            None => break,
        }
    }
    builds.truncate(limit);
    Ok(builds)
}

fn listing(builds: &[BuildView], now: Timestamp) -> String {
    let rows = builds.iter().map(|build| {
        let image = build.image_ref.clone().unwrap_or_default();
        let age = build.age_ms(now).map(|ms| format!("{} ago", age(ms))).unwrap_or_default();
        let took = build.duration_ms.map(duration).unwrap_or_default();
        [build.id.clone(), build.status.clone(), age, took, image]
    });
    table(["ID", "STATUS", "CREATED", "TOOK", "IMAGE"], rows)
}

/// A time in its largest unit: seconds of a build of yesterday tell nothing.
pub(super) fn age(ms: u64) -> String {
    let seconds = ms / 1000;
    let units = [(86400, "d"), (3600, "h"), (60, "m")];
    match units.into_iter().find(|(length, _)| seconds >= *length) {
        Some((length, unit)) => format!("{}{unit}", seconds / length),
        None => format!("{seconds}s"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_for_people_and_safe() {
        let build = |json| BuildView::of(&json).unwrap();
        let builds = [
            build(serde_json::json!({
                "id": "b1", "status": "ready", "created_at": "2026-01-01T00:00:00Z",
                "duration_ms": 61_000, "image_ref": "h:1/dev/app@sha256:00\u{1b}[2J",
            })),
            build(serde_json::json!({"id": "b22", "status": "queued"})),
        ];
        let now = "2026-01-03T01:00:00Z".parse().unwrap();
        let expected = "ID   STATUS  CREATED  TOOK   IMAGE\n\
                        b1   ready   2d ago   1m01s  h:1/dev/app@sha256:00\\x1b[2J\n\
                        b22  queued";
        assert_eq!(listing(&builds, now), expected);
    }

    #[test]
    fn ages_are_in_their_largest_unit() {
        let shown = [0, 59_999, 60_000, 7_199_999, 86_400_000].map(age);
        assert_eq!(shown, ["0s", "59s", "1m", "1h", "1d"]);
    }
}
