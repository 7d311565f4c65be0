//! The texts of a session's WebSocket: the first one, those that follow, and the last. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_protocol::exec::{Exec, Open, Place, Terminal};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::error::shown;
use crate::exec::{Outcome, Said, signal};

/// Most bytes of a message of the client's. A command and its variables at their bounds fit where not all of
/// it has to be escaped.
pub(super) const MAX_MESSAGE: usize = 1024 * 1024;

/// A terminal's size where the client does not say: that of the first ones.
const DEFAULT_SIZE: Terminal = Terminal { rows: 24, cols: 80 };

/// Longest timeout: longer than any build may run.
const MAX_TIMEOUT_SECONDS: u64 = 7 * 24 * 60 * 60;

/// What the first message asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) exec: Exec,
    pub(super) timeout: Option<Duration>,
    /// Each piece of output says where it was written.
    pub(super) multiplex: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct First {
    command: Vec<String>,
    tty: Option<bool>,
    env: Option<BTreeMap<String, String>>,
    cwd: Option<String>,
    user: Option<String>,
    /// Seconds; 0 for none, as hypeman has it.
    timeout: Option<u64>,
    rows: Option<u16>,
    cols: Option<u16>,
    vm: Option<bool>,
    with_secrets: Option<bool>,
    multiplex: Option<bool>,
}

