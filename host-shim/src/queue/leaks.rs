//! The gate before a publication: an image that holds a secret of its build is not published.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::build::{Failure, FailureKind};
use crate::gateway::guests::GuestContext;
use crate::publish::Checked;
use crate::secrets::Masker;
use crate::secrets::leak::{self, Bounds, Gate, Leak, LeakError};
use crate::staging::Digest;

/// How long one image may be searched: its build holds a slot meanwhile. A slow machine searches some 100 MiB in a
/// second, which is more than 80 GiB.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// What came of the search.
#[derive(Debug)]
pub(super) enum Searched {
    /// Nothing was found.
    Clean,
    /// The image is not to be published.
    Refused(Failure),
    /// One of the tokens was cancelled.
    Stopped,
}

/// Searches the checked image, whose layers may unpack to `bytes` together, until one of `stops` is cancelled.
pub(super) async fn search(
    context: &GuestContext,
    checked: &Checked,
    masker: Masker,
    bytes: u64,
    stops: Vec<CancellationToken>,
) -> Searched {
    if masker.is_empty() {
        return Searched::Clean;
    }
    let bounds = Bounds::new(bytes, PATIENCE, stops);
    let staged = checked.blobs.iter().filter(|blob| blob.staged);
    let blobs = staged.map(|blob| (blob.digest, context.staging().blob_path(&blob.digest)));
    let (blobs, manifest) = (blobs.collect::<Vec<_>>(), checked.manifest.clone());
    let searched =
        tokio::task::spawn_blocking(move || in_image(&manifest, &blobs, masker, &bounds));
    searched.await.unwrap_or_else(|error| {
        let message = format!("the search for secrets in the image broke down: {error}");
        Searched::Refused(Failure::new(FailureKind::Internal, message))
    })
}

fn in_image(
    manifest: &str,
    blobs: &[(Digest, PathBuf)],
    masker: Masker,
    bounds: &Bounds,
) -> Searched {
    let gate = masker.into_gate();
    if let Some(found) = leak::in_json(&gate, manifest.as_bytes()) {
        return Searched::Refused(leaked(&gate.into_masker(), &found, "the manifest"));
    }
    for (digest, path) in blobs {
        let what = format!("the layer or configuration {digest}");
        let opened = File::open(path).map_err(LeakError::from);
        match opened.and_then(|file| one(&gate, file, path, bounds)) {
            Ok(None) => {}
            Ok(Some(found)) => {
                return Searched::Refused(leaked(&gate.into_masker(), &found, &what));
            }
            Err(LeakError::Stopped) => return Searched::Stopped,
            Err(error) => return Searched::Refused(unsearched(&error, &what)),
        }
    }
    Searched::Clean
}

fn one(gate: &Gate, file: File, path: &Path, bounds: &Bounds) -> Result<Option<Leak>, LeakError> {
    // A configuration is small and is text; a layer's bytes are searched as they are all the same.
    if let Some(found) = leak::in_layer(gate, file, bounds)? {
        return Ok(Some(found));
    }
    if std::fs::metadata(path)?.len() > MAX_CONFIG_BYTES {
        return Ok(None);
    }
    let bytes = std::fs::read(path)?;
    Ok(if bytes.starts_with(b"{") { leak::in_json(gate, &bytes) } else { None })
}

/// The failure of a build whose image could not be searched to its end.
fn unsearched(error: &LeakError, what: &str) -> Failure {
    let (kind, advice) = match error {
        LeakError::Late(_) => (FailureKind::TimedOut, "; build a smaller image"),
        LeakError::TooLarge(_) => (FailureKind::PushFailed, "; ask for a larger disk_gb"),
        _ => (FailureKind::PushFailed, ""),
    };
    let why = crate::causes::chain(error);
    let message =
        format!("{what} cannot be searched for secrets: {why}; nothing was published{advice}");
    Failure::new(kind, message)
}

/// Largest configuration.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

fn leaked(masker: &Masker, found: &Leak, what: &str) -> Failure {
    let place = found.path.as_ref().map(|path| {
        // The name may be the secret.
        let path = masker.text(path);
        format!(", file `{}`", path.chars().flat_map(char::escape_debug).collect::<String>())
    });
    let message = format!(
        "the image holds the secret \"{}\" in {what}{}; nothing was published. Use it in the step that needs it \
         and leave nothing of it behind",
        found.secret,
        place.unwrap_or_default()
    );
    Failure::new(FailureKind::SecretLeaked, message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"hunter2/canary+value";

    fn masker() -> Masker {
        let mut masker = Masker::default();
        masker.add("npm", SECRET).unwrap();
        masker
    }

    fn image(dir: &Path, blobs: &[&[u8]]) -> Vec<(Digest, PathBuf)> {
        let stored = blobs.iter().enumerate().map(|(number, blob)| {
            let path = dir.join(number.to_string());
            std::fs::write(&path, blob).unwrap();
            (Digest::of(blob), path)
        });
        stored.collect()
    }

    fn refusal(searched: Searched) -> Failure {
        match searched {
            Searched::Refused(failure) => failure,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_layers_of_an_image_share_its_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = image(dir.path(), &[&[b'a'; 600], &[b'b'; 600], &[b'c'; 600]]);
        let within = |bytes, patience, stops| {
            in_image("{}", &blobs, masker(), &Bounds::new(bytes, patience, stops))
        };
        assert!(matches!(within(1800, PATIENCE, vec![]), Searched::Clean));
        let failure = refusal(within(1799, PATIENCE, vec![]));
        assert_eq!(failure.kind, FailureKind::PushFailed);
        assert!(failure.message.contains(&blobs[2].0.to_string()), "{failure:?}");
        let failure = refusal(within(1800, Duration::ZERO, vec![]));
        assert_eq!(failure.kind, FailureKind::TimedOut, "{failure:?}");
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(matches!(within(1800, PATIENCE, vec![stop]), Searched::Stopped));
    }

    #[test]
    fn a_leak_names_its_layer() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = image(dir.path(), &[b"clean", SECRET]);
        let bounds = Bounds::new(1 << 20, PATIENCE, vec![]);
        let failure = refusal(in_image("{}", &blobs, masker(), &bounds));
        assert_eq!(failure.kind, FailureKind::SecretLeaked);
        assert!(failure.message.contains(&blobs[1].0.to_string()), "{failure:?}");
    }
}
