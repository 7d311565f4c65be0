//! Between the names and paths of Kiln's registry and those of the registry behind it. Pure.
//!
//! - All repositories may be below one of the registry's: `--registry https://HOST/PREFIX`.
//! - An upload goes on where the registry says, which need not look like a path of the distribution API (spec v1.1, "Pushing a blob in
//!   chunks": `Location`). A client is shown such a place sealed in the id of an upload, so that it can come back with it and with no other.

use aws_lc_rs::hmac::{self, HMAC_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use url::{Url, form_urlencoded};

use super::backing::Target;
use super::path::{Name, Route};
use crate::random;

/// Begins the id of an upload that has a place in it. No registry's own id has a dot there.
const SEALED: &str = "at.";
/// Longest path and query of such a place: its id has to fit where ids are read.
const MAX_PLACE_BYTES: usize = 700;
/// Of the seal.
const TAG_BYTES: usize = 16;

/// How the registry behind Kiln has what Kiln has.
#[derive(Debug)]
pub(super) struct Mapping {
    prefix: Option<Name>,
    /// Of this process: an upload that was begun before a restart begins anew.
    key: hmac::Key,
}

impl Mapping {
    /// All repositories are below the prefix, if there is one.
    pub fn new(prefix: Option<Name>) -> Self {
        Self { prefix, key: hmac::Key::new(HMAC_SHA256, &random::bytes::<32>()) }
    }

    /// A target as the registry has it; `None` where the repository's name would be too long.
    pub fn outward(&self, target: &Target) -> Option<Target> {
        let Some(prefix) = &self.prefix else { return Some(target.clone()) };
        let below = |name: &str| Name::parse(&format!("{prefix}/{name}"));
        let route = match target.route.name() {
            Some(name) => target.route.clone().with_name(below(name.as_str())?),
            None => target.route.clone(),
        };
        let pair = |(key, value): &(String, String)| {
            let value =
                if key == "from" { below(value)?.as_str().to_owned() } else { value.clone() };
            Some((key.clone(), value))
        };
        Some(Target { route, query: target.query.iter().map(pair).collect::<Option<_>>()? })
    }

    /// A route of the registry's as Kiln has it; `None` outside of the prefix.
    pub fn inward(&self, route: Route) -> Option<Route> {
        let Some(prefix) = &self.prefix else { return Some(route) };
        let name = route.name()?.as_str().strip_prefix(prefix.as_str())?.strip_prefix('/')?;
        let name = Name::parse(name)?;
        Some(route.with_name(name))
    }

    /// Where an upload to a repository goes on, which the registry has said.
    pub fn upload(&self, name: &Name, place: &Url) -> Option<Target> {
        let own = Route::parse(place.path()).ok().and_then(|route| self.inward(route));
        let pairs = form_urlencoded::parse(place.query().unwrap_or_default().as_bytes());
        let query = pairs.into_owned().collect();
        match own {
            Some(route @ Route::Upload(..)) if route.name() == Some(name) => {
                Some(Target { route, query })
            }
            _ => {
                let route = Route::Elsewhere(name.clone(), place.path().to_owned());
                let target = Target { route, query };
                (target.to_path_and_query().len() <= MAX_PLACE_BYTES).then_some(target)
            }
        }
    }

    /// A target as a client is shown it.
    pub fn shown(&self, target: &Target) -> String {
        let Route::Elsewhere(name, _) = &target.route else { return target.to_path_and_query() };
        let place = target.to_path_and_query();
        let (text, tag) = (URL_SAFE_NO_PAD.encode(&place), self.tag(name, &place));
        let id = format!("{SEALED}{text}.{}", URL_SAFE_NO_PAD.encode(tag));
        Route::Upload(name.clone(), id).to_path()
    }

    /// What a client means by a target that it was shown; `None` where it was not.
    pub fn meant(&self, target: Target) -> Option<Target> {
        let Route::Upload(name, id) = &target.route else { return Some(target) };
        let Some(sealed) = id.strip_prefix(SEALED) else { return Some(target) };
        let (text, tag) = sealed.split_once('.')?;
        let place = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let tag = URL_SAFE_NO_PAD.decode(tag).ok()?;
        let is_ours: bool =
            subtle::ConstantTimeEq::ct_eq(&self.tag(name, &place)[..], &tag[..]).into();
        if !is_ours {
            return None;
        }
        let (path, query) = place.split_once('?').unwrap_or((&place, ""));
        let pairs = form_urlencoded::parse(query.as_bytes()).into_owned();
        let route = Route::Elsewhere(name.clone(), path.to_owned());
        Some(Target { route, query: pairs.chain(target.query).collect() })
    }

    /// Whether names in answers are not Kiln's.
    pub fn renames(&self) -> bool {
        self.prefix.is_some()
    }

    fn tag(&self, name: &Name, place: &str) -> [u8; TAG_BYTES] {
        let mut mac = hmac::Context::with_key(&self.key);
        // A name has no line break.
        for part in [name.as_str(), "\n", place] {
            mac.update(part.as_bytes());
        }
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&mac.sign().as_ref()[..TAG_BYTES]);
        tag
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn target(path: &str, query: &[(&str, &str)]) -> Target {
        let pair = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        Target { route: Route::parse(path).unwrap(), query: query.iter().map(pair).collect() }
    }

    #[test]
    fn a_prefix_is_before_every_repository_and_nowhere_else() {
        let mapping = Mapping::new(Some(name("acme/kiln")));
        let mount =
            target("/v2/dev/app/blobs/uploads/", &[("mount", "x"), ("from", "base/debian")]);
        assert_eq!(
            mapping.outward(&mount).unwrap().to_path_and_query(),
            "/v2/acme/kiln/dev/app/blobs/uploads/?mount=x&from=acme%2Fkiln%2Fbase%2Fdebian"
        );
        assert_eq!(mapping.outward(&target("/v2/", &[])).unwrap().to_path_and_query(), "/v2/");
        let tags = |path: &str| mapping.inward(Route::parse(path).unwrap());
        assert_eq!(
            tags("/v2/acme/kiln/dev/app/tags/list"),
            Route::parse("/v2/dev/app/tags/list").ok()
        );
        for other in
            ["/v2/acme/kilns/app/tags/list", "/v2/acme/kiln/tags/list", "/v2/dev/app/tags/list"]
        {
            assert_eq!(tags(other), None, "{other}");
        }
        let long = format!("/v2/{}/tags/list", "a".repeat(250));
        assert_eq!(mapping.outward(&target(&long, &[])), None);
    }

    #[test]
    fn an_upload_goes_on_where_the_registry_says() {
        let mapping = Mapping::new(Some(name("acme")));
        let at = |url: &str| mapping.upload(&name("dev/app"), &Url::parse(url).unwrap());
        let usual = at("https://r.example/v2/acme/dev/app/blobs/uploads/1-2?_state=s").unwrap();
        assert_eq!(usual, target("/v2/dev/app/blobs/uploads/1-2", &[("_state", "s")]));
        assert_eq!(mapping.shown(&usual), "/v2/dev/app/blobs/uploads/1-2?_state=s");
        for odd in [
            "https://r.example/artifacts-uploads/namespaces/p/uploads/AF=x",
            "https://r.example/v2/acme/dev/app/blobs/upload/1?a=b&c=d",
            // Another repository's is not this one's.
            "https://r.example/v2/acme/other/blobs/uploads/1",
        ] {
            let place = at(odd).unwrap();
            assert_eq!(mapping.outward(&place).unwrap().to_path_and_query(), odd[17..], "{odd}");
            let shown = mapping.shown(&place);
            let back = target(&shown, &[("digest", "d")]);
            let meant = mapping.meant(back).unwrap();
            assert_eq!(meant, place.with("digest", &"d"), "{odd}");
        }
        assert_eq!(at(&format!("https://r.example/{}", "x".repeat(MAX_PLACE_BYTES))), None);
    }

    #[test]
    fn nobody_makes_up_a_place() {
        let mapping = Mapping::new(None);
        let place = mapping.upload(&name("dev/app"), &Url::parse("https://r.example/u/1").unwrap());
        let shown = mapping.shown(&place.unwrap());
        assert!(mapping.meant(target(&shown, &[])).is_some());
        let other = Mapping::new(None);
        assert_eq!(other.meant(target(&shown, &[])), None, "another process's");
        let moved = shown.replace("dev/app", "dev/other");
        assert_eq!(mapping.meant(target(&moved, &[])), None, "another repository's");
        let (head, tag) = shown.rsplit_once('.').unwrap();
        let admin = URL_SAFE_NO_PAD.encode("/v2/prod/app/manifests/latest");
        let begin = head.rsplit_once("at.").unwrap().0;
        for forged in [format!("{begin}at.{admin}.{tag}"), format!("{head}."), head.to_owned()] {
            assert_eq!(mapping.meant(target(&forged, &[])), None, "{forged}");
        }
        let usual = target("/v2/dev/app/blobs/uploads/1", &[]);
        assert_eq!(mapping.meant(usual.clone()), Some(usual));
    }
}