/// Reads the first message.
pub(super) fn first(text: &str) -> Result<Asked, String> {
    let first: First = serde_json::from_str(text)
        .map_err(|error| format!("the first message is not what it should be: {error}"))?;
    let set = |flag: Option<bool>| flag.unwrap_or(false);
    let (vm, secrets) = (set(first.vm), set(first.with_secrets));
    if vm && secrets {
        return Err(
            "vm and with_secrets exclude each other: the VM itself has no step's secrets".into()
        );
    }
    if first.command.first().is_none_or(String::is_empty) {
        return Err("command is empty; it has to name a program".into());
    }
    let timeout = first.timeout.filter(|seconds| *seconds > 0);
    if timeout.is_some_and(|seconds| seconds > MAX_TIMEOUT_SECONDS) {
        return Err(format!("timeout is at most {MAX_TIMEOUT_SECONDS} seconds"));
    }
    let env: Vec<_> = first.env.unwrap_or_default().into_iter().collect();
    if let Some((name, _)) = env.iter().find(|(name, _)| name.is_empty() || name.contains('=')) {
        return Err(format!("{} cannot be a variable's name", shown(name)));
    }
    let directory = first.cwd.filter(|cwd| !cwd.is_empty());
    if directory.as_ref().is_some_and(|cwd| !cwd.starts_with('/')) {
        return Err("cwd has to be an absolute path".into());
    }
    let user = first.user.filter(|user| !user.is_empty());
    let texts = first.command.iter().chain(env.iter().flat_map(|(name, value)| [name, value]));
    if texts.chain(&directory).chain(&user).any(|text| text.contains('\0')) {
        return Err("a word of the command, a variable, cwd or user holds a zero byte".into());
    }
    let size = |given: Option<u16>, otherwise| given.filter(|n| *n > 0).unwrap_or(otherwise);
    let terminal = set(first.tty).then(|| Terminal {
        rows: size(first.rows, DEFAULT_SIZE.rows),
        cols: size(first.cols, DEFAULT_SIZE.cols),
    });
    let place = if vm { Place::Vm } else { Place::Job { secrets } };
    let open = Open::Exec(Exec { place, command: first.command, env, directory, user, terminal });
    open.check().map_err(|error| error.to_string())?;
    let Open::Exec(exec) = open else { return Err("it is no command".into()) };
    let timeout = timeout.map(Duration::from_secs);
    Ok(Asked { exec, timeout, multiplex: set(first.multiplex) })
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Next {
    Resize(Size),
    Signal(Value),
    StdinClosed(bool),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Size {
    rows: u16,
    cols: u16,
}

/// Reads a message after the first. `None` where it says nothing.
pub(super) fn next(text: &str) -> Result<Option<Said>, String> {
    let next = serde_json::from_str(text).map_err(|error| {
        format!("a text message is not resize, signal or stdin_closed: {error}")
    })?;
    match next {
        Next::Resize(Size { rows: 0, .. } | Size { cols: 0, .. }) => Ok(None),
        Next::Resize(Size { rows, cols }) => Ok(Some(Said::Resize(Terminal { rows, cols }))),
        Next::Signal(Value::String(name)) => signal::parse(&name).map(|n| Some(Said::Signal(n))),
        Next::Signal(other) => {
            let number = other.as_u64().unwrap_or(0);
            signal::number_of(number).map(|n| Some(Said::Signal(n)))
        }
        Next::StdinClosed(closed) => Ok(closed.then_some(Said::InputEnd)),
    }
}

/// The last message.
pub(super) fn last(exit_code: u8, outcome: &Outcome) -> String {
    let mut last = json!({ "exitCode": exit_code });
    if let Some(why) = &outcome.why {
        last["error"] = why.as_str().into();
    }
    last.to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::run::MAX_ARGS;

    use super::*;
    use crate::exec::How;

    #[test]
    fn all_that_can_be_asked_for_arrives() {
        let asked = first(
            r#"{"command":["sh","-c","x"],"tty":true,"env":{"B":"2","A":""},"cwd":"/srv","user":"app",
                "timeout":5,"rows":50,"cols":120,"vm":false,"with_secrets":true,"multiplex":true}"#,
        )
        .unwrap();
        let Asked { exec, timeout, multiplex } = asked;
        assert_eq!(exec.command, ["sh", "-c", "x"]);
        assert_eq!(exec.env, [("A".into(), String::new()), ("B".into(), "2".into())]);
        assert_eq!((exec.directory.as_deref(), exec.user.as_deref()), (Some("/srv"), Some("app")));
        assert_eq!(exec.terminal, Some(Terminal { rows: 50, cols: 120 }));
        assert_eq!(exec.place, Place::Job { secrets: true });
        assert_eq!((timeout, multiplex), (Some(Duration::from_secs(5)), true));
    }

    #[test]
    fn a_command_alone_is_enough() {
        let Asked { exec, timeout, multiplex } = first(r#"{"command":["id"]}"#).unwrap();
        assert_eq!((exec.place, exec.terminal), (Place::Job { secrets: false }, None));
        assert!(exec.env.is_empty() && exec.directory.is_none() && exec.user.is_none());
        assert_eq!((timeout, multiplex), (None, false));
        let terminal =
            r#"{"command":["id"],"tty":true,"rows":0,"cwd":"","env":null,"timeout":0,"vm":true}"#;
        let asked = first(terminal).unwrap();
        assert_eq!((asked.exec.terminal, asked.exec.place), (Some(DEFAULT_SIZE), Place::Vm));
        assert_eq!((asked.timeout, asked.exec.directory), (None, None));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let many = format!(r#"{{"command":{}}}"#, json!(vec!["a"; MAX_ARGS + 1]));
        for (text, why) in [
            ("", "first message"),
            ("[]", "first message"),
            ("{}", "command"),
            (r#"{"command":"id"}"#, "first message"),
            (r#"{"command":[]}"#, "command is empty"),
            (r#"{"command":[""]}"#, "command is empty"),
            (r#"{"command":["id"],"shell":true}"#, "shell"),
            (r#"{"command":["id"],"env":{"":"x"}}"#, "variable's name"),
            (r#"{"command":["id"],"env":{"a=b":"x"}}"#, "variable's name"),
            (r#"{"command":["a\u0000"]}"#, "zero byte"),
            (r#"{"command":["id"],"user":"a\u0000"}"#, "zero byte"),
            (r#"{"command":["id"],"cwd":"srv"}"#, "absolute"),
            (r#"{"command":["id"],"timeout":-1}"#, "first message"),
            (r#"{"command":["id"],"timeout":604801}"#, "timeout"),
            (r#"{"command":["id"],"vm":true,"with_secrets":true}"#, "exclude"),
            (&many, "words"),
        ] {
            let refused = first(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn what_follows_is_one_thing_each() {
        let said = |text| next(text).unwrap();
        let size = Terminal { rows: 1, cols: 65535 };
        assert_eq!(said(r#"{"resize":{"rows":1,"cols":65535}}"#), Some(Said::Resize(size)));
        assert_eq!(said(r#"{"resize":{"rows":0,"cols":5}}"#), None);
        assert_eq!(said(r#"{"signal":"SIGTERM"}"#), Some(Said::Signal(15)));
        assert_eq!(said(r#"{"signal":"9"}"#), Some(Said::Signal(9)));
        assert_eq!(said(r#"{"signal":2}"#), Some(Said::Signal(2)));
        assert_eq!(said(r#"{"stdin_closed":true}"#), Some(Said::InputEnd));
        assert_eq!(said(r#"{"stdin_closed":false}"#), None);
        for bad in [
            "",
            "{}",
            r#"{"signal":"INT","stdin_closed":true}"#,
            r#"{"signal":0}"#,
            r#"{"signal":null}"#,
            r#"{"signal":"CHLD"}"#,
            r#"{"resize":{"rows":1}}"#,
            r#"{"resize":{"rows":1,"cols":65536}}"#,
            r#"{"resize":{"rows":1,"cols":1,"x":1}}"#,
            r#"{"command":["id"]}"#,
        ] {
            assert!(next(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_last_names_the_code_and_why() {
        let exited = Outcome { how: How::Exited, exit_code: Some(3), why: None, cause: None };
        assert_eq!(last(3, &exited), r#"{"exitCode":3}"#);
        assert_eq!(last(125, &Outcome::refused("no")), r#"{"error":"no","exitCode":125}"#);
    }
}
