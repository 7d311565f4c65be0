//! A layout becomes a disk. The one place that knows how.

use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It was given up.
    #[error("the disk was given up")]
    Cancelled,
    /// TEMPORARY
    #[error("the image's disk cannot be made: {0}")]
    Failed(String),
}

/// Makes an ext4 disk of the image in a layout.
pub async fn make(
    layout: PathBuf,
    disk: PathBuf,
    cancel: CancellationToken,
) -> Result<(), DiskError> {
    let made = tokio::task::spawn_blocking(move || temporary(&layout, &disk));
    tokio::select! {
        made = made => made.map_err(|e| DiskError::Failed(e.to_string()))?,
        () = cancel.cancelled() => Err(DiskError::Cancelled),
    }
}

fn temporary(layout: &Path, disk: &Path) -> Result<(), DiskError> {
    let script = r#"set -e
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
ref=$(jq -r '.manifests[0].digest' "$1/index.json")
m="$1/blobs/sha256/${ref#sha256:}"
mkdir "$d/root"
for l in $(jq -r '.layers[].digest' "$m"); do tar -xf "$1/blobs/sha256/${l#sha256:}" -C "$d/root" --numeric-owner; done
truncate -s 2G "$2"
mke2fs -q -F -t ext4 -O ^has_journal -d "$d/root" "$2"
"#;
    let out = std::process::Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(layout)
        .arg(disk)
        .output()
        .map_err(|e| DiskError::Failed(e.to_string()))?;
    if out.status.success() {
        Ok(())
    } else {
        Err(DiskError::Failed(String::from_utf8_lossy(&out.stderr).into_owned()))
    }
}
