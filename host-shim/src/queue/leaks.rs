//! The gate before a publication: an image that holds a secret of its build is not published.

use std::sync::Arc;

use crate::build::{Failure, FailureKind};
use crate::gateway::guests::GuestContext;
use crate::publish::Checked;
use crate::secrets::Masker;
use crate::secrets::leak::{self, Leak, LeakError};

/// Why the checked image is not to be published; `None` when nothing was found. A layer may unpack to `limit` bytes.
pub(super) async fn failure(
    context: &Arc<GuestContext>,
    checked: &Checked,
    masker: Masker,
    limit: u64,
) -> Option<Failure> {
    if masker.is_empty() {
        return None;
    }
    let (context, checked) = (Arc::clone(context), checked.clone());
    let searched = tokio::task::spawn_blocking(move || search(&context, &checked, &masker, limit));
    searched.await.unwrap_or_else(|error| {
        let message = format!("the search for secrets in the image broke down: {error}");
        Some(Failure::new(FailureKind::Internal, message))
    })
}

fn search(
    context: &GuestContext,
    checked: &Checked,
    masker: &Masker,
    limit: u64,
) -> Option<Failure> {
    if let Some(found) = leak::in_json(masker, checked.manifest.as_bytes()) {
        return Some(leaked(masker, &found, "the manifest"));
    }
    for blob in checked.blobs.iter().filter(|blob| blob.staged) {
        let path = context.staging().blob_path(&blob.digest);
        let what = format!("the layer or configuration {}", blob.digest);
        let unreadable = |why: String| {
            let message = format!("{what} cannot be searched for secrets: {why}");
            Some(Failure::new(FailureKind::PushFailed, message))
        };
        let opened = std::fs::File::open(&path);
        match opened.map_err(LeakError::from).and_then(|file| one(masker, file, &path, limit)) {
            Ok(None) => {}
            Ok(Some(found)) => return Some(leaked(masker, &found, &what)),
            Err(error) => return unreadable(crate::causes::chain(&error)),
        }
    }
    None
}

fn one(
    masker: &Masker,
    file: std::fs::File,
    path: &std::path::Path,
    limit: u64,
) -> Result<Option<Leak>, LeakError> {
    // A configuration is small and is text; a layer's bytes are searched as they are all the same.
    if let Some(found) = leak::in_layer(masker, file, limit)? {
        return Ok(Some(found));
    }
    if std::fs::metadata(path)?.len() > MAX_CONFIG_BYTES {
        return Ok(None);
    }
    let bytes = std::fs::read(path)?;
    Ok(if bytes.starts_with(b"{") { leak::in_json(masker, &bytes) } else { None })
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
