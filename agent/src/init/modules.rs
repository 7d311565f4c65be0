//! The kernel modules that the initrd brings, loaded in the order of their names.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

const DIRECTORY: &str = "/lib/kiln/modules";

/// The last of the drivers; file systems, which need none of them, come after it.
const LAST_DRIVER: &str = "vmw_vsock_virtio_transport";

/// Without these there is no disk, no root or no host: boot ends with their name. Any other (a
/// faster checksum that the CPU lacks, say) is only reported.
const REQUIRED: [&str; 5] = ["virtio", "vsock", "vmw_vsock", "overlay", "erofs"];

/// Modules that do not need those of the other group, so that both load at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Disks and vsock.
    Drivers,
    /// What comes after the last driver.
    FileSystems,
}

/// Loads a group and removes its files: the initrd's memory is the VM's.
pub fn load(group: Group) -> anyhow::Result<()> {
    for path in of_group(group, in_order(Path::new(DIRECTORY))?) {
        let name = module_name(&path);
        match insert(&path) {
            Ok(()) => {}
            Err(error) if is_required(name) => {
                bail!(
                    "the kernel module {name} cannot be loaded: {error}; rebuild the builder image"
                );
            }
            Err(error) => eprintln!("kiln-agent: the kernel module {name} is left out: {error}"),
        }
        // What cannot be removed costs some memory and nothing else.
        let _ = fs::remove_file(&path);
    }
    Ok(())
}

fn of_group(group: Group, mut paths: Vec<PathBuf>) -> Vec<PathBuf> {
    let after = paths.iter().position(|path| module_name(path) == LAST_DRIVER);
    let file_systems = after.map_or_else(Vec::new, |last| paths.split_off(last + 1));
    match group {
        Group::Drivers => paths,
        Group::FileSystems => file_systems,
    }
}

fn insert(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path)?;
    match finit_module(file, c"", ModuleInitFlags::empty()) {
        // Built in, or loaded already.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The modules of a directory. A kernel with everything built in needs none.
fn in_order(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let listed = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.with_context(|| format!("{} cannot be read", directory.display()))?,
    };
    let mut paths = listed
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("{} cannot be read", directory.display()))?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "ko"));
    paths.sort();
    Ok(paths)
}

/// `03-virtio_pci.ko` is `virtio_pci`.
fn module_name(path: &Path) -> &str {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("?");
    let (number, name) = stem.split_once('-').unwrap_or(("", stem));
    if number.bytes().all(|byte| byte.is_ascii_digit()) { name } else { stem }
}

fn is_required(name: &str) -> bool {
    REQUIRED.iter().any(|required| name.starts_with(required))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["10-erofs.ko", "02-virtio.ko", "01-virtio_ring.ko", "notes.txt"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let paths = in_order(dir.path()).unwrap();
        let names: Vec<_> = paths.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["virtio_ring", "virtio", "erofs"]);
        assert!(in_order(&dir.path().join("missing")).unwrap().is_empty());
    }

    #[test]
    fn file_systems_come_after_the_last_driver() {
        let names = |group, all: &[&str]| {
            let paths = of_group(group, all.iter().map(PathBuf::from).collect());
            paths.iter().map(|path| module_name(path).to_owned()).collect::<Vec<_>>()
        };
        let ours = [
            "01-vmw_vsock_virtio_transport_common.ko",
            "02-vmw_vsock_virtio_transport.ko",
            "03-overlay.ko",
            "04-erofs.ko",
        ];
        assert_eq!(names(Group::Drivers, &ours).len(), 2);
        assert_eq!(names(Group::FileSystems, &ours), ["overlay", "erofs"]);
        // In an order of its own: one after the other.
        assert_eq!(names(Group::Drivers, &["01-overlay.ko"]), ["overlay"]);
        assert!(names(Group::FileSystems, &["01-overlay.ko"]).is_empty());
    }

    #[test]
    fn boot_needs_some_modules_and_not_others() {
        for name in
            ["virtio_pci_legacy_dev", "vmw_vsock_virtio_transport", "vsock", "overlay", "erofs"]
        {
            assert!(is_required(name), "{name}");
        }
        for name in ["crc32c-intel", "libcrc32c", "fuse"] {
            assert!(!is_required(name), "{name}");
        }
        assert_eq!(module_name(Path::new("/x/07-crc32c-intel.ko")), "crc32c-intel");
    }
}
