//! What a request for an instance asks for. Pure.

use serde_json::{Map, Value};

use crate::api::Limits;
use crate::api::error::{ApiError, shown};
use crate::api::whole::whole;
use crate::instances::launch::Wanted;

/// MiB of memory where the request does not say.
pub(super) const DEFAULT_MEMORY_MB: u32 = 1024;
/// What the VM's own kernel and agent leave room in.
pub(super) const LEAST_MEMORY_MB: u32 = 256;
/// Processors where the request does not say.
pub(super) const DEFAULT_VCPUS: u32 = 1;
/// Longest name: it is the VM's host name.
pub(super) const MAX_NAME: usize = kiln_protocol::run::MAX_HOSTNAME;

/// A request, checked.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Fields {
    pub name: Option<String>,
    pub image: String,
    pub wanted: Wanted,
    pub vcpus: u32,
    pub memory_mb: u32,
}

/// Reads a request's fields. `null` is as good as none.
pub(super) fn parse(body: Map<String, Value>, limits: &Limits) -> Result<Fields, ApiError> {
    let (mut name, mut image) = (None, None);
    let mut wanted = Wanted::default();
    let (mut vcpus, mut memory_mb) = (DEFAULT_VCPUS, DEFAULT_MEMORY_MB);
    for (field, value) in body.into_iter().filter(|(_, value)| !value.is_null()) {
        match field.as_str() {
            "name" => name = Some(parse_name(text("name", value)?)?),
            "image" => image = Some(text("image", value)?),
            "cmd" => wanted.cmd = Some(words("cmd", value)?),
            "entrypoint" => wanted.entrypoint = Some(words("entrypoint", value)?),
            "env" => wanted.env = variables(value)?,
            "vcpus" => vcpus = processors(&value, limits.max_cpus)?,
            "size" => memory_mb = memory(&text("size", value)?, limits.max_memory_mb)?,
            other => {
                let message = format!(
                    "there is no field {}; an instance has name, image, cmd, entrypoint, env, vcpus and size",
                    shown(other)
                );
                return Err(unprocessable("unknown_field", message));
            }
        }
    }
    let image = image.ok_or_else(|| {
        unprocessable("missing_field", "image is missing: name the image to run".into())
    })?;
    Ok(Fields { name, image, wanted, vcpus, memory_mb })
}

fn unprocessable(code: &'static str, message: String) -> ApiError {
    ApiError::new(axum::http::StatusCode::UNPROCESSABLE_ENTITY, code, message)
}

fn text(field: &str, value: Value) -> Result<String, ApiError> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(ApiError::invalid(field, &other.to_string(), "a text")),
    }
}

fn words(field: &str, value: Value) -> Result<Vec<String>, ApiError> {
    let refused = |value: &Value| ApiError::invalid(field, &value.to_string(), "a list of texts");
    let Value::Array(list) = value else { return Err(refused(&value)) };
    let word = |word: Value| match word {
        Value::String(word) => Ok(word),
        other => Err(refused(&other)),
    };
    list.into_iter().map(word).collect()
}

/// Values are not repeated in refusals: they may be secret.
fn variables(value: Value) -> Result<Vec<(String, String)>, ApiError> {
    let Value::Object(object) = value else {
        return Err(unprocessable("invalid_field", "env must be an object of texts".into()));
    };
    let variable = |(name, value): (String, Value)| {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(ApiError::invalid("a name in env", &name, "without = and not empty"));
        }
        match value {
            Value::String(value) => Ok((name, value)),
            _ => {
                Err(unprocessable("invalid_field", format!("env {} must be a text", shown(&name))))
            }
        }
    };
    object.into_iter().map(variable).collect()
}

pub(super) fn parse_name(name: String) -> Result<String, ApiError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    let fits = (1..=MAX_NAME).contains(&bytes.len())
        && bytes.iter().all(|&b| plain(b) || b == b'-')
        && plain(bytes[0])
        && bytes.last().is_some_and(|&b| plain(b));
    if fits {
        return Ok(name);
    }
    let allowed = format!("1 to {MAX_NAME} of a-z, 0-9 and -, with no - at either end");
    Err(ApiError::invalid("name", &name, &allowed))
}

