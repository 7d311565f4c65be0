//! What a copy's query asks for. Pure.

use kiln_protocol::exec::{Copy, Open, Place};
use kiln_protocol::run::MAX_DIRECTORY;
use utoipa::openapi::Required;
use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::schema::ObjectBuilder;

use crate::api::error::ApiError;
use crate::api::openapi::params::{self, params};
use crate::api::openapi::schemas;
use crate::api::query::{self, flag, refused};

/// What a copy is asked for.
pub(super) struct Asked;

params!(Asked:
    params::parameter(ParameterIn::Query, "path", "What to copy, or where to.", path_schema()).required(Required::True).build(),
    params::query("vm", "Of the VM itself, for administrators; not together with `with_secrets`.", schemas::flag()),
    params::query("with_secrets", "With the secrets of the step.", schemas::flag()),
);

fn path_schema() -> ObjectBuilder {
    schemas::sized(1, MAX_DIRECTORY).pattern(Some(r"^[^\u0000]*$"))
}

/// Takes the query apart: `path`, and `vm` or `with_secrets`.
pub(super) fn parse(text: Option<&str>) -> Result<Copy, ApiError> {
    let (mut path, mut vm, mut secrets) = (None, None, None);
    for (name, value) in query::pairs(text)? {
        let fresh = match name.as_str() {
            "path" => path.replace(value).is_none(),
            "vm" => vm.replace(flag(&name, &value)?).is_none(),
            "with_secrets" => secrets.replace(flag(&name, &value)?).is_none(),
            _ => return Err(query::unknown(&name, "path, vm and with_secrets")),
        };
        if !fresh {
            return Err(query::twice(&name));
        }
    }
    let path = path.filter(|path| !path.is_empty() && !path.contains('\0'));
    let path = path.ok_or_else(|| refused("path is needed: what to copy, or where to"))?;
    let place = match (vm.unwrap_or(false), secrets.unwrap_or(false)) {
        (true, true) => {
            return Err(refused("vm and with_secrets exclude each other"));
        }
        (true, false) => Place::Vm,
        (false, secrets) => Place::Job { secrets },
    };
    let open = Open::CopyOut(Copy { place, path });
    open.check().map_err(|error| refused(error.to_string()))?;
    match open {
        Open::CopyOut(copy) | Open::CopyIn(copy) => Ok(copy),
        Open::Exec(_) => Err(refused("this is no copy")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
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
            "path=a&vm=true&with_secrets=true",
            &long,
        ] {
            assert_eq!(parse(Some(query)).unwrap_err().code(), "invalid_query", "{query}");
        }
        assert_eq!(parse(Some("path=a&x=1")).unwrap_err().code(), "unknown_parameter");
        assert!(parse(None).is_err());
    }
}
