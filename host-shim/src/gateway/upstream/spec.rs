//! An upstream as the operator writes it: `HOST`, `HOST=URL`, or a table of the file with tenants besides.

use std::fmt;
use std::str::FromStr;

use kiln_protocol::name;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use url::Url;

use crate::build::Tenant;
use crate::gateway::path::Name;

/// Where Docker's own registry answers: not under the name that images have.
const DOCKER_HUB: &str = "https://registry-1.docker.io";
/// Under what Docker keeps the login of its own registry.
const DOCKER_HUB_LOGIN: &str = "https://index.docker.io/v1/";

/// A registry that builds may pull from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// What names of images begin with: `quay.io`.
    pub host: String,
    /// Where it is reached.
    pub url: Url,
    /// Whose builds may; everybody's otherwise.
    pub tenants: Option<Vec<Tenant>>,
}

/// A text that names no upstream. A URL is not repeated: it may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSpec {
    /// The name of the registry.
    #[error("{0:?} is no registry's name, such as quay.io or registry.example:5000, in lower case")]
    Host(String),
    /// Kiln's own.
    #[error("{0} is this server's own registry")]
    Own(String),
    /// Where it is.
    #[error(
        "the URL of {0} must be http(s)://HOST[:PORT][/PREFIX], with the login in --registry-config"
    )]
    Url(String),
    /// Whose builds may.
    #[error("the tenants of {host}: {why}")]
    Tenants {
        /// Of the registry.
        host: String,
        /// What is wrong.
        why: String,
    },
}

impl Spec {
    fn new(host: &str, url: Option<&str>, tenants: Option<Vec<String>>) -> Result<Self, BadSpec> {
        if name::upstream_repository(host).is_none() {
            return Err(BadSpec::Host(host.to_owned()));
        }
        if host == name::REGISTRY {
            return Err(BadSpec::Own(host.to_owned()));
        }
        let default = match host {
            name::DEFAULT_UPSTREAM => DOCKER_HUB.to_owned(),
            host => format!("https://{host}"),
        };
        let bad = || BadSpec::Url(host.to_owned());
        let url = Url::parse(url.unwrap_or(&default)).map_err(|_| bad())?;
        let plain = matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none();
        let spec = Self { host: host.to_owned(), url, tenants: None };
        if !plain || (spec.path() != "" && spec.prefix().is_none()) {
            return Err(bad());
        }
        let refused = |why: String| BadSpec::Tenants { host: host.to_owned(), why };
        let tenants = tenants.map(|list| {
            if list.is_empty() {
                return Err(refused("the list is empty; leave it out for all of them".into()));
            }
            let each = list.into_iter().map(Tenant::new);
            each.collect::<Result<Vec<_>, _>>().map_err(|error| refused(error.to_string()))
        });
        Ok(Self { tenants: tenants.transpose()?, ..spec })
    }

    /// What every repository's name begins with there, as with a mirror that keeps several registries apart.
    pub fn prefix(&self) -> Option<Name> {
        Name::parse(self.path())
    }

    /// Whether builds of this tenant may pull from it.
    pub fn admits(&self, tenant: &Tenant) -> bool {
        self.tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant))
    }

    /// Under what its login is kept in Docker's format: that of the place which is asked. A mirror gets no login of
    /// the registry that it stands for.
    pub(super) fn login(&self) -> String {
        let place = self.url.origin().ascii_serialization();
        if place == DOCKER_HUB {
            return DOCKER_HUB_LOGIN.to_owned();
        }
        place.split_once("://").map_or(place.clone(), |(_, authority)| authority.to_owned())
    }

    fn path(&self) -> &str {
        self.url.path().trim_matches('/')
    }
}

impl FromStr for Spec {
    type Err = BadSpec;

    fn from_str(text: &str) -> Result<Self, BadSpec> {
        let (host, url) =
            text.split_once('=').map_or((text, None), |(host, url)| (host, Some(url)));
        Self::new(host, url, None)
    }
}

/// As the file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    host: String,
    url: Option<String>,
    tenants: Option<Vec<String>>,
}

impl<'de> Deserialize<'de> for Spec {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Written)
    }
}

/// By hand, so that a wrong key is refused by its name.
struct Written;

impl<'de> Visitor<'de> for Written {
    type Value = Spec;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HOST[=URL], or a table of host, url and tenants")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Spec, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Spec, A::Error> {
        let Table { host, url, tenants } = Table::deserialize(MapAccessDeserializer::new(map))?;
        Spec::new(&host, url.as_deref(), tenants).map_err(A::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_has_a_place_a_login_and_perhaps_a_prefix() {
        for (text, url, login, prefix) in [
            ("docker.io", "https://registry-1.docker.io/", "https://index.docker.io/v1/", None),
            ("docker.io=https://mirror.example", "https://mirror.example/", "mirror.example", None),
            ("quay.io", "https://quay.io/", "quay.io", None),
            ("r.example:5000", "https://r.example:5000/", "r.example:5000", None),
            ("quay.io=http://10.0.0.1:80", "http://10.0.0.1/", "10.0.0.1", None),
            (
                "quay.io=https://m.example/quay/io/",
                "https://m.example/quay/io/",
                "m.example",
                Some("quay/io"),
            ),
        ] {
            let spec: Spec = text.parse().unwrap();
            assert_eq!((spec.url.as_str(), spec.login().as_str()), (url, login), "{text}");
            assert_eq!(spec.prefix().as_ref().map(Name::as_str), prefix, "{text}");
            assert!(spec.admits(&Tenant::new("a").unwrap()));
        }
    }

    #[test]
    fn what_names_no_upstream_is_refused_without_its_password() {
        for bad in [
            "",
            "=",
            "quay",
            "Quay.io",
            "quay.io/org",
            "registry.kiln",
            "quay.io=",
            "quay.io=x",
            "quay.io=ftp://x",
            "quay.io=https://user:hunter2@x",
            "quay.io=https://x/A",
            "quay.io=https://x/?q",
            "quay.io=https://x/a//b",
            "quay.io=https://x/#f",
            "a.b\nc=https://x",
        ] {
            let error = bad.parse::<Spec>().unwrap_err().to_string();
            assert!(!error.contains("hunter2") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_file_may_name_tenants() {
        #[derive(Deserialize)]
        struct File {
            upstream: Vec<Spec>,
        }
        let read = |text: &str| toml::from_str::<File>(text).map(|file| file.upstream);
        let text = r#"upstream = ["quay.io", {host = "docker.io", url = "https://m.example", tenants = ["a"]}]"#;
        let specs = read(text).unwrap();
        let (a, b) = (Tenant::new("a").unwrap(), Tenant::new("b").unwrap());
        assert!(specs[0].admits(&b) && specs[1].admits(&a) && !specs[1].admits(&b));
        assert_eq!(specs[1].url.as_str(), "https://m.example/");
        for (bad, named) in [
            (r#"upstream = [{host = "quay.io", tenant = ["a"]}]"#, "tenant"),
            (r#"upstream = [{host = "quay.io", tenants = []}]"#, "empty"),
            (r#"upstream = [{host = "quay.io", tenants = ["builds"]}]"#, "builds"),
            (r#"upstream = [{host = "quay"}]"#, "quay"),
            ("upstream = [1]", "HOST[=URL]"),
        ] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }
}