fn processors(value: &Value, most: u32) -> Result<u32, ApiError> {
    let number = whole(value).and_then(|number| u32::try_from(number).ok());
    number
        .filter(|number| (1..=most).contains(number))
        .ok_or_else(|| ApiError::invalid("vcpus", &value.to_string(), &format!("1 to {most}")))
}

/// MiB of hypeman's texts: `512MB`, `1GB`, `2G`, by powers of 1024.
pub(super) fn memory(text: &str, most: u32) -> Result<u32, ApiError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor: Option<u64> = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => Some(1),
        "K" | "KB" | "KIB" => Some(1 << 10),
        "M" | "MB" | "MIB" => Some(1 << 20),
        "G" | "GB" | "GIB" => Some(1 << 30),
        "T" | "TB" | "TIB" => Some(1 << 40),
        _ => None,
    };
    let bytes = number.parse().ok().zip(factor).and_then(|(n, f): (u64, u64)| n.checked_mul(f));
    bytes
        .and_then(|bytes| u32::try_from(bytes >> 20).ok())
        .filter(|mb| (LEAST_MEMORY_MB..=most).contains(mb))
        .ok_or_else(|| {
            let allowed = format!("a size like 512MB or 1GB, from {LEAST_MEMORY_MB}MB to {most}MB");
            ApiError::invalid("size", text, &allowed)
        })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Result<Fields, &'static str> {
        let Value::Object(body) = value else { panic!("not an object") };
        parse(body, &Limits::default()).map_err(|error| error.code())
    }

    #[test]
    fn an_image_is_enough_and_null_is_nothing() {
        let plain = fields(json!({"image": "a/b"})).ok().unwrap();
        assert_eq!((plain.vcpus, plain.memory_mb, plain.name), (1, 1024, None));
        let nulls = json!({"image": "a/b", "name": null, "cmd": null, "volumes": null});
        assert!(fields(nulls).is_ok());
    }

    #[test]
    fn everything_is_taken() {
        let all = fields(json!({
            "name": "web-1", "image": "a/b", "cmd": ["x", "y"], "entrypoint": [],
            "env": {"K": "V"}, "vcpus": 2, "size": "2GB",
        }));
        let all = all.ok().unwrap();
        assert_eq!((all.vcpus, all.memory_mb, all.name.as_deref()), (2, 2048, Some("web-1")));
        assert_eq!(all.wanted.entrypoint, Some(vec![]));
        assert_eq!(all.wanted.env, [("K".to_owned(), "V".to_owned())]);
    }

    #[test]
    fn what_it_is_not_is_refused_by_code() {
        for (body, code) in [
            (json!({}), "missing_field"),
            (json!({"image": 1}), "invalid_field"),
            (json!({"image": "a", "volumes": []}), "unknown_field"),
            (json!({"image": "a", "network": {"enabled": true}}), "unknown_field"),
            (json!({"image": "a", "cmd": "sh"}), "invalid_field"),
            (json!({"image": "a", "cmd": ["sh", 1]}), "invalid_field"),
            (json!({"image": "a", "env": {"A=B": "x"}}), "invalid_field"),
            (json!({"image": "a", "env": {"A": 1}}), "invalid_field"),
            (json!({"image": "a", "env": []}), "invalid_field"),
            (json!({"image": "a", "vcpus": 0}), "invalid_field"),
            (json!({"image": "a", "vcpus": 65}), "invalid_field"),
            (json!({"image": "a", "vcpus": 1.5}), "invalid_field"),
            (json!({"image": "a", "vcpus": "1"}), "invalid_field"),
        ] {
            assert_eq!(fields(body.clone()).err(), Some(code), "{body}");
        }
    }

    #[test]
    fn names_and_sizes_have_bounds() {
        for good in ["a", "web", "0-0", &"a".repeat(MAX_NAME)] {
            assert!(parse_name(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", &"a".repeat(MAX_NAME + 1)] {
            assert!(parse_name(bad.to_owned()).is_err(), "{bad}");
        }
        for (text, mb) in
            [("256MB", 256), ("1GB", 1024), ("2G", 2048), ("1024 MiB", 1024), ("268435456", 256)]
        {
            assert_eq!(memory(text, 4096).unwrap(), mb, "{text}");
        }
        for bad in ["", "255MB", "4097MB", "1.5GB", "-1GB", "GB", "1 XB", "99999999999999999999TB"]
        {
            assert!(memory(bad, 4096).is_err(), "{bad}");
        }
    }
}
