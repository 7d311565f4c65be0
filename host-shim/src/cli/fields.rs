//! Values of flags: `K=V`, `NAME[:TAG]`, `24h`. Pure.

use std::collections::BTreeMap;
use std::str::FromStr;

use regex::Regex;

/// `K=V`.
pub type Pair = (String, String);

/// `K=V`, for a label.
pub fn pair(text: &str) -> Result<Pair, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("it has to be of the form KEY=VALUE".into()),
    }
}

/// `K=V`, or `K` for the environment's value; `None` where the environment has none, as with Docker.
pub fn build_arg(text: &str) -> Result<Option<Pair>, String> {
    match text.split_once('=') {
        Some(_) => pair(text).map(Some),
        None if text.is_empty() => pair(text).map(Some),
        None => match std::env::var(text) {
            Ok(value) => Ok(Some((text.into(), value))),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => {
                Err("the environment's value of it is not UTF-8".into())
            }
        },
    }
}

/// Pairs as a JSON object, of a key's values the last; `None` without any.
pub fn object<'a>(pairs: impl IntoIterator<Item = &'a Pair>) -> Option<String> {
    let object: BTreeMap<_, _> = pairs.into_iter().map(|(key, value)| (key, value)).collect();
    // Strings always serialise.
    if object.is_empty() { None } else { serde_json::to_string(&object).ok() }
}

/// The name that an image gets: `app`, `team/app:v1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageTag {
    name: String,
    tag: Option<String>,
}

/// Longest repository name of the distribution specification.
const MAX_NAME: usize = 255;
/// A repository's name, by the distribution specification.
const NAME: &str = r"^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$";
/// A tag, by the distribution specification.
const TAG: &str = r"^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$";

impl FromStr for ImageTag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is = |pattern, text: &str| Regex::new(pattern).is_ok_and(|r| r.is_match(text));
        let (name, tag) = match text.split_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (text, None),
        };
        if text.contains('@') {
            return Err("a digest cannot be chosen; give NAME[:TAG]".into());
        }
        if tag.is_some_and(|tag| tag.contains('/')) {
            return Err("give NAME[:TAG] without a registry: the server has its own".into());
        }
        if let Some(rest) = text.strip_prefix("registry.kiln/") {
            return Err(format!(
                "give NAME[:TAG] below your tenant, without registry.kiln and the tenant: {rest:?} without its first part"
            ));
        }
        if !is(NAME, name) || name.len() > MAX_NAME {
            return Err(
                "a name is of a-z, 0-9 and separators . _ - between them, parts by /".into()
            );
        }
        if tag.is_some_and(|tag| !is(TAG, tag)) {
            return Err(
                "a tag is 1 to 128 of letters, digits, _ . -, not starting with . or -".into()
            );
        }
        Ok(Self { name: name.into(), tag: tag.map(Into::into) })
    }
}

impl std::fmt::Display for ImageTag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        self.tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

/// A time to live: `90s`, `30m`, `24h`, `7d`. In seconds.
pub fn ttl(text: &str) -> Result<u64, String> {
    let wrong = || "it has to be a number with s, m, h or d, such as 24h".to_owned();
    let (at, unit) = text.char_indices().last().ok_or_else(wrong)?;
    let seconds: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..at].parse().map_err(|_| wrong())?;
    number.checked_mul(seconds).filter(|ttl| *ttl > 0).ok_or_else(wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn image_names_are_those_of_the_specification() {
        for good in ["app", "app:v1.0_x-Y", "a/b/c", "a__b", "a--b:_", "a.b-c"] {
            assert_eq!(good.parse::<ImageTag>().unwrap().to_string(), good);
        }
        let long_tag = format!("a:{}", "t".repeat(129));
        let long_name = "n".repeat(256);
        let bad = [
            "",
            ":tag",
            "app:",
            "App",
            "a//b",
            "/a",
            "a/",
            "a..b",
            "a:b:c",
            "a:.b",
            "localhost:5000/a",
            "a@sha256:00",
            "-a",
            "a b",
            "../a",
            "registry.kiln/dev/app:1",
            &long_tag,
            &long_name,
        ];
        for bad in bad {
            assert!(bad.parse::<ImageTag>().is_err(), "{bad:?}");
        }
        assert!("n".repeat(255).parse::<ImageTag>().is_ok());
        assert!(format!("a:{}", "t".repeat(128)).parse::<ImageTag>().is_ok());
    }

    #[test]
    fn pairs_split_at_the_first_sign() {
        assert_eq!(pair("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(pair("a="), Ok(("a".into(), String::new())));
        assert!(pair("=b").is_err() && pair("a").is_err() && pair("").is_err());
    }

    #[test]
    fn a_build_argument_may_come_from_the_environment() {
        assert_eq!(build_arg("KILN_TEST_HAS_NO_SUCH_VARIABLE"), Ok(None));
        let path = std::env::var("PATH").unwrap();
        assert_eq!(build_arg("PATH"), Ok(Some(("PATH".into(), path))));
        assert!(build_arg("").is_err() && build_arg("=x").is_err());
    }

    #[test]
    fn the_last_value_of_a_key_counts() {
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        let (a, b, c) = (pair("k", "1"), pair("j", "\"\n"), pair("k", "2"));
        assert_eq!(object([&a, &b, &c]).unwrap(), r#"{"j":"\"\n","k":"2"}"#);
        assert_eq!(object([]), None);
    }

    #[test]
    fn times_to_live_have_a_unit() {
        let good = [("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604_800)];
        for (text, seconds) in good {
            assert_eq!(ttl(text), Ok(seconds), "{text}");
        }
        for bad in ["", "h", "24", "0h", "-1h", "1.5h", "1y", "99999999999999999999d", "1é"] {
            assert!(ttl(bad).is_err(), "{bad:?}");
        }
    }
}
