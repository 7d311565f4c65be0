//! The kernel: Debian's package unpacked (nothing of it runs on the host), its image and the modules
//! that the recipe wants, decompressed.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::file::{self, FileError};
use crate::initrd::LoadedModule;
use crate::modules::{Available, NoSuchModule, Plan};
use crate::recipe::Kernel;
use crate::tools::{self, CHROOT, MMDEBSTRAP, ToolError, XZ};

/// About forty packages are fetched (the kernel's dependencies).
const UNPACK_LIMIT: Duration = Duration::from_mins(30);
/// `depmod` and `xz` take a second.
const SHORT_LIMIT: Duration = Duration::from_mins(2);
/// The largest modules are graphics drivers of some 10 MB.
const MAX_MODULE: u64 = 64 * 1024 * 1024;
/// A distribution kernel's list has some 300 KB.
const MAX_LIST: u64 = 16 * 1024 * 1024;
/// A kernel image has 8–15 MB.
const MAX_IMAGE: u64 = 256 * 1024 * 1024;

/// Linux's own version texts stay under 200 characters.
const MAX_VERSION: usize = 256;

/// What was taken from the package.
#[derive(Debug)]
pub struct Extracted {
    /// The compressed kernel image.
    pub image: Vec<u8>,
    /// `uname -r`.
    pub release: String,
    /// The image's own version text, which has Debian's package version.
    pub version: Option<String>,
    /// In load order, decompressed.
    pub modules: Vec<LoadedModule>,
    /// What the recipe did not name, and what is built in.
    pub plan: Plan,
}

/// The kernel could not be had.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A program failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The recipe's list does not fit.
    #[error("kernel {release}")]
    Module {
        /// Which kernel.
        release: String,
        /// Which module.
        #[source]
        source: NoSuchModule,
    },
    /// The package is none of a kernel, or of several.
    #[error("package {package} of {suite} brought {} kernels ({}); it must bring one", found.len(), found.join(", "))]
    NotOne {
        /// The recipe's package.
        package: String,
        /// The recipe's suite.
        suite: String,
        /// Kernel releases.
        found: Vec<String>,
    },
    /// `depmod` is in neither place.
    #[error("package {0} did not bring depmod (kmod)")]
    NoDepmod(String),
}

/// Downloads and unpacks the package into `work`, which must not exist, and reads what is wanted.
pub async fn extract(spec: &Kernel, work: &Path) -> Result<Extracted, KernelError> {
    let args: Vec<OsString> = vec![
        "--mode=root".into(),
        "--format=directory".into(),
        "--variant=extract".into(),
        format!("--include={}", spec.package).into(),
        OsString::from(&spec.suite),
        work.into(),
    ];
    tools::run(MMDEBSTRAP, args, None, UNPACK_LIMIT).await?;
    let all_modules = first_existing(work, &["usr/lib/modules", "lib/modules"])
        .unwrap_or_else(|| work.join("lib/modules"));
    let release = only_kernel(spec, &all_modules)?;
    let dir = all_modules.join(&release);
    depmod(spec, work, &release).await?;

    let list = |name: &str| -> Result<String, FileError> {
        let bytes = file::read_bounded(&dir.join(name), MAX_LIST)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let plan = Available::parse(&list("modules.dep")?, &list("modules.builtin")?)
        .plan(&spec.modules)
        .map_err(|source| KernelError::Module { release: release.clone(), source })?;
    let mut modules = Vec::new();
    for module in &plan.load {
        let data = read_module(&dir.join(&module.path)).await?;
        modules.push(LoadedModule { name: module.name.clone(), data });
    }
    let image = file::read_bounded(&work.join(format!("boot/vmlinuz-{release}")), MAX_IMAGE)?;
    Ok(Extracted { version: version(&image), image, release, modules, plan })
}

fn first_existing(root: &Path, candidates: &[&str]) -> Option<PathBuf> {
    candidates.iter().map(|c| root.join(c)).find(|p| p.exists())
}

fn only_kernel(spec: &Kernel, all_modules: &Path) -> Result<String, KernelError> {
    let entries = fs::read_dir(all_modules).map_err(|e| FileError::new("read", all_modules, e))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| FileError::new("read", all_modules, e))?;
        found.push(entry.file_name().to_string_lossy().into_owned());
    }
    found.sort();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        _ => Err(KernelError::NotOne {
            package: spec.package.clone(),
            suite: spec.suite.clone(),
            found,
        }),
    }
}

