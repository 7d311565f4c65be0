//! The parts `network_mode` and `allowed_domains`: together they say what steps may reach. Pure.
//!
//! | `network_mode` | `allowed_domains` | |
//! |---|---|---|
//! | absent | absent, or `[]` | the server's default |
//! | absent | entries | `allowlist` |
//! | `allowlist` | any | these; without any, nothing is reached |
//! | `none`, `open` | absent, or `[]` | |
//! | `none`, `open` | entries | refused |

use axum::http::StatusCode;
use utoipa::openapi::schema::ArrayBuilder;

use super::{ApiError, Fields};
use crate::api::openapi::schemas::matching;
use crate::build::NetworkMode;
use crate::egress::domains::{Domain, MAX_DOMAIN, MAX_DOMAINS};

const MODE: &str = "network_mode";
const DOMAINS: &str = "allowed_domains";

/// What a build may ask of the network: Kiln's words, and hypeman's.
pub(super) const MODES: [&str; 6] = ["", "none", "allowlist", "open", "isolated", "egress"];

/// The mode, and the entries of its list as they are compared.
pub(super) fn parse(
    fields: &Fields,
    default: NetworkMode,
) -> Result<(NetworkMode, Vec<String>), ApiError> {
    let domains = domains(fields)?;
    let Some(text) = fields.text(MODE) else {
        let mode = if domains.is_empty() { default } else { NetworkMode::Allowlist };
        return Ok((mode, domains));
    };
    let mode = match text {
        "none" | "isolated" => NetworkMode::None,
        "allowlist" => NetworkMode::Allowlist,
        "open" | "egress" => NetworkMode::Open,
        other => {
            let allowed = "none, allowlist or open (or hypeman's isolated or egress)";
            return Err(ApiError::invalid(MODE, other, allowed));
        }
    };
    if mode != NetworkMode::Allowlist && !domains.is_empty() {
        let message =
            format!("{MODE} {text} does not go with {DOMAINS}; send allowlist, or no domains");
        return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message));
    }
    Ok((mode, domains))
}

fn domains(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let Some(text) = fields.text(DOMAINS) else { return Ok(vec![]) };
    let list: Vec<String> = serde_json::from_str(text)
        .map_err(|_| ApiError::invalid(DOMAINS, text, "a JSON array of texts"))?;
    if list.len() > MAX_DOMAINS {
        return Err(ApiError::too_large(format!("{DOMAINS} has more than {MAX_DOMAINS} entries")));
    }
    let read = |entry: &String| match Domain::parse(entry) {
        Ok(domain) => Ok(domain.to_string()),
        Err(bad) => {
            let message = format!("{DOMAINS} has {}, which {bad}", super::shown(entry));
            Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message))
        }
    };
    list.iter().map(read).collect()
}

/// As [`Domain::parse`] has it, but for the length of a name and for addresses.
pub(super) fn schema() -> ArrayBuilder {
    let label = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?";
    let pattern = format!(r"^(?:\*\.)?{label}(?:\.{label})*\.?(?::[0-9]{{1,5}})?$");
    let entry = matching(pattern).max_length(Some(MAX_DOMAIN)).description(Some(
        "HOST, or *.HOST for the names below it; with :PORT, or ports 80 and 443. Not an address.",
    ));
    ArrayBuilder::new().items(entry).max_items(Some(MAX_DOMAINS))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(pairs: &[(&'static str, &str)]) -> Result<(NetworkMode, Vec<String>), ApiError> {
        asked_of(pairs, NetworkMode::Open)
    }

    fn asked_of(
        pairs: &[(&'static str, &str)],
        default: NetworkMode,
    ) -> Result<(NetworkMode, Vec<String>), ApiError> {
        let mut fields = Fields::default();
        for (name, text) in pairs {
            fields.insert(name, (*text).to_owned()).unwrap();
        }
        parse(&fields, default)
    }

    #[test]
    fn modes_have_kilns_and_hypemans_names() {
        for (text, mode) in [
            ("none", NetworkMode::None),
            ("isolated", NetworkMode::None),
            ("open", NetworkMode::Open),
            ("egress", NetworkMode::Open),
            ("allowlist", NetworkMode::Allowlist),
            ("", NetworkMode::Open),
        ] {
            assert_eq!(asked(&[(MODE, text)]).unwrap(), (mode, vec![]), "{text}");
        }
        assert_eq!(asked(&[(MODE, "Open")]).unwrap_err().code(), "invalid_field");
    }

    #[test]
    fn domains_alone_are_an_allow_list_and_go_with_no_other_mode() {
        let list = r#"["Example.COM.", "*.x.test:8080"]"#;
        let read = vec!["example.com".to_owned(), "*.x.test:8080".to_owned()];
        for default in [NetworkMode::None, NetworkMode::Open, NetworkMode::Allowlist] {
            let alone = asked_of(&[(DOMAINS, list)], default).unwrap();
            assert_eq!(alone, (NetworkMode::Allowlist, read.clone()));
            for nothing in ["", "[]", " [ ] "] {
                assert_eq!(asked_of(&[(DOMAINS, nothing)], default).unwrap(), (default, vec![]));
            }
        }
        let both = asked(&[(MODE, "allowlist"), (DOMAINS, list)]).unwrap();
        assert_eq!(both, (NetworkMode::Allowlist, read));
        for mode in ["none", "open", "isolated", "egress"] {
            assert_eq!(
                asked(&[(MODE, mode), (DOMAINS, list)]).unwrap_err().code(),
                "invalid_field"
            );
            assert!(asked(&[(MODE, mode), (DOMAINS, "[]")]).is_ok());
        }
    }

    #[test]
    fn lists_are_bounded_and_of_names() {
        let many = |n: usize| json!(vec!["a.test"; n]).to_string();
        assert_eq!(asked(&[(DOMAINS, &many(MAX_DOMAINS))]).unwrap().1.len(), MAX_DOMAINS);
        assert_eq!(asked(&[(DOMAINS, &many(MAX_DOMAINS + 1))]).unwrap_err().code(), "too_large");
        for bad in ["a", "{}", "[1]", "[null]", r#"["*"]"#, r#"["10.0.0.1"]"#, r#"[""]"#] {
            assert_eq!(asked(&[(DOMAINS, bad)]).unwrap_err().code(), "invalid_field", "{bad}");
        }
    }

    #[test]
    fn what_is_taken_fits_the_described_form() {
        let schema: serde_json::Value = serde_json::to_value(schema().build()).unwrap();
        let pattern = regex::Regex::new(schema["items"]["pattern"].as_str().unwrap()).unwrap();
        for taken in ["a", "*.a.test.", "_x-y.test:443", "xn--bcher-kva.example"] {
            assert!(Domain::parse(taken).is_ok() && pattern.is_match(taken), "{taken}");
        }
        for refused in ["", "*", "a..b", "-a", "a-", "a:", "a b", "[::1]"] {
            assert!(Domain::parse(refused).is_err() && !pattern.is_match(refused), "{refused}");
        }
    }
}
