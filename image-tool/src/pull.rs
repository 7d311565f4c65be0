//! Gets a builder bundle from a registry: everything is checked before it is in its place.

use std::path::Path;

use oci_client::{Reference, RegistryOperation};

use crate::bundle::{self, Bundle, BundleError};
use crate::file::FileError;
use crate::place::{Place, PlaceError};
use crate::registry::{Options, Registry};
use crate::verify::VerifyError;

/// The bundle was not pulled; an older one is untouched.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// What the registry has.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The place of the result.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Another kind of image.
    #[error("{0} is not a builder bundle")]
    NotABundle(String),
}

impl From<BundleError> for PullError {
    fn from(error: BundleError) -> Self {
        Self::Verify(error.into())
    }
}

impl From<FileError> for PullError {
    fn from(error: FileError) -> Self {
        Self::Place(error.into())
    }
}

/// Pulls the bundle `reference` into `dir`. When `dir` has that very bundle, nothing is loaded.
pub async fn pull_bundle(
    reference: &Reference,
    options: &Options,
    dir: &Path,
) -> Result<Bundle, PullError> {
    let registry = Registry::connect(reference, options, RegistryOperation::Pull)
        .await
        .map_err(VerifyError::from)?;
    let image = registry.inspect().await?;
    let manifest = image.bundle()?.ok_or_else(|| PullError::NotABundle(reference.whole()))?;
    manifest.check_protocol()?;
    let place = Place::prepare(dir)?;
    if let Ok(bundle) = Bundle::open(dir)
        && bundle.digest == image.digest
        && bundle.verify().is_ok()
    {
        return Ok(bundle);
    }
    for layer in manifest.layers() {
        let path = place.dir().join(layer.title.as_deref().unwrap_or_default());
        let mut file = tokio::fs::File::create_new(&path)
            .await
            .map_err(|e| FileError::new("create", &path, e))?;
        registry.pull_blob(&layer, &mut file).await?;
    }
    let (_, oci) = &image.manifest;
    bundle::write_as_published(place.dir(), &manifest, &image.config_bytes, oci)?;
    place.commit()?;
    Ok(Bundle::open(dir)?)
}
