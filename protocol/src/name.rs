//! Names that both sides agree on.

/// The registry's host name inside a build; leads to the host's gateway.
pub const REGISTRY: &str = "registry.kiln";
/// The repository that a build pushes its result to. It exists only for that build.
pub const STAGING_REPOSITORY: &str = "staging/image";
/// The tag that a build pushes its result under.
pub const STAGING_TAG: &str = "result";
/// What the names of other registries' repositories begin with at the gateway.
pub const UPSTREAM_SPACE: &str = "upstream";
/// Where names of images without a registry lead, as Docker's users expect.
pub const DEFAULT_UPSTREAM: &str = "docker.io";
/// Longest name of another registry, in bytes. A repository's name of 255 bytes has room after it.
pub const MAX_UPSTREAM: usize = 96;

/// What stands for the colon before a port: no host has it, and a repository's name may.
const PORT: &str = "__";

/// Where the repositories of another registry begin at the gateway: `upstream/quay.io`, and
/// `upstream/registry.example__5000` for a registry at a port. `None` for what cannot be a registry.
///
/// The text may be anybody's. What comes out is a repository's name by the distribution spec, and different
/// registries have different ones.
pub fn upstream_repository(registry: &str) -> Option<String> {
    is_registry(registry).then(|| format!("{UPSTREAM_SPACE}/{}", registry.replacen(':', PORT, 1)))
}

/// The registry and the rest of a repository's name that follows [`UPSTREAM_SPACE`] and a slash.
pub fn upstream_of(rest: &str) -> Option<(String, &str)> {
    let (registry, repository) = rest.split_once('/')?;
    let registry = registry.replacen(PORT, ":", 1);
    is_registry(&registry).then_some((registry, repository))
}

/// `HOST[:PORT]` in lower case, where an image's name begins with it and not with a part of a repository: Docker
/// tells by a dot, a port, or the name `localhost`.
fn is_registry(text: &str) -> bool {
    let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let is_label = |label: &str| {
        let bytes = label.as_bytes();
        let ends = [bytes.first(), bytes.last()];
        ends.iter().all(|end| end.is_some_and(|b| letter(*b)))
            && bytes.iter().all(|b| letter(*b) || *b == b'-')
    };
    // No zeros before it: one registry has one name.
    let is_port = |port: &str| {
        !port.starts_with('0')
            && port.bytes().all(|b| b.is_ascii_digit())
            && port.parse::<u16>().is_ok()
    };
    text.len() <= MAX_UPSTREAM
        && host.split('.').all(is_label)
        && port.is_none_or(is_port)
        && (port.is_some() || host.contains('.') || host == "localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_have_a_repository_each_and_it_leads_back() {
        for (registry, repository) in [
            ("docker.io", "upstream/docker.io"),
            ("quay.io", "upstream/quay.io"),
            ("registry.example:5000", "upstream/registry.example__5000"),
            ("a--b.example-1", "upstream/a--b.example-1"),
            ("localhost", "upstream/localhost"),
            ("localhost:1", "upstream/localhost__1"),
            ("10.0.0.1:65535", "upstream/10.0.0.1__65535"),
        ] {
            assert_eq!(upstream_repository(registry).as_deref(), Some(repository));
            let name = format!("{repository}/org/name");
            let rest = name.strip_prefix("upstream/").unwrap();
            assert_eq!(upstream_of(rest), Some((registry.to_owned(), "org/name")));
        }
        let longest = format!("{}.io", "a".repeat(MAX_UPSTREAM - 3));
        assert!(upstream_repository(&longest).is_some());
        assert!(upstream_repository(&format!("a{longest}")).is_none());
    }

    #[test]
    fn what_is_no_registry_has_none() {
        for bad in [
            "",
            ".",
            "a",
            "A.io",
            "a..b",
            ".a.b",
            "a.b.",
            "-a.b",
            "a-.b",
            "a_b.c",
            "a__b.c:1",
            "a.b:",
            "a.b:0",
            "a.b:080",
            "a.b:+1",
            "a.b:65536",
            "a.b:1:2",
            "a.b/c",
            "a.b\"",
            "a.b\n",
            "[::1]:1",
            "é.io",
            "a.b]",
            "*.b",
        ] {
            assert_eq!(upstream_repository(bad), None, "{bad:?}");
        }
        for bad in ["", "docker.io", "library/debian", "a.b__x/c", "a.b__1__2/c", "a.b__0/c"] {
            assert_eq!(upstream_of(bad), None, "{bad:?}");
        }
    }
}
