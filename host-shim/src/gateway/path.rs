//! Paths of the distribution API, parsed by its grammar (spec v1.1, "Pulling manifests" and
//! "Endpoints"). Pure.
//!
//! What does not parse goes nowhere; what does is written anew by [`Route::to_path`], so that no two
//! parties can read one path in two ways. Nothing is percent-decoded: no valid path needs it.

use serde::{Deserialize, Serialize};

use crate::staging::Digest;

/// Longest name of a repository: what docker-registry takes.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest tag (spec).
const MAX_TAG_BYTES: usize = 128;
/// Longest id of an upload. docker-registry's have 36 bytes, other registries' more.
const MAX_SESSION_BYTES: usize = 1024;

/// The name of a repository, by the spec's grammar: lower-case components between slashes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A manifest is named by tag or by digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
    Tag(String),
    /// Of the manifest.
    Digest(Digest),
}

/// A path of the distribution API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v2/`
    Base,
    /// `/v2/_catalog`
    Catalog,
    /// `/v2/NAME/tags/list`
    Tags(Name),
    /// `/v2/NAME/manifests/REFERENCE`
    Manifest(Name, Reference),
    /// `/v2/NAME/blobs/DIGEST`
    Blob(Name, Digest),
    /// `/v2/NAME/blobs/uploads/`
    Uploads(Name),
    /// `/v2/NAME/blobs/uploads/ID`
    Upload(Name, String),
    /// `/v2/NAME/referrers/DIGEST`
    Referrers(Name, Digest),
    /// Where a registry takes an upload to the repository, if that has none of these forms. Never parsed: only the registry says it.
    Elsewhere(Name, String),
}

/// Why a path is none of the distribution API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// Nothing of the API has this form.
    #[error("there is no such path in the distribution API")]
    Unknown,
    /// The repository's name breaks the grammar.
    #[error("the name of the repository is invalid")]
    Name,
    /// The tag breaks the grammar.
    #[error("the tag is invalid")]
    Tag,
    /// The digest is not `sha256:…`.
    #[error("the digest is invalid; Kiln takes sha256 only")]
    Digest,
}

impl Route {
    /// Parses a path as it stood in the request line, without its query.
    pub fn parse(path: &str) -> Result<Self, BadPath> {
        let rest = match path {
            "/v2" | "/v2/" => return Ok(Self::Base),
            "/v2/_catalog" => return Ok(Self::Catalog),
            _ => path.strip_prefix("/v2/").ok_or(BadPath::Unknown)?,
        };
        let (head, last) = rest.rsplit_once('/').ok_or(BadPath::Unknown)?;
        let (head, kind) = head.rsplit_once('/').ok_or(BadPath::Unknown)?;
        let name = |text| Name::parse(text).ok_or(BadPath::Name);
        match (kind, last) {
            ("tags", "list") => Ok(Self::Tags(name(head)?)),
            ("manifests", reference) => {
                let name = name(head)?;
                Ok(Self::Manifest(name, Reference::parse(reference)?))
            }
            ("blobs", "uploads") => Ok(Self::Uploads(name(head)?)),
            ("blobs", digest) => {
                let name = name(head)?;
                Ok(Self::Blob(name, Digest::parse(digest).map_err(|_| BadPath::Digest)?))
            }
            ("uploads", session) => {
                let head = head.strip_suffix("/blobs").ok_or(BadPath::Unknown)?;
                let name = name(head)?;
                if session.is_empty() {
                    Ok(Self::Uploads(name))
                } else if is_session(session) {
                    Ok(Self::Upload(name, session.to_owned()))
                } else {
                    Err(BadPath::Unknown)
                }
            }
            ("referrers", digest) => {
                let name = name(head)?;
                Ok(Self::Referrers(name, Digest::parse(digest).map_err(|_| BadPath::Digest)?))
            }
            _ => Err(BadPath::Unknown),
        }
    }

