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

/// A module that is about to be loaded.
#[derive(Debug)]
pub struct Module {
    name: String,
    file: File,
}

/// Modules in two groups that do not need each other, so that both load at one time.
#[derive(Debug)]
pub struct Modules {
    /// Disks and vsock.
    pub drivers: Vec<Module>,
    /// What comes after the last driver.
    pub file_systems: Vec<Module>,
}

/// Opens every module, since its path ends with the initrd's root, and removes it: the initrd's memory is
/// the VM's.
pub fn open() -> anyhow::Result<Modules> {
    open_in(Path::new(DIRECTORY))
}

fn open_in(directory: &Path) -> anyhow::Result<Modules> {
    let mut drivers = Vec::new();
    for path in in_order(directory)? {
        let file = File::open(&path).with_context(|| format!("{} is lost", path.display()))?;
        // What cannot be removed costs some memory and nothing else.
        let _ = fs::remove_file(&path);
        drivers.push(Module { name: module_name(&path).to_owned(), file });
    }
    let last = drivers.iter().position(|module| module.name == LAST_DRIVER);
    let file_systems = last.map_or_else(Vec::new, |last| drivers.split_off(last + 1));
    Ok(Modules { drivers, file_systems })
}

/// Loads modules, one after the other.
pub fn load(modules: Vec<Module>) -> anyhow::Result<()> {
    for Module { name, file } in modules {
        match finit_module(file, c"", ModuleInitFlags::empty()) {
            // Built in, or loaded already.
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) if is_required(&name) => {
                bail!(
                    "the kernel module {name} cannot be loaded: {error}; rebuild the builder image"
                );
            }
            Err(error) => eprintln!("kiln-agent: the kernel module {name} is left out: {error}"),
        }
    }
    Ok(())
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
    fn file_systems_come_after_the_last_driver_and_no_file_stays() {
        let opened = |files: &[&str]| {
            let dir = tempfile::tempdir().unwrap();
            for name in files {
                fs::write(dir.path().join(name), "").unwrap();
            }
            let Modules { drivers, file_systems } = open_in(dir.path()).unwrap();
            assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
            let names = |of: Vec<Module>| of.into_iter().map(|m| m.name).collect::<Vec<_>>();
            (names(drivers), names(file_systems))
        };
        let (drivers, file_systems) = opened(&[
            "03-overlay.ko",
            "01-vmw_vsock_virtio_transport_common.ko",
            "02-vmw_vsock_virtio_transport.ko",
            "04-erofs.ko",
        ]);
        assert_eq!(drivers.len(), 2);
        assert_eq!(file_systems, ["overlay", "erofs"]);
        // In an order of its own: one after the other.
        assert_eq!(opened(&["01-overlay.ko"]), (vec!["overlay".to_owned()], vec![]));
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
