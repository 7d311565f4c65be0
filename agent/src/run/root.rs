//! An instance's root: its image's disk, read-only, with an overlay on the scratch disk.
//!
//! What the image says is looked up below its root and never through a link out of it: the kernel resolves every
//! path as if that root were `/` (`RESOLVE_IN_ROOT`).

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, mkdirat};

use super::Places;
use super::user::{self, User};
use crate::init::{mount_new, wait_for};

/// Mode of a working directory that is missing.
const DIRECTORY_MODE: Mode = Mode::from_bits_truncate(0o755);

/// An instance's root, mounted.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
}

/// Where the root is mounted.
pub fn place(places: &Places) -> PathBuf {
    places.scratch.join("root")
}

/// Mounts image and overlay. It blocks until the disk is there.
pub fn mount(places: &Places) -> anyhow::Result<Root> {
    let device = places.device.to_str().context("the image's disk has no plain name")?;
    wait_for(device).context("the image's disk is missing")?;
    let kind = file_system(&first_bytes(&places.device)?)?;
    let [image, upper, work] = ["image", "upper", "work"].map(|name| places.scratch.join(name));
    let root = place(places);
    for directory in [&image, &upper, &work, &root] {
        fs::create_dir_all(directory)
            .with_context(|| format!("{} cannot be made", directory.display()))?;
    }
    // The image's own devices open nothing. Its set-uid programs are its own business.
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    mount_new(device, text(&image)?, kind, flags, "")?;
    like(&image, &upper).context("the root cannot be made like the image's")?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={},volatile",
        image.display(),
        upper.display(),
        work.display()
    );
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    mount_new("overlay", text(&root)?, "overlay", flags, &options)?;
    Root::open(&root)
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path is no text")
}

/// The root of an overlay is its upper directory's: it must look as the image's own.
fn like(image: &Path, upper: &Path) -> io::Result<()> {
    let meta = fs::metadata(image)?;
    chown(upper, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(upper, fs::Permissions::from_mode(meta.mode() & 0o7777))
}

/// As much of a disk as tells what it is.
fn first_bytes(device: &Path) -> anyhow::Result<[u8; 2048]> {
    let mut bytes = [0; 2048];
    File::open(device)
        .and_then(|disk| disk.read_exact_at(&mut bytes, 0))
        .context("the image's disk cannot be read")?;
    Ok(bytes)
}

/// The file system of a disk by its magic number: of ext4 at 0x438, of EROFS at 0x400 (their `super.c`).
fn file_system(bytes: &[u8; 2048]) -> anyhow::Result<&'static str> {
    if bytes[0x438..0x43a] == [0x53, 0xef] {
        Ok("ext4")
    } else if bytes[0x400..0x404] == [0xe2, 0xe1, 0xf5, 0xe0] {
        Ok("erofs")
    } else {
        bail!("the image's disk holds neither ext4 nor EROFS")
    }
}