    /// The path of this route.
    pub fn to_path(&self) -> String {
        match self {
            Self::Base => "/v2/".into(),
            Self::Catalog => "/v2/_catalog".into(),
            Self::Tags(name) => format!("/v2/{name}/tags/list"),
            Self::Manifest(name, reference) => format!("/v2/{name}/manifests/{reference}"),
            Self::Blob(name, digest) => format!("/v2/{name}/blobs/{digest}"),
            Self::Uploads(name) => format!("/v2/{name}/blobs/uploads/"),
            Self::Upload(name, id) => format!("/v2/{name}/blobs/uploads/{id}"),
            Self::Referrers(name, digest) => format!("/v2/{name}/referrers/{digest}"),
            Self::Elsewhere(_, path) => path.clone(),
        }
    }

    /// The repository, where the path has one.
    pub fn name(&self) -> Option<&Name> {
        match self {
            Self::Base | Self::Catalog => None,
            Self::Tags(name)
            | Self::Manifest(name, _)
            | Self::Blob(name, _)
            | Self::Uploads(name)
            | Self::Upload(name, _)
            | Self::Referrers(name, _)
            | Self::Elsewhere(name, _) => Some(name),
        }
    }

    /// The same of another repository, where it has one.
    #[must_use]
    pub fn with_name(self, other: Name) -> Self {
        match self {
            Self::Base | Self::Catalog => self,
            Self::Tags(_) => Self::Tags(other),
            Self::Manifest(_, reference) => Self::Manifest(other, reference),
            Self::Blob(_, digest) => Self::Blob(other, digest),
            Self::Uploads(_) => Self::Uploads(other),
            Self::Upload(_, id) => Self::Upload(other, id),
            Self::Referrers(_, digest) => Self::Referrers(other, digest),
            Self::Elsewhere(_, path) => Self::Elsewhere(other, path),
        }
    }
}

