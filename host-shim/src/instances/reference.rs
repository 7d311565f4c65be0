//! The image that somebody wants to run: a repository of Kiln's own registry, and what is meant in it. Pure.

use kiln_protocol::name::REGISTRY;

use crate::build::Tenant;
use crate::gateway::path::{Name, Reference, is_tag};
use crate::staging::Digest;

/// What is meant when only a repository is named.
const DEFAULT_TAG: &str = "latest";

/// Longest text that is looked at: a host, a name of 255 bytes, a tag and a digest fit twice.
const MAX_TEXT: usize = 1024;

/// An image of Kiln's registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its repository.
    pub name: Name,
    /// Its tag or digest.
    pub reference: Reference,
}

/// A text that names no image of Kiln's registry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadImage {
    /// It is another registry's.
    #[error("{host:?} is not this server's registry, which is {own}; push the image there first")]
    Host {
        /// The other one.
        host: String,
        /// Ours.
        own: String,
    },
    /// It is no reference.
    #[error(
        "it must be REPOSITORY[:TAG] or REPOSITORY@sha256:DIGEST, with {own}/ before it or without"
    )]
    Form {
        /// Our registry.
        own: String,
    },
}

impl Image {
    /// Reads `[HOST/]REPOSITORY[:TAG|@DIGEST]`. `own` is this server's registry as clients reach it. A repository
    /// without a slash is the tenant's, as in `kiln build -t`.
    pub fn parse(text: &str, own: &str, tenant: &Tenant) -> Result<Self, BadImage> {
        let form = || BadImage::Form { own: own.to_owned() };
        if text.len() > MAX_TEXT {
            return Err(form());
        }
        let rest = match text.split_once('/') {
            Some((host, rest)) if is_host(host) => {
                if !is_own(host, own) {
                    return Err(BadImage::Host { host: host.to_owned(), own: own.to_owned() });
                }
                rest
            }
            _ => text,
        };
        let (repository, reference) = if let Some((name, digest)) = rest.split_once('@') {
            // With both, the digest counts.
            let name = match without_tag(name) {
                Some((name, tag)) if is_tag(tag) => name,
                Some(_) => return Err(form()),
                None => name,
            };
            (name, Reference::Digest(Digest::parse(digest).map_err(|_| form())?))
        } else {
            let (name, tag) = without_tag(rest).unwrap_or((rest, DEFAULT_TAG));
            if !is_tag(tag) {
                return Err(form());
            }
            (name, Reference::Tag(tag.to_owned()))
        };
        let name = if repository.contains('/') {
            Name::parse(repository)
        } else {
            Name::parse(&format!("{tenant}/{repository}"))
        };
        Ok(Self { name: name.ok_or_else(form)?, reference })
    }
}

/// `NAME:TAG` in two.
fn without_tag(text: &str) -> Option<(&str, &str)> {
    text.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'))
}

/// Whether the first part of a reference is a host, by the rule of all container tools.
fn is_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':'])
}

/// `registry.kiln` is what builds call the same registry.
fn is_own(host: &str, own: &str) -> bool {
    let local = |host: &str| host.replace("localhost", "127.0.0.1");
    host == REGISTRY || host == own || local(host) == local(own)
}

impl std::fmt::Display for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let between = match self.reference {
            Reference::Tag(_) => ':',
            Reference::Digest(_) => '@',
        };
        write!(f, "{}{between}{}", self.name, self.reference)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: &str = "127.0.0.1:4973";

    fn parse(text: &str) -> Result<String, BadImage> {
        Image::parse(text, OWN, &Tenant::new("dev").unwrap()).map(|image| image.to_string())
    }

    #[test]
    fn every_form_is_read() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, expected) in [
            ("app", "dev/app:latest".to_owned()),
            ("app:1", "dev/app:1".into()),
            ("dev/app", "dev/app:latest".into()),
            ("base/debian:trixie", "base/debian:trixie".into()),
            ("builds/b1", "builds/b1:latest".into()),
            ("registry.kiln/base/debian:trixie", "base/debian:trixie".into()),
            ("127.0.0.1:4973/dev/app:1", "dev/app:1".into()),
            ("localhost:4973/dev/app", "dev/app:latest".into()),
            (&format!("{OWN}/dev/app@{digest}"), format!("dev/app@{digest}")),
            (&format!("dev/app:1@{digest}"), format!("dev/app@{digest}")),
            (&format!("app@{digest}"), format!("dev/app@{digest}")),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn another_registry_is_refused_by_name() {
        for host in ["docker.io", "ghcr.io", "127.0.0.1:5000", "localhost", "registry.kiln:80"] {
            let refused = parse(&format!("{host}/dev/app")).unwrap_err();
            assert_eq!(refused, BadImage::Host { host: host.into(), own: OWN.into() });
        }
    }

    #[test]
    fn a_text_has_a_bound() {
        let host = |n: usize| format!("{}.example/a", "h".repeat(n - ".example/a".len()));
        assert!(matches!(parse(&host(MAX_TEXT)), Err(BadImage::Host { .. })));
        assert!(matches!(parse(&host(MAX_TEXT + 1)), Err(BadImage::Form { .. })));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for text in ["", "/", "App", "dev//app", "dev/app:", "dev/app:a b", "dev/app@sha256:1", "-"]
        {
            assert!(matches!(parse(text), Err(BadImage::Form { .. })), "{text}");
        }
        // A digest makes no bad tag good.
        let text = format!("app:@sha256:{}", "a".repeat(64));
        assert!(matches!(parse(&text), Err(BadImage::Form { .. })));
    }

    proptest! {
        #[test]
        fn nothing_panics_and_what_is_read_is_written_alike(text in "[a-z0-9./:@-]{0,60}") {
            if let Ok(written) = parse(&text) {
                prop_assert_eq!(parse(&written), Ok(written.clone()));
            }
        }
    }
}
