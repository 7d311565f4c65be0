//! The process of a session in a container, as the container runtime takes it: the container's own, with what the
//! session asks for. Pure.

use kiln_protocol::exec::Exec;
use serde_json::{Map, Value, json};

use crate::run::User;

/// What a terminal is called when the session does not say.
const DEFAULT_TERM: &str = "xterm";

/// The process for the session, like `own`, the one of the container's config.
pub fn process(
    mut own: Map<String, Value>,
    exec: &Exec,
    user: Option<&User>,
) -> Map<String, Value> {
    own.insert("args".into(), json!(exec.command));
    let mut env = environment(own.get("env"));
    if let Some(user) = user {
        identify(&mut own, user);
        set(&mut env, "HOME", &user.home);
    }
    if exec.terminal.is_some() && !env.iter().any(|(name, _)| name == "TERM") {
        set(&mut env, "TERM", DEFAULT_TERM);
    }
    for (name, value) in &exec.env {
        set(&mut env, name, value);
    }
    let env: Vec<String> = env.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    own.insert("env".into(), json!(env));
    if let Some(directory) = &exec.directory {
        own.insert("cwd".into(), json!(directory));
    }
    own.insert("terminal".into(), json!(exec.terminal.is_some()));
    match exec.terminal {
        Some(size) => {
            own.insert("consoleSize".into(), json!({ "height": size.rows, "width": size.cols }))
        }
        None => own.remove("consoleSize"),
    };
    own
}

fn environment(own: Option<&Value>) -> Vec<(String, String)> {
    let lines = own.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    lines.filter_map(|line| line.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
}

fn set(env: &mut Vec<(String, String)>, name: &str, value: &str) {
    env.retain(|(known, _)| known != name);
    env.push((name.into(), value.into()));
}

/// Makes it another user's. Root may do what the container may; another user has no capability, as usual.
fn identify(own: &mut Map<String, Value>, user: &User) {
    own.insert(
        "user".into(),
        json!({ "uid": user.uid, "gid": user.gid, "additionalGids": user.groups }),
    );
    let Some(capabilities) = own.get_mut("capabilities").and_then(Value::as_object_mut) else {
        return;
    };
    let bounding = capabilities.get("bounding").cloned().unwrap_or_else(|| json!([]));
    let held = if user.uid == 0 { bounding } else { json!([]) };
    for set in ["effective", "permitted"] {
        capabilities.insert(set.into(), held.clone());
    }
    for set in ["inheritable", "ambient"] {
        capabilities.insert(set.into(), json!([]));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::exec::{Place, Terminal};

    use super::*;

    fn own() -> Map<String, Value> {
        let value = json!({
            "args": ["/bin/sh", "-c", "make"],
            "env": ["PATH=/bin", "A=1", "HOME=/root"],
            "cwd": "/src",
            "user": { "uid": 0, "gid": 0 },
            "capabilities": {
                "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"],
                "inheritable": ["CAP_CHOWN"], "ambient": ["CAP_CHOWN"],
            },
            "noNewPrivileges": true,
        });
        value.as_object().unwrap().clone()
    }

    fn exec() -> Exec {
        Exec {
            place: Place::Job { secrets: false },
            command: vec!["ls".into(), "-l".into()],
            env: vec![],
            directory: None,
            user: None,
            terminal: None,
        }
    }

    #[test]
    fn a_session_has_what_the_step_has() {
        let made = process(own(), &exec(), None);
        assert_eq!(made["args"], json!(["ls", "-l"]));
        for same in ["env", "cwd", "user", "capabilities", "noNewPrivileges"] {
            assert_eq!(made[same], own()[same], "{same}");
        }
        assert_eq!(made["terminal"], json!(false));
    }

    #[test]
    fn what_a_session_asks_for_wins() {
        let exec = Exec {
            env: vec![("A".into(), "2=3".into()), ("B".into(), String::new())],
            directory: Some("/tmp".into()),
            terminal: Some(Terminal { rows: 24, cols: 80 }),
            ..exec()
        };
        let made = process(own(), &exec, None);
        assert_eq!(made["env"], json!(["PATH=/bin", "HOME=/root", "TERM=xterm", "A=2=3", "B="]));
        assert_eq!(made["cwd"], json!("/tmp"));
        assert_eq!(made["consoleSize"], json!({ "height": 24, "width": 80 }));
        let exec = Exec { env: vec![("TERM".into(), "tmux".into())], ..exec };
        let env = process(own(), &exec, None)["env"].clone();
        assert_eq!(env, json!(["PATH=/bin", "A=1", "HOME=/root", "TERM=tmux"]));
    }

    #[test]
    fn another_user_has_no_capability_and_root_has_the_containers() {
        let user = |uid| User { uid, gid: 7, groups: vec![8], home: "/home/app".into() };
        let made = process(own(), &exec(), Some(&user(5)));
        assert_eq!(made["user"], json!({ "uid": 5, "gid": 7, "additionalGids": [8] }));
        assert_eq!(made["capabilities"]["effective"], json!([]));
        assert_eq!(made["capabilities"]["ambient"], json!([]));
        assert_eq!(made["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
        assert!(made["env"].as_array().unwrap().contains(&json!("HOME=/home/app")));
        let mut unprivileged = own();
        unprivileged["capabilities"]["effective"] = json!([]);
        let made = process(unprivileged, &exec(), Some(&user(0)));
        assert_eq!(made["capabilities"]["effective"], json!(["CAP_CHOWN"]));
        assert_eq!(made["capabilities"]["inheritable"], json!([]));
    }
}