impl Name {
    /// The name that the text writes, if it is one.
    pub fn parse(text: &str) -> Option<Self> {
        let fits = !text.is_empty()
            && text.len() <= MAX_NAME_BYTES
            && text.split('/').all(|component| is_component(component.as_bytes()));
        fits.then(|| Self(text.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands before the first slash, and what follows it.
    pub fn split_first(&self) -> (&str, Option<&str>) {
        match self.0.split_once('/') {
            Some((first, rest)) => (first, Some(rest)),
            None => (&self.0, None),
        }
    }
}

impl TryFrom<String> for Name {
    type Error = BadPath;
    fn try_from(text: String) -> Result<Self, BadPath> {
        Self::parse(&text).ok_or(BadPath::Name)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Reference {
    fn parse(text: &str) -> Result<Self, BadPath> {
        if text.contains(':') {
            Digest::parse(text).map(Self::Digest).map_err(|_| BadPath::Digest)
        } else if is_tag(text) {
            Ok(Self::Tag(text.to_owned()))
        } else {
            Err(BadPath::Tag)
        }
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// Whether the text is a tag by the spec's grammar.
pub fn is_tag(text: &str) -> bool {
    let bytes = text.as_bytes();
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=MAX_TAG_BYTES).contains(&bytes.len())
        && word(bytes[0])
        && bytes.iter().all(|&b| word(b) || b == b'.' || b == b'-')
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(bytes: &[u8]) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut rest = bytes;
    loop {
        let run = rest.iter().take_while(|b| alphanumeric(b)).count();
        if run == 0 {
            return false;
        }
        rest = &rest[run..];
        if rest.is_empty() {
            return true;
        }
        let separator = rest.iter().take_while(|b| !alphanumeric(b)).count();
        match &rest[..separator] {
            b"." | b"_" | b"__" => {}
            dashes if dashes.iter().all(|b| *b == b'-') => {}
            _ => return false,
        }
        rest = &rest[separator..];
    }
}

/// docker-registry's own grammar for the ids of uploads.
fn is_session(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'=');
    text.len() <= MAX_SESSION_BYTES && text.bytes().all(plain) && text != "." && text != ".."
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest() -> String {
        format!("sha256:{}", "a".repeat(64))
    }

    #[test]
    fn every_route_is_read_and_written_alike() {
        let d = digest();
        for path in [
            "/v2/".to_owned(),
            "/v2/_catalog".into(),
            "/v2/a/tags/list".into(),
            "/v2/a/b-c/d__e/manifests/V1.0_x-y".into(),
            format!("/v2/base/debian/manifests/{d}"),
            format!("/v2/base/debian/blobs/{d}"),
            "/v2/base/debian/blobs/uploads/".into(),
            "/v2/base/debian/blobs/uploads/0b8f-1_2.3=".into(),
            format!("/v2/a/referrers/{d}"),
            // Names may hold the API's own words; the last ones decide.
            "/v2/a/manifests/b/manifests/c".into(),
            "/v2/a/blobs/uploads/tags/list".into(),
        ] {
            assert_eq!(Route::parse(&path).unwrap().to_path(), path);
        }
        assert_eq!(
            Route::parse("/v2/a/manifests/b/manifests/c").unwrap().name().unwrap().as_str(),
            "a/manifests/b"
        );
    }

    #[test]
    fn what_is_not_of_the_grammar_is_refused() {
        let d = digest();
        for (path, why) in [
            ("/", BadPath::Unknown),
            ("/v2/token", BadPath::Unknown),
            ("/v2//", BadPath::Unknown),
            ("/v2/a/tags/other", BadPath::Unknown),
            ("/v2/../v2/a/tags/list", BadPath::Name),
            ("/v2/a/../b/tags/list", BadPath::Name),
            ("/v2/a//b/tags/list", BadPath::Name),
            ("/v2//tags/list", BadPath::Name),
            ("/v2/A/tags/list", BadPath::Name),
            ("/v2/a%2fb/tags/list", BadPath::Name),
            ("/v2/a/manifests/%2e%2e", BadPath::Tag),
            ("/v2/a/manifests/", BadPath::Tag),
            ("/v2/a/manifests/.hidden", BadPath::Tag),
            ("/v2/a/manifests/sha256:abc", BadPath::Digest),
            ("/v2/a/blobs/latest", BadPath::Digest),
            ("/v2/a/blobs/uploads/a%20b", BadPath::Unknown),
            ("/v2/a/blobs/uploads/..", BadPath::Unknown),
            ("/v2/a/uploads/x", BadPath::Unknown),
            ("/v2/blobs/uploads/x", BadPath::Unknown),
            ("/v2/a/blobs/uploads/x/y", BadPath::Unknown),
        ] {
            assert_eq!(Route::parse(path), Err(why), "{path}");
        }
        assert_eq!(
            Route::parse(&format!("/v2/a/blobs/{}", d.to_uppercase())),
            Err(BadPath::Digest)
        );
    }

    #[test]
    fn bounds_hold_at_and_break_above() {
        assert!(Name::parse(&"a".repeat(MAX_NAME_BYTES)).is_some());
        assert!(Name::parse(&"a".repeat(MAX_NAME_BYTES + 1)).is_none());
        assert!(is_tag(&"a".repeat(MAX_TAG_BYTES)));
        assert!(!is_tag(&"a".repeat(MAX_TAG_BYTES + 1)));
        assert!(is_session(&"a".repeat(MAX_SESSION_BYTES)));
        assert!(!is_session(&"a".repeat(MAX_SESSION_BYTES + 1)));
    }

    #[test]
    fn names_follow_the_spec() {
        for good in ["a", "0", "a.b", "a_b", "a__b", "a-b", "a---b", "a/b/c", "a0-1.2_3"] {
            assert!(Name::parse(good).is_some(), "{good}");
        }
        for bad in
            ["", "/", "a/", "/a", "-a", "a-", "a..b", "a___b", "a._b", "a.-b", "ä", "a b", "a\0"]
        {
            assert!(Name::parse(bad).is_none(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_writing_is_its_inverse(path in "/v2/[a-z0-9/._%:-]{0,80}") {
            if let Ok(route) = Route::parse(&path) {
                prop_assert_eq!(Route::parse(&route.to_path()).unwrap(), route);
                prop_assert!(!path.contains('%'));
            }
        }
    }
}
