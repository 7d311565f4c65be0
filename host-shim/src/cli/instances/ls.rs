//! `kiln instances ls`: the instances, newest first.

use clap::builder::PossibleValuesParser;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;

use crate::cli::client::Client;
use crate::cli::error::{CliError, print_line};
use crate::cli::format::{Format, print_json};
use crate::cli::ls::age;
use crate::cli::table::table;
use crate::instances::State;

/// List instances, newest first; stopped ones are kept until they are deleted
#[derive(Debug, clap::Args)]
pub struct LsArgs {
    /// Only instances in this state
    #[arg(long, value_parser = PossibleValuesParser::new(State::ALL.map(State::as_str)))]
    state: Option<String>,
    /// A table, or a JSON array of the API's instances
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// The parts of an instance that are shown.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct View {
    id: String,
    name: String,
    state: String,
    created_at: Option<Timestamp>,
    exit_code: Option<u8>,
    image: String,
}

/// Runs the command.
pub async fn run(client: &Client, args: LsArgs) -> Result<(), CliError> {
    let instances = client.instances(args.state.as_deref()).await?;
    match args.format {
        Format::Json => print_json(&Value::Array(instances)),
        Format::Table => {
            let views = instances.iter().map(view).collect::<Result<Vec<_>, _>>()?;
            print_line(&listing(views, Timestamp::now())).map(drop)
        }
    }
}

fn view(instance: &Value) -> Result<View, CliError> {
    let view = View::deserialize(instance).map_err(|error| {
        CliError::host(format!("the server's instance is not understood: {error}"))
    })?;
    if view.id.is_empty() || view.state.is_empty() {
        return Err(CliError::host("the server's answer is not an instance"));
    }
    Ok(view)
}

fn listing(instances: Vec<View>, now: Timestamp) -> String {
    let rows = instances.into_iter().map(|instance| {
        let ms = instance.created_at.map(|at| now.as_millisecond() - at.as_millisecond());
        let ms = ms.and_then(|ms| u64::try_from(ms).ok());
        let ago = ms.map(|ms| format!("{} ago", age(ms))).unwrap_or_default();
        let exit = instance.exit_code.map(|code| code.to_string()).unwrap_or_default();
        [instance.id, instance.name, instance.state, ago, exit, instance.image]
    });
    table(["ID", "NAME", "STATE", "CREATED", "EXIT", "IMAGE"], rows)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_listing_is_for_people_and_safe() {
        let instances = [
            json!({
                "id": "i1", "name": "web", "state": "Stopped", "exit_code": 137, "image": "app\u{1b}[2J",
                "created_at": "2026-01-01T00:00:00Z", "more": 1,
            }),
            json!({"id": "i22", "name": "run-1", "state": "Created", "exit_code": null}),
        ];
        let views = instances.iter().map(|instance| view(instance).unwrap()).collect();
        let now = "2026-01-03T01:00:00Z".parse().unwrap();
        let expected = "ID   NAME   STATE    CREATED  EXIT  IMAGE\n\
                        i1   web    Stopped  2d ago   137   app\\x1b[2J\n\
                        i22  run-1  Created";
        assert_eq!(listing(views, now), expected);
    }

    #[test]
    fn what_is_no_instance_is_not_taken_for_one() {
        for answer in [json!({}), json!({"id": "i1"}), json!({"id": 1}), json!([])] {
            assert!(view(&answer).is_err(), "{answer}");
        }
    }
}
