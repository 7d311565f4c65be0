//! From a registry: the image's layers into files without names, then a disk from them.

use std::path::Path;

use oci_client::{Reference, RegistryOperation};
use tokio_util::sync::CancellationToken;

use super::manifest::{self, ManifestError};
use super::output::Output;
use super::source::{Image, LayerBlob};
use super::window::Window;
use super::{DiskError, Made, Options, check_sizes, make_from};
use crate::layout::{Blob, Manifest};
use crate::registry::{self, Registry};
use crate::verify::{MAX_CONFIG, VerifyError};

/// Pulls the image `reference` and makes a disk of it. An index gives its image for `options.architecture`.
///
/// Layers lie in files without names beside `out` until they are unpacked; no more than the limits allow is
/// transferred. Every digest is checked. A failed transfer is tried again by the registry client's rules. Dropping the
/// future, like cancelling, ends the work and leaves nothing; the thread that works notices within milliseconds.
pub async fn pull(
    reference: &Reference,
    access: &registry::Options,
    out: &Path,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<Made, DiskError> {
    // Ours, so that it can be cancelled when this future is dropped.
    let cancel = cancel.child_token();
    let _guard = cancel.clone().drop_guard();
    let output = Output::prepare(out)?;
    let image = tokio::select! {
        image = download(reference, access, &output, options) => image?,
        () = cancel.cancelled() => return Err(DiskError::Cancelled),
    };
    let options = options.clone();
    let work = tokio::task::spawn_blocking(move || make_from(&image, output, &options, &cancel));
    match work.await {
        Ok(made) => made,
        // The runtime is being shut down, unless the thread panicked.
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(DiskError::Cancelled),
        },
    }
}

async fn download(
    reference: &Reference,
    access: &registry::Options,
    output: &Output,
    options: &Options,
) -> Result<Image, DiskError> {
    let registry = Registry::connect(reference, access, RegistryOperation::Pull)
        .await
        .map_err(VerifyError::from)?;
    let (mut digest, mut media_type, mut bytes) = registry.manifest(reference).await?;
    let what = digest.to_string();
    let parsed = Manifest::parse(&media_type, &bytes, &what).map_err(VerifyError::from)?;
    if let Manifest::Index(index) = parsed {
        let chosen = manifest::select(&index, &options.architecture, &what)?;
        (digest, media_type, bytes) = registry.manifest_blob(&chosen).await?;
    }
    let what = digest.to_string();
    let parsed = Manifest::parse(&media_type, &bytes, &what).map_err(VerifyError::from)?;
    let Manifest::Image(manifest) = parsed else {
        // An index in an index.
        return Err(VerifyError::List(what).into());
    };
    let (config, layers) = manifest::parts(&manifest, &what).map_err(|e| match e {
        ManifestError::Layout(e) => DiskError::Pull(e.into()),
        other => other.into(),
    })?;
    if config.size > MAX_CONFIG {
        let (digest, size) = (config.digest, config.size);
        return Err(VerifyError::LargeConfig { digest, size }.into());
    }
    check_sizes(layers.iter().map(|layer| layer.size), &options.limits)?;
    let mut config_bytes = Vec::new();
    registry.pull_blob(&config, &mut config_bytes).await?;
    let mut image = Image { digest, config: config_bytes, layers: Vec::new() };
    for layer in layers {
        image.layers.push(layer_blob(&registry, layer, output).await?);
    }
    Ok(image)
}

async fn layer_blob(
    registry: &Registry,
    layer: Blob,
    output: &Output,
) -> Result<LayerBlob, DiskError> {
    let file = tempfile::tempfile_in(output.dir()).map_err(DiskError::Spool)?;
    let mut file = tokio::fs::File::from_std(file);
    registry.pull_blob(&layer, &mut file).await?;
    // The last write may still be on its way.
    let flushed = tokio::io::AsyncWriteExt::flush(&mut file).await;
    let window = flushed.and(Window::of(file.into_std().await));
    let blob = window.map_err(DiskError::Spool)?;
    Ok(LayerBlob { digest: Some(layer.digest), blob })
}
