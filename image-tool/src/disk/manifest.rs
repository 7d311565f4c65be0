//! Which image of an index, and what a manifest must be to become a disk. Pure.

use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, Os};

use crate::layout::{Blob, LayoutError};

const CONFIGS: &[&str] =
    &["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// How a layer is compressed is told by its bytes; that it is one, by its type.
const LAYERS: &[&str] = &[
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];
const COMPRESSIONS: &[&str] = &["", "+gzip", "+zstd", ".gzip", ".zstd"];

/// No image that can become a disk.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A manifest.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// None for this platform, or several.
    #[error("{what} holds {count} images for linux/{architecture}; one is expected")]
    NotOne {
        /// A digest or a file.
        what: String,
        /// How many.
        count: usize,
        /// Go's name of it.
        architecture: String,
    },
    /// An artifact: a bundle, a chart, a signature.
    #[error("{what} is no container image: its configuration is of the type {media_type:?}")]
    NotAnImage {
        /// A digest.
        what: String,
        /// What it has.
        media_type: String,
    },
    /// An encrypted layer, or something else that is no file system.
    #[error("layer {number} of {what} is of the type {media_type:?}, which is no layer of files")]
    NotALayer {
        /// A digest.
        what: String,
        /// From 1.
        number: usize,
        /// What it has.
        media_type: String,
    },
}

/// The one image for this architecture. What states no platform is taken for it: an index of a single image
/// usually does not.
pub(super) fn select(
    index: &ImageIndex,
    architecture: &str,
    what: &str,
) -> Result<Blob, ManifestError> {
    let fits = |descriptor: &&Descriptor| {
        descriptor.platform().as_ref().is_none_or(|platform| {
            *platform.os() == Os::Linux && *platform.architecture() == Arch::from(architecture)
        })
    };
    let mut found: Vec<Blob> = Vec::new();
    for descriptor in index.manifests().iter().filter(fits) {
        let blob = Blob::from_descriptor(descriptor, what)?;
        // One image with two names.
        if found.iter().all(|known| known.digest != blob.digest) {
            found.push(blob);
        }
    }
    let count = found.len();
    let architecture = architecture.to_owned();
    found.pop().filter(|_| count == 1).ok_or(ManifestError::NotOne {
        what: what.to_owned(),
        count,
        architecture,
    })
}

/// Configuration and layers, the lowest first.
pub(super) fn parts(
    manifest: &ImageManifest,
    what: &str,
) -> Result<(Blob, Vec<Blob>), ManifestError> {
    let config = Blob::from_descriptor(manifest.config(), what)?;
    if !CONFIGS.contains(&config.media_type.as_str()) {
        let media_type = config.media_type;
        return Err(ManifestError::NotAnImage { what: what.to_owned(), media_type });
    }
    let mut layers = Vec::new();
    for (i, descriptor) in manifest.layers().iter().enumerate() {
        let layer = Blob::from_descriptor(descriptor, what)?;
        if !is_layer(&layer.media_type) {
            let media_type = layer.media_type;
            return Err(ManifestError::NotALayer {
                what: what.to_owned(),
                number: i + 1,
                media_type,
            });
        }
        layers.push(layer);
    }
    Ok((config, layers))
}

fn is_layer(media_type: &str) -> bool {
    let rest = LAYERS.iter().find_map(|layer| media_type.strip_prefix(layer));
    rest.is_some_and(|rest| COMPRESSIONS.contains(&rest))
}

/// Go's name of the machine that this runs on.
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn index(manifests: &[(char, Option<(&str, &str)>)]) -> ImageIndex {
        let descriptor = |(digit, platform): &(char, Option<(&str, &str)>)| {
            let digest = format!("sha256:{}", digit.to_string().repeat(64));
            let mut json = serde_json::json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1,
            });
            if let Some((os, architecture)) = platform {
                json["platform"] = serde_json::json!({ "os": os, "architecture": architecture });
            }
            json
        };
        let manifests: Vec<_> = manifests.iter().map(descriptor).collect();
        serde_json::from_value(serde_json::json!({ "schemaVersion": 2, "manifests": manifests }))
            .unwrap()
    }

    fn chosen(manifests: &[(char, Option<(&str, &str)>)]) -> Result<char, usize> {
        match select(&index(manifests), "amd64", "x") {
            Ok(blob) => Ok(blob.digest.hex().chars().next().unwrap()),
            Err(ManifestError::NotOne { count, .. }) => Err(count),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn the_image_of_the_platform_is_chosen() {
        let (amd, arm) = (Some(("linux", "amd64")), Some(("linux", "arm64")));
        let attestation = Some(("unknown", "unknown"));
        assert_eq!(chosen(&[('1', None)]), Ok('1'));
        assert_eq!(chosen(&[('1', arm), ('2', amd), ('3', attestation)]), Ok('2'));
        assert_eq!(chosen(&[('1', Some(("windows", "amd64"))), ('2', amd)]), Ok('2'));
        assert_eq!(chosen(&[('1', amd), ('1', amd)]), Ok('1'));
        assert_eq!(chosen(&[('1', arm)]), Err(0));
        assert_eq!(chosen(&[('1', None), ('2', None)]), Err(2));
        assert_eq!(chosen(&[]), Err(0));
    }

    #[test]
    fn layers_are_known_by_their_type() {
        for good in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ] {
            assert!(is_layer(good), "{good}");
        }
        for bad in [
            "",
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/vnd.oci.image.layer.v1.tarx",
            "application/vnd.kiln.builder.v1+json",
        ] {
            assert!(!is_layer(bad), "{bad}");
        }
    }
}
