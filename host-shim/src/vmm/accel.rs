//! Whether KVM really runs guests here, found out by booting the builder's own kernel.
//!
//! A `/dev/kvm` that opens proves nothing: under nested virtualisation it may answer every ioctl and never
//! run a guest. The verdict is remembered for this kernel, this QEMU and this boot of the host.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

/// What the operator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// KVM where it runs guests, else emulation.
    #[default]
    Auto,
    /// KVM, without a try.
    Kvm,
    /// Emulation.
    Tcg,
}

/// Whether KVM runs guests, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub runs: bool,
    pub why: String,
}

/// A kernel that runs says its first line within half a second.
pub(crate) const PROBE_DEADLINE: Duration = Duration::from_secs(4);

/// The first line of every Linux kernel.
const SIGN_OF_LIFE: &[u8] = b"Linux version ";

/// What may come before it, from firmware.
const MAX_CONSOLE: usize = 64 * 1024;

/// The node that QEMU opens by this name, and no other.
pub(super) const DEVICE: &str = "/dev/kvm";

/// How the VMs' user gets to the device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Everybody may.
    Open,
    /// Members of this group may.
    Group(u32),
    /// Not at all.
    None(String),
}

/// Whether a user of a VM's own could open the device, by its mode.
pub(crate) fn access() -> Access {
    match std::fs::metadata(DEVICE) {
        Ok(meta) => access_of(meta.permissions().mode(), meta.gid()),
        Err(error) => Access::None(format!("{DEVICE}: {error}")),
    }
}

fn access_of(mode: u32, gid: u32) -> Access {
    if mode & 0o006 == 0o006 {
        Access::Open
    } else if mode & 0o060 == 0o060 && gid != 0 {
        Access::Group(gid)
    } else {
        Access::None(format!(
            "{DEVICE} has mode {:03o} and group {gid}: users of VMs cannot open it (chgrp kvm and chmod 660 let them)",
            mode & 0o777
        ))
    }
}

/// Reads a booting guest's console until it shows that a kernel runs.
pub(crate) async fn sign_of_life(mut console: UnixStream) -> Verdict {
    let read = async {
        let mut seen = Vec::new();
        while seen.len() < MAX_CONSOLE {
            match console.read_buf(&mut seen).await {
                Ok(0) => {
                    return Err("QEMU ended before the guest's kernel said anything".to_owned());
                }
                Ok(_) if seen.windows(SIGN_OF_LIFE.len()).any(|w| w == SIGN_OF_LIFE) => {
                    return Ok(());
                }
                Ok(_) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Err("the guest's console says something else than a kernel would".to_owned())
    };
    match tokio::time::timeout(PROBE_DEADLINE, read).await {
        Ok(Ok(())) => Verdict { runs: true, why: "a guest's kernel ran under KVM".to_owned() },
        Ok(Err(why)) => Verdict { runs: false, why },
        Err(_) => Verdict {
            runs: false,
            why: format!("no guest kernel ran under KVM within {PROBE_DEADLINE:?}"),
        },
    }
}

/// A verdict, and what it was found with.
#[derive(Serialize, Deserialize)]
struct Remembered {
    key: String,
    verdict: Verdict,
}

/// The verdict that was found with the same kernel, QEMU and boot.
pub(crate) fn recall(file: &Path, key: &str) -> Option<Verdict> {
    let remembered: Remembered = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (remembered.key == key).then_some(remembered.verdict)
}

/// Remembers a verdict. A file that cannot be written costs the next start a probe.
pub(crate) fn remember(file: &Path, key: &str, verdict: &Verdict) {
    let remembered = Remembered { key: key.to_owned(), verdict: verdict.clone() };
    let written = serde_json::to_vec(&remembered).map_err(std::io::Error::from).and_then(|bytes| {
        let new = file.with_extension("new");
        std::fs::write(&new, bytes)?;
        std::fs::rename(&new, file)
    });
    if let Err(error) = written {
        tracing::warn!(file = %file.display(), %error, "the verdict about KVM is not remembered");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn who_may_open_the_device() {
        assert_eq!(access_of(0o020_666, 0), Access::Open);
        assert_eq!(access_of(0o020_660, 106), Access::Group(106));
        assert!(matches!(access_of(0o020_660, 0), Access::None(_)));
        assert!(matches!(access_of(0o020_600, 106), Access::None(_)));
        assert!(matches!(access_of(0o020_640, 106), Access::None(_)));
    }

    #[tokio::test]
    async fn a_kernels_first_line_is_a_sign_of_life() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(b"\x1b[2JSeaBIOS\r\n[    0.000000] Linux ver").await.unwrap();
        let verdict = tokio::spawn(sign_of_life(ours));
        guest.write_all(b"sion 6.1.0-50-cloud-amd64").await.unwrap();
        assert!(verdict.await.unwrap().runs);
    }

    #[tokio::test]
    async fn babble_and_an_end_are_none() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let verdict = tokio::spawn(sign_of_life(ours));
        let _ = guest.write_all(&vec![b'x'; 2 * MAX_CONSOLE]).await;
        assert!(!verdict.await.unwrap().runs);
        let (ours, guest) = UnixStream::pair().unwrap();
        drop(guest);
        assert!(!sign_of_life(ours).await.runs);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_at_the_deadline() {
        let (ours, _guest) = UnixStream::pair().unwrap();
        let began = tokio::time::Instant::now();
        assert!(!sign_of_life(ours).await.runs);
        assert!(began.elapsed() <= PROBE_DEADLINE + Duration::from_millis(10));
    }

    #[test]
    fn a_verdict_is_for_one_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kvm.json");
        assert_eq!(recall(&file, "k"), None);
        let verdict = Verdict { runs: false, why: "w".to_owned() };
        remember(&file, "k", &verdict);
        assert_eq!(recall(&file, "k"), Some(verdict));
        assert_eq!(recall(&file, "another"), None);
        std::fs::write(&file, "{").unwrap();
        assert_eq!(recall(&file, "k"), None);
    }
}