/// Unpacking runs no maintainer script, so the dependency list is made here, by the `depmod` that came along.
async fn depmod(spec: &Kernel, work: &Path, release: &str) -> Result<(), KernelError> {
    let program = ["usr/sbin/depmod", "sbin/depmod"]
        .into_iter()
        .find(|p| work.join(p).symlink_metadata().is_ok())
        .ok_or_else(|| KernelError::NoDepmod(spec.package.clone()))?;
    let args = vec![work.into(), format!("/{program}").into(), OsString::from(release)];
    Ok(tools::run(CHROOT, args, None, SHORT_LIMIT).await?)
}

/// A module as the kernel takes it: `init_module` knows no compression before 5.17.
async fn read_module(path: &Path) -> Result<Vec<u8>, KernelError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => {
            tools::require(&[XZ])?;
            let plain = path.with_extension("");
            let args = vec!["--decompress".into(), "--stdout".into(), path.into()];
            tools::run(XZ, args, Some(file::create(&plain)?), SHORT_LIMIT).await?;
            Ok(file::read_bounded(&plain, MAX_MODULE)?)
        }
        Some("zst") => {
            let broken = |e| FileError::new("decompress", path, e);
            let mut plain = Vec::new();
            let decoder = zstd::Decoder::new(file::open(path)?).map_err(broken)?;
            decoder.take(MAX_MODULE + 1).read_to_end(&mut plain).map_err(broken)?;
            if plain.len() as u64 > MAX_MODULE {
                return Err(broken(io::Error::other("it is too large for a module")).into());
            }
            Ok(plain)
        }
        _ => Ok(file::read_bounded(path, MAX_MODULE)?),
    }
}

/// The version text of an x86 kernel image (Linux `Documentation/arch/x86/boot.rst`: magic `HdrS` at
/// 0x202, offset of the text less 0x200 at 0x20e).
fn version(image: &[u8]) -> Option<String> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
    let text = image.get(usize::from(offset) + 0x200..)?;
    let end = text.iter().take(MAX_VERSION).position(|b| *b == 0)?;
    let text = std::str::from_utf8(&text[..end]).ok()?;
    (!text.is_empty() && !text.chars().any(char::is_control)).then(|| text.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn image(text: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x300 + text.len()].copy_from_slice(text);
        image
    }

    #[test]
    fn the_version_is_read_from_the_image() {
        let text = "6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP Debian 6.1.192-2";
        assert_eq!(version(&image(text.as_bytes())).as_deref(), Some(text));
    }

    #[test]
    fn other_images_have_none() {
        assert_eq!(version(b""), None);
        assert_eq!(version(&[0; 0x400]), None);
        assert_eq!(version(&image(b"a\x1bb")), None);
        assert_eq!(version(&image(&[b'a'; 0x100])), None, "no end");
        let mut outside = image(b"x");
        outside[0x20e..0x210].copy_from_slice(&0xffffu16.to_le_bytes());
        assert_eq!(version(&outside), None);
    }

    #[tokio::test]
    async fn compressed_modules_are_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let plain = vec![7u8; 100_000];
        let path = dir.path().join("a.ko");
        fs::write(&path, &plain).unwrap();
        assert_eq!(read_module(&path).await.unwrap(), plain);
        let zst = dir.path().join("b.ko.zst");
        fs::write(&zst, zstd::encode_all(plain.as_slice(), 3).unwrap()).unwrap();
        assert_eq!(read_module(&zst).await.unwrap(), plain);
        let broken = dir.path().join("c.ko.zst");
        fs::write(&broken, b"no zstd").unwrap();
        let error = read_module(&broken).await.unwrap_err();
        assert!(error.to_string().starts_with("cannot decompress "), "{error}");
    }

    #[test]
    fn a_package_with_two_kernels_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let spec: Kernel = toml::from_str("suite='s'\npackage='p'\nmodules=[]").unwrap();
        assert!(only_kernel(&spec, dir.path()).is_err());
        fs::create_dir(dir.path().join("6.1.0-2-x")).unwrap();
        assert_eq!(only_kernel(&spec, dir.path()).unwrap(), "6.1.0-2-x");
        fs::create_dir(dir.path().join("6.1.0-1-x")).unwrap();
        let error = only_kernel(&spec, dir.path()).unwrap_err().to_string();
        assert!(error.contains("2 kernels (6.1.0-1-x, 6.1.0-2-x)"), "{error}");
    }
}