impl Root {
    /// The directory that is the root.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_PATH;
        let directory = open(path, flags, Mode::empty())
            .with_context(|| format!("{} cannot be opened", path.display()))?;
        Ok(Self { directory })
    }

    /// Finds the user that the text names.
    pub fn user(&self, wanted: &str) -> anyhow::Result<User> {
        let passwd = self.read("etc/passwd")?;
        let group = self.read("etc/group")?;
        Ok(user::find(wanted, &passwd, &group)?)
    }

    /// Makes a directory and those above it, where they are missing: root's, as other container tools do.
    pub fn make_directory(&self, path: &str) -> anyhow::Result<()> {
        let mut done = PathBuf::from("/");
        for component in Path::new(path).components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => {
                    let above = done.clone();
                    done.push(name);
                    match self.open_directory(&done) {
                        Ok(_) => {}
                        Err(Errno::ENOENT) => self
                            .open_directory(&above)
                            .and_then(|above| mkdirat(above, name, DIRECTORY_MODE))
                            .with_context(|| not_made(path))?,
                        Err(error) => return Err(error).with_context(|| not_made(path)),
                    }
                }
                Component::ParentDir | Component::Prefix(_) => {
                    bail!("the working directory {path:?} leads upwards")
                }
            }
        }
        Ok(())
    }

    /// Opens a directory, with links followed as the root's own processes would.
    pub fn open_directory(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.open_below(path, OFlag::O_DIRECTORY | OFlag::O_PATH)
    }

    /// The beginning of a file; nothing where it is missing or no file.
    fn read(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        // A FIFO would be waited for otherwise.
        let file = match self.open_below(Path::new(path), OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(vec![]),
            Err(error) => return Err(error).with_context(|| format!("/{path} of the image")),
        };
        let mut content = vec![];
        if file.metadata().is_ok_and(|meta| meta.is_file()) {
            file.take(user::MAX_FILE as u64)
                .read_to_end(&mut content)
                .with_context(|| format!("/{path} of the image cannot be read"))?;
        }
        Ok(content)
    }

    fn open_below(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.directory, path, how)
    }
}

fn not_made(path: &str) -> String {
    format!("the working directory {path:?} cannot be made in the image")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("real")).unwrap();
        fs::write(dir.path().join("outside"), "evil:x:0:0::/:").unwrap();
        let opened = Root::open(&root).unwrap();
        (dir, opened)
    }

    #[test]
    fn a_disk_is_known_by_its_magic_number() {
        let mut disk = [0; 2048];
        assert!(file_system(&disk).is_err());
        disk[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(file_system(&disk).unwrap(), "ext4");
        let mut disk = [0; 2048];
        disk[0x400..0x404].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        assert_eq!(file_system(&disk).unwrap(), "erofs");
    }

    #[test]
    fn users_come_from_the_images_own_files() {
        let (dir, root) = root();
        assert_eq!(root.user("7").unwrap().uid, 7, "no files at all");
        fs::write(dir.path().join("root/real/passwd"), "app:x:5:6::/srv:").unwrap();
        symlink("/real/passwd", dir.path().join("root/etc/passwd")).unwrap();
        assert_eq!(root.user("app").unwrap().uid, 5, "an absolute link stays inside");
        for link in ["../../outside", "../../../../../../etc/passwd"] {
            fs::remove_file(dir.path().join("root/etc/passwd")).unwrap();
            symlink(link, dir.path().join("root/etc/passwd")).unwrap();
            for name in ["evil", "daemon"] {
                assert!(root.user(name).is_err(), "{name} of {link}");
            }
        }
    }

    #[test]
    fn files_that_are_none_are_not_waited_for() {
        let (dir, root) = root();
        let fifo = dir.path().join("root/etc/passwd");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        fs::create_dir(dir.path().join("root/etc/group")).unwrap();
        assert_eq!(root.user("7").unwrap().uid, 7);
    }

    #[test]
    fn a_working_directory_is_made_inside() {
        let (dir, root) = root();
        let inside = |path: &str| dir.path().join("root").join(path);
        root.make_directory("/").unwrap();
        root.make_directory("/a/b/c").unwrap();
        root.make_directory("/a/b").unwrap();
        assert!(inside("a/b/c").is_dir());
        symlink("/real", inside("link")).unwrap();
        root.make_directory("/link/made").unwrap();
        assert!(inside("real/made").is_dir());
        symlink("../../../..", inside("up")).unwrap();
        root.make_directory("/up/here").unwrap();
        assert!(inside("here").is_dir(), "a link upwards ends at the root");
        symlink("nowhere", inside("dangling")).unwrap();
        fs::write(inside("file"), "").unwrap();
        for bad in ["/dangling", "/file", "/file/x", "/a/../../x"] {
            assert!(root.make_directory(bad).is_err(), "{bad}");
        }
    }
}
