//! `RUN --mount=type=secret,env=NAME`, which the engine lacks: a mount at a place by which the runtime's wrapper
//! knows that a variable is wanted. Pure.

use crate::runtime::VARIABLE_MOUNTS;

/// The flags that a secret's mount becomes; `None` where it stays as it is. Or why it is refused.
pub fn rewrite(value: &str) -> Result<Option<String>, String> {
    let parts: Vec<(&str, &str)> =
        value.split(',').map(|part| part.split_once('=').unwrap_or((part, ""))).collect();
    let key = |name: &str| parts.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
    let Some((_, variable)) = key("env") else { return Ok(None) };
    if !is_variable(variable) {
        return Err(format!("RUN --mount=type=secret: env={variable} is not a variable's name"));
    }
    let targets = ["target", "dst", "destination"];
    let target = parts.iter().find(|(key, _)| targets.contains(&key.to_ascii_lowercase().as_str()));
    let named = key("id").map(|(_, id)| *id);
    let id = named.or_else(|| target.and_then(|(_, path)| path.rsplit('/').next()));
    let Some(id) = id.filter(|id| !id.is_empty()) else {
        return Err("RUN --mount=type=secret: it has no id".to_owned());
    };
    let required = parts
        .iter()
        .find(|(key, _)| key.eq_ignore_ascii_case("required"))
        .map(|(_, value)| format!(",required={}", if value.is_empty() { "true" } else { value }))
        .unwrap_or_default();
    let mut flags =
        format!("--mount=type=secret,id={id},target={VARIABLE_MOUNTS}/{variable}{required}");
    // With a target it is a file too.
    if target.is_some() {
        let rest: Vec<_> = value
            .split(',')
            .filter(|part| !part.to_ascii_lowercase().starts_with("env="))
            .collect();
        flags.push_str(&format!(" --mount={}", rest.join(",")));
    }
    Ok(Some(flags))
}

fn is_variable(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_a_mount_of_its_own() {
        assert_eq!(rewrite("type=secret,id=a,target=/x").unwrap(), None);
        let one = "--mount=type=secret,id=a,target=/dev/kiln-secret-variables/A";
        assert_eq!(rewrite("type=secret,id=a,env=A").unwrap().unwrap(), one);
        assert_eq!(
            rewrite("type=secret,id=a,env=A,required").unwrap().unwrap(),
            format!("{one},required=true")
        );
        assert_eq!(
            rewrite("type=secret,id=a,env=A,required=false").unwrap().unwrap(),
            format!("{one},required=false")
        );
        assert_eq!(
            rewrite("type=secret,env=A,target=/x/a,mode=0444").unwrap().unwrap(),
            format!("{one} --mount=type=secret,target=/x/a,mode=0444")
        );
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for value in [
            "type=secret,env=A",
            "type=secret,id=,env=A",
            "type=secret,id=a,env=",
            "type=secret,id=a,env=A/../B",
        ] {
            rewrite(value).unwrap_err();
        }
    }
}
