//! Whether an image is built on the base that its build asks for, by what the host sees itself: the layers of the
//! base, unpacked, are the image's first. (Their compression may differ: the engine packs a base's layers anew where
//! the image's format lacks the base's.)
//!
//! The image's list of layers is the guest's. One that lies in it is no image that anything can run: whoever unpacks
//! a layer compares.

use std::sync::Arc;

use kiln_protocol::name::REGISTRY;
use oci_spec::image::ImageManifest;
use serde::Deserialize;
use tokio::io::AsyncReadExt as _;

use crate::build::Pulled;
use crate::gateway::Backing;
use crate::gateway::guests::GuestContext;
use crate::gateway::path::{Name, Reference};
use crate::gateway::upstream::{Place, UpstreamError, Upstreams};
use crate::instances::pull::{self, INDEX_TYPES, PullError, RootFs};
use crate::instances::reference::Image;
use crate::publish::parse_manifest;
use crate::staging::{Digest, StagingError};

/// Largest config that is read.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Why it cannot be told.
#[derive(Debug, thiserror::Error)]
pub(super) enum BaseError {
    /// The base cannot be read.
    #[error("the base cannot be looked at")]
    Base(#[from] PullError),
    /// The same, where it is of another registry.
    #[error("the base cannot be looked at")]
    Upstream(#[from] Arc<UpstreamError>),
    /// It is no image.
    #[error("the base is no image: {0}")]
    NoImage(String),
    /// What the guest pushed cannot be read.
    #[error("the pushed image cannot be looked at")]
    Staging(#[from] StagingError),
    /// The disk failed.
    #[error("the pushed image's config cannot be read")]
    Io(#[from] std::io::Error),
}

#[derive(Default, Deserialize)]
struct Config {
    #[serde(default)]
    rootfs: RootFs,
}

/// Whether the staged image `digest` has the layers of the image `pin` as its first. One that the build has not
/// pulled, and what is no image, is nothing that could be built on.
pub(super) async fn is_built_on(
    context: &GuestContext,
    backing: &Backing,
    pulled: &[Pulled],
    pin: &str,
    digest: &str,
) -> Result<bool, BaseError> {
    let base = match image(context.upstreams(), pulled, pin) {
        Some(Base::Own(image)) => pull::resolve(backing, &image).await?.diff_ids,
        Some(Base::Elsewhere(place, digest)) => {
            layers_elsewhere(context.upstreams(), &place, digest).await?
        }
        None => return Ok(false),
    };
    let Some(own) = staged_layers(context, digest).await? else { return Ok(false) };
    Ok(own.starts_with(&base))
}

/// Where a base is.
enum Base {
    Own(Image),
    Elsewhere(Place, Digest),
}

/// The image that was pulled with this digest.
fn image(upstreams: &Upstreams, pulled: &[Pulled], pin: &str) -> Option<Base> {
    let found = pulled.iter().find(|pulled| pulled.digest == pin)?;
    let (registry, path) = found.reference.split_once('/')?;
    let name =
        path.split_once('@').or_else(|| path.rsplit_once(':')).map_or(path, |(name, _)| name);
    let digest = Digest::parse(pin).ok()?;
    if registry != REGISTRY {
        return Some(Base::Elsewhere(upstreams.named(&format!("{registry}/{name}"))?, digest));
    }
    Some(Base::Own(Image { name: Name::parse(name)?, reference: Reference::Digest(digest) }))
}

/// The layers of another registry's image, unpacked. The build has just pulled it, so most of the time nothing is
/// fetched.
async fn layers_elsewhere(
    upstreams: &Upstreams,
    place: &Place,
    digest: Digest,
) -> Result<Vec<String>, BaseError> {
    let manifest = |digest| async move {
        let manifest = upstreams.manifest(place, &Reference::Digest(digest)).await;
        manifest.map_err(Arc::new)
    };
    let no_image = |error: &dyn std::fmt::Display| BaseError::NoImage(error.to_string());
    let mut found = manifest(digest).await?;
    if INDEX_TYPES.contains(&found.media_type.as_str()) {
        let listed = pull::listed(&found.bytes).map_err(BaseError::NoImage)?;
        found = manifest(listed).await?;
    }
    let parsed = parse_manifest(&found.media_type, &found.bytes).map_err(|e| no_image(&e))?;
    let config = Digest::parse(parsed.config().digest().as_ref()).map_err(|e| no_image(&e))?;
    let limit = usize::try_from(MAX_CONFIG_BYTES).unwrap_or(usize::MAX);
    let bytes = upstreams.small_blob(place, config, limit).await?;
    let config: Config = serde_json::from_slice(&bytes).map_err(|e| no_image(&e))?;
    Ok(config.rootfs.diff_ids)
}

async fn staged_layers(
    context: &GuestContext,
    digest: &str,
) -> Result<Option<Vec<String>>, BaseError> {
    let Ok(digest) = Digest::parse(digest) else { return Ok(None) };
    let staging = context.staging();
    let Some(manifest) = staging.manifest(&digest).await? else { return Ok(None) };
    let Ok(manifest) = ImageManifest::from_reader(manifest.bytes.as_ref()) else { return Ok(None) };
    let Ok(config) = Digest::parse(manifest.config().digest().as_ref()) else { return Ok(None) };
    let Some((file, size)) = staging.open_blob(&config).await? else { return Ok(None) };
    if size > MAX_CONFIG_BYTES {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG_BYTES).read_to_end(&mut bytes).await?;
    Ok(serde_json::from_slice::<Config>(&bytes).ok().map(|config| config.rootfs.diff_ids))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use http::header;
    use serde_json::json;

    use super::*;
    use crate::build::{BuildId, Tenant};
    use crate::staging::Staging;

    #[test]
    fn the_pinned_image_is_found_under_whatever_it_was_pulled_with() {
        let digest = Digest::of(b"manifest").to_string();
        for (reference, name) in [
            ("registry.kiln/base/debian:trixie", "base/debian"),
            (&*format!("registry.kiln/dev/app@{digest}"), "dev/app"),
        ] {
            let pulled = [Pulled { reference: reference.into(), digest: digest.clone() }];
            let found = image(&upstreams(), &pulled, &digest);
            let Some(Base::Own(found)) = found else { panic!("{reference}") };
            assert_eq!(found.to_string(), format!("{name}@{digest}"));
            assert!(image(&upstreams(), &pulled, &Digest::of(b"other").to_string()).is_none());
        }
        for (reference, name) in [
            ("docker.io/library/debian:trixie", "docker.io/library/debian"),
            ("r.example:5000/a/b:1", "r.example:5000/a/b"),
            (&*format!("r.example:5000/a@{digest}"), "r.example:5000/a"),
        ] {
            let pulled = [Pulled { reference: reference.into(), digest: digest.clone() }];
            let found = image(&upstreams(), &pulled, &digest);
            let Some(Base::Elsewhere(place, _)) = found else { panic!("{reference}") };
            assert_eq!(place.image(), name);
            assert!(image(&Upstreams::none(), &pulled, &digest).is_none());
        }
    }

    fn upstreams() -> Upstreams {
        let specs = ["docker.io", "r.example:5000"].map(|spec| spec.parse().unwrap()).to_vec();
        let settings = crate::gateway::upstream::Settings { specs, ..Default::default() };
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().to_owned();
        Upstreams::open(&crate::gateway::upstream::Settings { dir, ..settings }).unwrap()
    }

    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

    /// An image of these layers: its config and its manifest.
    fn made_of(layers: &[&str]) -> (Vec<u8>, Vec<u8>) {
        let config = json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": layers}});
        let config = config.to_string().into_bytes();
        let blob = |kind: &str, digest: Digest, size: usize| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": size});
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| blob("layer.v1.tar+gzip", Digest::of(layer.as_bytes()), layer.len()))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": blob("config.v1+json", Digest::of(&config), config.len()),
            "layers": layers,
        });
        (config, manifest.to_string().into_bytes())
    }

    /// A registry that has one image, whatever it is asked for.
    async fn registry(config: Vec<u8>, manifest: Vec<u8>) -> Backing {
        let answer = move |request: axum::extract::Request| async move {
            let is_manifest = request.uri().path().contains("/manifests/");
            ([(header::CONTENT_TYPE, MANIFEST)], if is_manifest { manifest } else { config })
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = axum::Router::new().fallback(answer);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Backing::external(&url, None).unwrap()
    }

    #[tokio::test]
    async fn only_an_image_whose_first_layers_are_the_bases_is_built_on_it() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let limits = crate::staging::Limits { max_bytes: 1 << 20, max_blobs: 100 };
        let staging = Arc::new(Staging::new(dir.path(), limits).unwrap());
        let (config, manifest) = made_of(&["sha256:a", "sha256:b"]);
        let pin = Digest::of(&manifest).to_string();
        let backing = registry(config, manifest).await;
        let context = GuestContext::new(
            BuildId::new("b").unwrap(),
            Tenant::new("t").unwrap(),
            Arc::clone(&staging),
            backing.clone(),
            Upstreams::none(),
        );
        let reference = "registry.kiln/base/x:1".to_owned();
        let pulled = [Pulled { reference, digest: pin.clone() }];
        for (layers, expected) in [
            (&["sha256:a", "sha256:b", "sha256:c"][..], true),
            (&["sha256:a", "sha256:b"], true),
            (&["sha256:a"], false),
            (&["sha256:b", "sha256:a", "sha256:c"], false),
            (&["sha256:c", "sha256:a", "sha256:b"], false),
            (&[], false),
        ] {
            let (config, manifest) = made_of(layers);
            let upload = staging.begin_upload().await.unwrap();
            let body = futures_util::stream::iter([Ok::<_, std::io::Error>(config.clone().into())]);
            staging.finish(upload, None, body, Digest::of(&config)).await.unwrap();
            let digest = staging.put_manifest(None, MANIFEST, manifest.into()).await.unwrap();
            let is = is_built_on(&context, &backing, &pulled, &pin, &digest.to_string()).await;
            assert_eq!(is.unwrap(), expected, "{layers:?}");
        }
        // What nobody pushed is built on nothing.
        let nothing = Digest::of(b"nothing").to_string();
        assert!(!is_built_on(&context, &backing, &pulled, &pin, &nothing).await.unwrap());
    }
}
