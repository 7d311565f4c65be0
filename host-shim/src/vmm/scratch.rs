//! Scratch disks: ext4 on a sparse file without a name, filled from a template that was made once
//! for its size. Copying a template's few hundred KiB takes a millisecond; formatting at every start would not.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom as Seeks;
use tokio::process::Command;

use super::VmmError;

/// Named after what `mke2fs` is told: a new set of options is a new name.
const LAYOUT: &str = "v1";

/// No journal, checksums or reserved blocks: the disk is thrown away. The file is sparse, so its inode
/// tables are zero already and the guest's kernel need not write them.
const MKE2FS: [&str; 12] = [
    "-q",
    "-F",
    "-t",
    "ext4",
    "-O",
    "^has_journal,^resize_inode,^metadata_csum,uninit_bg",
    "-E",
    "lazy_itable_init=1,assume_storage_prezeroed=1,nodiscard",
    "-m",
    "0",
    "-L",
    "kiln-scratch",
];

/// `TMPFS_MAGIC` (statfs(2)).
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

/// Makes scratch disks in one directory.
#[derive(Debug)]
pub(crate) struct Scratch {
    disks: PathBuf,
    templates: PathBuf,
    /// One template at a time is made.
    making: tokio::sync::Mutex<()>,
}

impl Scratch {
    pub(crate) fn new(disks: &Path) -> Result<Self, VmmError> {
        let templates = disks.join("templates");
        fs::create_dir_all(&templates).map_err(VmmError::io("make the directory", &templates))?;
        Ok(Self { disks: disks.to_owned(), templates, making: tokio::sync::Mutex::default() })
    }

    /// How much memory of the host's a disk of this size takes when it is full, in MiB: none, unless the disks are on a tmpfs.
    pub(crate) fn in_memory(&self, gb: u32) -> u64 {
        let on_tmpfs = rustix::fs::statfs(&self.disks).is_ok_and(|fs| fs.f_type == TMPFS);
        if on_tmpfs { u64::from(gb) << 10 } else { 0 }
    }

    /// The template of a size; made when there is none yet.
    pub(crate) async fn template(&self, gb: u32) -> Result<PathBuf, VmmError> {
        let path = self.templates.join(format!("scratch-{LAYOUT}-{gb}.ext4"));
        if path.exists() {
            return Ok(path);
        }
        let _one = self.making.lock().await;
        if path.exists() {
            return Ok(path);
        }
        let failed = VmmError::io("make the scratch disk's template", &path);
        // Under a name of its own until it is whole: another process may be at it too.
        let new = match tempfile::NamedTempFile::new_in(&self.templates) {
            Ok(new) => new,
            Err(error) => return Err(failed(error)),
        };
        let made = async {
            new.as_file().set_len(u64::from(gb) << 30)?;
            let output = Command::new("mke2fs")
                .args(MKE2FS)
                .arg(new.path())
                .kill_on_drop(true)
                .output()
                .await?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(io::Error::other(format!("mke2fs failed: {}", said.trim())));
            }
            new.persist(&path)?;
            Ok(())
        };
        made.await.map_err(failed)?;
        Ok(path)
    }

    /// A disk that is gone once its last descriptor is closed. Blocks for a moment.
    pub(crate) fn disk(&self, template: &Path) -> io::Result<File> {
        let mut from = File::open(template)?;
        let mut disk = tempfile::tempfile_in(&self.disks)?;
        copy_sparse(&mut from, &mut disk)?;
        Ok(disk)
    }
}

/// Copies what is data, and leaves the holes.
fn copy_sparse(from: &mut File, to: &mut File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(&*from, Seeks::Data(at)) {
            Ok(data) => data,
            // Only a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(&*from, Seeks::Hole(data))?;
        from.seek(SeekFrom::Start(data))?;
        to.seek(SeekFrom::Start(data))?;
        io::copy(&mut (&mut *from).take(hole - data), to)?;
        at = hole;
    }
    to.flush()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_disk_is_a_clean_file_system_and_takes_no_space() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap();
        let template = scratch.template(3).await.unwrap();
        let disk = scratch.disk(&template).unwrap();
        let meta = disk.metadata().unwrap();
        assert_eq!((meta.len(), meta.nlink()), (3 << 30, 0));
        assert!(meta.blocks() * 512 < 4 << 20, "{} blocks", meta.blocks());
        let path = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd());
        let check = Command::new("e2fsck").args(["-fn", &path]).output().await.unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        let said = String::from_utf8_lossy(&check.stdout).into_owned();
        assert!(said.contains("kiln-scratch"), "{said}");
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "only the templates have a name"
        );
    }

    #[tokio::test]
    async fn many_first_users_make_one_template() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Arc::new(Scratch::new(dir.path()).unwrap());
        let users: Vec<_> = (0..8)
            .map(|_| {
                let scratch = Arc::clone(&scratch);
                tokio::spawn(async move { scratch.template(1).await.unwrap() })
            })
            .collect();
        for user in users {
            assert!(user.await.unwrap().exists());
        }
        assert_eq!(std::fs::read_dir(dir.path().join("templates")).unwrap().count(), 1);
    }

    #[test]
    fn data_and_holes_arrive_where_they_were() {
        let mut from = tempfile::tempfile().unwrap();
        let mut to = tempfile::tempfile().unwrap();
        from.set_len(64 << 20).unwrap();
        for at in [0, 5 << 20, (64 << 20) - 3] {
            from.write_all_at(b"abc", at).unwrap();
        }
        copy_sparse(&mut from, &mut to).unwrap();
        for at in [0, 5 << 20, (64 << 20) - 3] {
            let mut got = [0; 3];
            to.read_exact_at(&mut got, at).unwrap();
            assert_eq!(&got, b"abc");
        }
        let meta = to.metadata().unwrap();
        assert_eq!(meta.len(), 64 << 20);
        assert!(meta.blocks() * 512 < 1 << 20);
    }
}
