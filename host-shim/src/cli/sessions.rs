//! `kiln sessions`: who entered what, newest first.

use clap::builder::NonEmptyStringValueParser;
use serde::Deserialize;
use serde_json::Value;

use super::client::Client;
use super::error::{CliError, print_line};
use super::format::{Format, print_json};
use super::table::table;
use super::view::duration;

/// Most entries that the API gives at a time.
const PAGE: usize = 200;

/// List who entered builds and instances, newest first
#[derive(Debug, clap::Args)]
pub struct SessionsArgs {
    /// Only in this build or instance
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    id: Option<String>,
    /// How many at most
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// A table, or a JSON array of the API's sessions
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs the command.
pub async fn run(client: &Client, args: SessionsArgs) -> Result<(), CliError> {
    let sessions = collect(client, args.id.as_deref(), args.limit as usize).await?;
    match args.format {
        Format::Json => print_json(&Value::Array(sessions)),
        Format::Table => {
            let views = sessions.iter().map(View::of).collect::<Result<Vec<_>, _>>()?;
            print_line(&listing(&views)).map(drop)
        }
    }
}

/// Builds and instances have one kind of id, and never the same one: what is not of the one is of the other.
async fn collect(client: &Client, id: Option<&str>, limit: usize) -> Result<Vec<Value>, CliError> {
    let Some(id) = id else { return pages(client, None, limit).await };
    let of_build = pages(client, Some(("build", id)), limit).await?;
    if !of_build.is_empty() {
        return Ok(of_build);
    }
    pages(client, Some(("instance", id)), limit).await
}

async fn pages(
    client: &Client,
    of: Option<(&str, &str)>,
    limit: usize,
) -> Result<Vec<Value>, CliError> {
    let (mut sessions, mut cursor) = (vec![], None);
    while sessions.len() < limit {
        let wanted = (limit - sessions.len()).min(PAGE);
        let page = client.sessions(of, wanted, cursor.as_deref()).await?;
        // A page without entries would be asked for again for ever.
        if page.items.is_empty() {
            break;
        }
        sessions.extend(page.items);
        match page.cursor {
            Some(next) => cursor = Some(next),
            None => break,
        }
    }
    sessions.truncate(limit);
    Ok(sessions)
}

/// The parts of a session that are shown.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "the API's fields")]
struct View {
    build: Option<String>,
    instance: Option<String>,
    by: By,
    command: Vec<String>,
    cut: bool,
    tty: bool,
    vm: bool,
    with_secrets: bool,
    started_at: String,
    ended_at: Option<String>,
    how: Option<String>,
    exit_code: Option<u8>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct By {
    token: String,
    name: Option<String>,
    role: String,
}

impl View {
    fn of(value: &Value) -> Result<Self, CliError> {
        Self::deserialize(value)
            .map_err(|e| CliError::host(format!("the server's session is not understood: {e}")))
    }

    fn took(&self) -> Option<String> {
        let at = |text: &str| text.parse::<jiff::Timestamp>().ok();
        let (from, to) = (at(&self.started_at)?, at(self.ended_at.as_deref()?)?);
        let ms = to.as_millisecond().saturating_sub(from.as_millisecond());
        u64::try_from(ms).ok().map(duration)
    }

    fn row(&self) -> [String; 6] {
        let subject = self.build.clone().or(self.instance.clone()).unwrap_or_default();
        let flags = [("vm", self.vm), ("secrets", self.with_secrets), ("tty", self.tty)];
        let flags = flags.iter().filter(|(_, set)| *set).map(|(name, _)| format!(" +{name}"));
        let who = self.by.name.as_ref().unwrap_or(&self.by.token);
        let how = match (&self.how, self.exit_code) {
            (None, _) => "open".to_owned(),
            (Some(how), Some(code)) => format!("{how} {code}"),
            (Some(how), None) => how.clone(),
        };
        let mut command = self.command.join(" ");
        if self.cut {
            command.push('…');
        }
        [
            self.started_at.clone(),
            format!("{who} ({})", self.by.role),
            subject + &flags.collect::<String>(),
            how,
            self.took().unwrap_or_default(),
            command,
        ]
    }
}

fn listing(sessions: &[View]) -> String {
    table(["STARTED", "BY", "IN", "ENDED", "TOOK", "COMMAND"], sessions.iter().map(View::row))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_listing_is_for_people_and_safe() {
        let views = [
            json!({
                "build": "b1", "by": { "token": "t1", "name": "ci", "role": "admin" }, "vm": true, "tty": true,
                "command": ["sh", "-c", "\u{1b}[2J"], "started_at": "2026-01-01T00:00:00.000Z",
                "ended_at": "2026-01-01T00:01:01.000Z", "how": "exited", "exit_code": 3,
            }),
            json!({
                "instance": "i1", "by": { "token": "t2", "role": "tenant" }, "command": ["id"], "cut": true,
                "started_at": "2026-01-01T00:00:00.000Z", "new": 1,
            }),
        ];
        let views: Vec<_> = views.iter().map(|view| View::of(view).unwrap()).collect();
        let expected = "STARTED                   BY           IN           ENDED     TOOK   COMMAND\n\
                        2026-01-01T00:00:00.000Z  ci (admin)   b1 +vm +tty  exited 3  1m01s  sh -c \\x1b[2J\n\
                        2026-01-01T00:00:00.000Z  t2 (tenant)  i1           open             id…";
        assert_eq!(listing(&views), expected);
    }
}
