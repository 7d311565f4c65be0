//! What a copy's query asks for. Pure.

use kiln_protocol::exec::{Copy, Open, Place};
use url::form_urlencoded;

use crate::api::error::{ApiError, shown};

/// Takes the query apart: `path`, and `vm` or `with_secrets`.
pub(super) fn parse(query: Option<&str>) -> Result<Copy, ApiError> {
    let refused = |message: String| ApiError::bad_request("invalid_query", message);
    let (mut path, mut vm, mut secrets) = (None, None, None);
    for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        let fresh = match &*name {
            "path" => path.replace(value.into_owned()).is_none(),
            "vm" => vm.replace(flag(&name, &value)?).is_none(),
            "with_secrets" => secrets.replace(flag(&name, &value)?).is_none(),
            _ => {
                let message = format!("{} is no parameter of a copy", shown(&name));
                return Err(refused(message));
            }
        };
        if !fresh {
            return Err(refused(format!("{name} is there twice")));
        }
    }
    let path = path.filter(|path| !path.is_empty() && !path.contains('\0'));
    let path = path.ok_or_else(|| refused("path is needed: what to copy, or where to".into()))?;
    let place = match (vm.unwrap_or(false), secrets.unwrap_or(false)) {
        (true, true) => {
            return Err(refused("vm and with_secrets exclude each other".into()));
        }
        (true, false) => Place::Vm,
        (false, secrets) => Place::Job { secrets },
    };
    let open = Open::CopyOut(Copy { place, path });
    open.check().map_err(|error| refused(error.to_string()))?;
    match open {
        Open::CopyOut(copy) | Open::CopyIn(copy) => Ok(copy),
        Open::Exec(_) => Err(refused("this is no copy".into())),
    }
}

fn flag(name: &str, value: &str) -> Result<bool, ApiError> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => {
            let message = format!("{name} is {}; it must be true or false", shown(value));
            Err(ApiError::bad_request("invalid_query", message))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::run::MAX_DIRECTORY;

    use super::*;

    #[test]
    fn a_query_is_a_path_and_a_place() {
        let copy = |query| parse(Some(query)).unwrap();
        let job = |secrets, path: &str| Copy { place: Place::Job { secrets }, path: path.into() };
        assert_eq!(copy("path=%2Fa+b"), job(false, "/a b"));
        assert_eq!(copy("path=a&with_secrets=true"), job(true, "a"));
        assert_eq!(copy("vm=true&path=a").place, Place::Vm);
        assert_eq!(copy("vm=false&path=a"), job(false, "a"));
        assert!(parse(Some(&format!("path={}", "x".repeat(MAX_DIRECTORY)))).is_ok());
    }

    #[test]
    fn a_query_without_sense_is_refused() {
        let long = format!("path={}", "x".repeat(MAX_DIRECTORY + 1));
        for query in [
            "",
            "path=",
            "path=%00",
            "path=a&path=b",
            "path=a&vm=1",
            "path=a&x=1",
            "path=a&vm=true&with_secrets=true",
            &long,
        ] {
            assert_eq!(parse(Some(query)).unwrap_err().code(), "invalid_query", "{query}");
        }
        assert!(parse(None).is_err());
    }
}
