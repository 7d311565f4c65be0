//! The key file: 32 random bytes, made at the first start, readable by the server's user alone.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::{Vault, VaultError};

/// Its name in the data directory.
pub const KEY_FILE: &str = "secrets.key";
/// Of AES-256.
const KEY_BYTES: usize = 32;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Reading or making it failed.
    #[error("the key file {} cannot be used", path.display())]
    Io {
        /// Where it is.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// It cannot be used.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// It is not 32 bytes.
    #[error(
        "the key file {} has {found} bytes instead of {KEY_BYTES}: restore it, or remove it to make a new one, which \
         opens no secret that was stored before",
        path.display()
    )]
    Length {
        /// Where it is.
        path: PathBuf,
        /// How many it has.
        found: usize,
    },
    /// Others can read it.
    #[error("the key file {} can be read by others (mode {mode:o}): chmod 600 it", path.display())]
    Open {
        /// Where it is.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}

/// Reads the key of a data directory; makes one where there is none. It is on the disk before anything is sealed.
pub fn load_or_make(data_dir: &Path) -> Result<Vault, KeyError> {
    let path = data_dir.join(KEY_FILE);
    let failed = |source| KeyError::Io { path: path.clone(), source };
    match make(data_dir, &path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    let file = File::open(&path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Open { path, mode });
    }
    let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(KEY_BYTES + 1));
    file.take(KEY_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    let found = bytes.len();
    let raw = <&[u8; KEY_BYTES]>::try_from(bytes.as_slice())
        .map_err(|_| KeyError::Length { path: path.clone(), found })?;
    Ok(Vault::new(raw)?)
}

/// Under another name first: a server that is killed half-way leaves no short key.
fn make(data_dir: &Path, path: &Path) -> io::Result<()> {
    if path.try_exists()? {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let new = data_dir.join(format!("{KEY_FILE}.new"));
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&*zeroize::Zeroizing::new(crate::random::bytes::<KEY_BYTES>()))?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    File::open(data_dir)?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::build::Tenant;
    use crate::secrets::Owner;

    #[test]
    fn the_key_is_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let tenant = Tenant::new("a").unwrap();
        let owner = Owner::Tenant(&tenant);
        let sealed =
            load_or_make(dir.path()).unwrap().seal(owner, "id", b"value".to_vec()).unwrap();
        let again = load_or_make(dir.path()).unwrap();
        assert_eq!(again.open(owner, "id", &sealed).unwrap().expose(), b"value");
        let path = dir.path().join(KEY_FILE);
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o7777), (32, 0o600));

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load_or_make(dir.path()), Err(KeyError::Open { mode: 0o640, .. })));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        for length in [0, 31, 33] {
            std::fs::write(&path, vec![7; length]).unwrap();
            let found = load_or_make(dir.path()).unwrap_err();
            assert!(matches!(found, KeyError::Length { found, .. } if found == length));
        }
    }
}
