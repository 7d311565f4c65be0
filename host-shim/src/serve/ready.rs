//! What a server needs beside its store, looked at when `/ready` is asked.

use std::path::PathBuf;

use async_trait::async_trait;
use http::Method;
use rustix::fs::{Access, access, statvfs};
use tokio_util::sync::CancellationToken;

use crate::api::{Check, Readiness};
use crate::causes::chain;
use crate::gateway::Backing;
use crate::gateway::path::Route;

/// What has to be free where builds, disks and the database are. Instances' disks leave as much.
pub(super) const ROOM: u64 = 1 << 30;

/// What builds stand on.
pub(super) struct Facilities {
    /// Cancelled when the server is told to stop.
    pub draining: CancellationToken,
    /// The registry behind the gateway.
    pub backing: Backing,
    /// Kernel, initial RAM disk and root disk, by what they are.
    pub bundle: [(&'static str, PathBuf); 3],
    /// What starts a VM.
    pub programs: [(&'static str, PathBuf); 2],
    /// Guests run under KVM.
    pub kvm: bool,
    /// Where VMs' sockets are made.
    pub run_dir: PathBuf,
    /// Where all else is.
    pub data_dir: PathBuf,
    /// What has to be free there.
    pub room: u64,
}

#[async_trait]
impl Readiness for Facilities {
    async fn checks(&self) -> Vec<Check> {
        vec![
            Check { name: "server", missing: self.server() },
            Check { name: "registry", missing: self.registry().await },
            Check { name: "builder", missing: self.builder() },
            Check { name: "vms", missing: self.vms() },
            Check { name: "disk", missing: self.disk() },
        ]
    }
}

/// What is missing, in words for callers without a token: no paths.
type Missing = Option<String>;

impl Facilities {
    fn server(&self) -> Missing {
        let why = "the server drains: it ends when the builds that run have ended, and those that wait are kept for the next one";
        self.draining.is_cancelled().then(|| why.into())
    }

    async fn registry(&self) -> Missing {
        match self.backing.request(Method::GET, Route::Base).send().await {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("the registry answers {}", answer.status())),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the registry does not answer");
                Some("the registry does not answer".into())
            }
        }
    }

    /// VMs get the files that were opened at the start; the next start needs them to be there.
    fn builder(&self) -> Missing {
        let gone = self.bundle.iter().find(|(_, path)| access(path, Access::READ_OK).is_err());
        gone.map(|(what, _)| format!("the builder bundle's {what} is not there"))
    }

    fn vms(&self) -> Missing {
        let gone = self.programs.iter().find(|(_, path)| access(path, Access::EXEC_OK).is_err());
        if let Some((what, _)) = gone {
            return Some(format!("{what} is not there"));
        }
        if access(&self.run_dir, Access::WRITE_OK | Access::EXEC_OK).is_err() {
            return Some("the run directory cannot be written".into());
        }
        let kvm = !self.kvm || access("/dev/kvm", Access::READ_OK | Access::WRITE_OK).is_ok();
        (!kvm).then(|| "KVM cannot be used any more".into())
    }

    fn disk(&self) -> Missing {
        match statvfs(&self.data_dir) {
            Ok(found) if found.f_bavail.saturating_mul(found.f_frsize) < self.room => {
                Some(format!("the data directory has less than {} MiB free", self.room >> 20))
            }
            Ok(_) => None,
            Err(_) => Some("the data directory is not there".into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    fn facilities(dir: &Path) -> Facilities {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let file = |name: &str| {
            std::fs::write(dir.join(name), name).unwrap();
            dir.join(name)
        };
        Facilities {
            draining: CancellationToken::new(),
            // Nobody listens at port 1.
            backing: Backing::external("http://127.0.0.1:1", None).unwrap(),
            bundle: [("kernel", file("k")), ("initrd", file("i")), ("root disk", file("r"))],
            programs: [("QEMU", "/bin/sh".into()), ("the vsock device", "/bin/sh".into())],
            kvm: false,
            run_dir: dir.into(),
            data_dir: dir.into(),
            room: 1,
        }
    }

    async fn missing(facilities: &Facilities) -> Vec<String> {
        let checks = facilities.checks().await;
        let names: Vec<_> = checks.iter().map(|check| check.name).collect();
        assert_eq!(names, ["server", "registry", "builder", "vms", "disk"]);
        checks.into_iter().filter_map(|check| check.missing).collect()
    }

    #[tokio::test]
    async fn each_thing_that_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let whole = facilities(dir.path());
        assert_eq!(missing(&whole).await, ["the registry does not answer"]);

        std::fs::remove_file(dir.path().join("i")).unwrap();
        let programs = [("QEMU", "/bin/sh".into()), ("the vsock device", "/nowhere".into())];
        let broken = Facilities { programs, room: u64::MAX, ..whole };
        let said = missing(&broken).await;
        assert_eq!(said.len(), 4, "{said:?}");
        assert_eq!(said[1], "the builder bundle's initrd is not there");
        assert_eq!(said[2], "the vsock device is not there");
        assert!(said[3].starts_with("the data directory has less than"), "{}", said[3]);

        let programs = [("QEMU", "/bin/sh".into()), ("the vsock device", "/bin/sh".into())];
        let run_dir = dir.path().join("gone");
        let data_dir = run_dir.clone();
        let broken = Facilities { programs, run_dir, data_dir, ..broken };
        let said = missing(&broken).await;
        assert_eq!(
            said[2..],
            ["the run directory cannot be written", "the data directory is not there"]
        );
        broken.draining.cancel();
        assert!(missing(&broken).await[0].contains("drains"));
    }
}
