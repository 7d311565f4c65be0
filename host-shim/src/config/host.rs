//! What defaults depend on: who runs `kiln serve`, and where programs are.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{ConfigError, MOST_MEMORY_MB, path};

/// Where programs are besides `PATH`: the Debian package's own, and what a service's `PATH` often lacks.
const USUAL: [&str; 5] = ["/usr/libexec/kiln", "/usr/local/bin", "/usr/bin", "/usr/sbin", "/bin"];

/// Left for the host itself, in MiB, besides an eighth for what VMs cost beyond their own memory.
const RESERVE_MB: u64 = 512;

/// The host as far as defaults need it.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Whether root runs it.
    pub root: bool,
    /// `HOME`.
    pub home: Option<PathBuf>,
    /// `XDG_DATA_HOME`.
    pub data_home: Option<PathBuf>,
    /// `XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// `PATH`.
    pub path: Option<OsString>,
    /// Processors that this process may use.
    pub cpus: usize,
    /// Its memory, in MiB; `None` when it is not known.
    pub memory_mb: Option<u64>,
}

impl Host {
    /// This one.
    pub fn current() -> Self {
        // A relative one is to be ignored, by the XDG base directory specification.
        let dir = |name| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
        Self {
            root: nix::unistd::geteuid().is_root(),
            home: dir("HOME"),
            data_home: dir("XDG_DATA_HOME"),
            runtime_dir: dir("XDG_RUNTIME_DIR"),
            path: std::env::var_os("PATH"),
            cpus: std::thread::available_parallelism().map_or(1, Into::into),
            memory_mb: crate::kept::total_mb(),
        }
    }

    pub(super) fn cpus(&self) -> u32 {
        u32::try_from(self.cpus).unwrap_or(1).clamp(1, 1024)
    }

    /// What VMs may have of its memory: all but an eighth and [`RESERVE_MB`].
    pub(super) fn vm_memory_mb(&self) -> u32 {
        let Some(memory_mb) = self.memory_mb else { return MOST_MEMORY_MB };
        let left = memory_mb.saturating_sub(memory_mb / 8 + RESERVE_MB);
        u32::try_from(left).unwrap_or(MOST_MEMORY_MB).clamp(256, MOST_MEMORY_MB)
    }

    pub(super) fn data_dir(&self) -> Option<PathBuf> {
        if self.root {
            return Some("/var/lib/kiln".into());
        }
        let home = || self.home.as_ref().map(|home| home.join(".local/share"));
        Some(self.data_home.clone().or_else(home)?.join("kiln"))
    }

    pub(super) fn run_dir(&self) -> Option<PathBuf> {
        match &self.runtime_dir {
            Some(dir) => Some(dir.join("kiln")),
            None => self.root.then(|| "/run/kiln".into()),
        }
    }

    /// A program: the one that was given, which has to be there, or the first of its name in
    /// `PATH`, the usual places and cargo's. Its bare name otherwise: who needs it says so, and
    /// where it comes from.
    pub(super) fn program(
        &self,
        flag: &'static str,
        given: Option<PathBuf>,
        name: &str,
    ) -> Result<PathBuf, ConfigError> {
        if let Some(given) = given {
            let absolute = path(flag, &given)?;
            if is_program(&absolute) {
                return Ok(absolute);
            }
            return Err(ConfigError::refused(
                flag,
                format!("{}", absolute.display()),
                "the path of a program",
            ));
        }
        let path = self.path.as_ref().map(std::env::split_paths).into_iter().flatten();
        let cargo = self.home.as_ref().map(|home| home.join(".cargo/bin"));
        let mut places = path.chain(USUAL.map(PathBuf::from)).chain(cargo);
        // An empty or relative entry of PATH means another place tomorrow.
        let found = places.find(|place| place.is_absolute() && is_program(&place.join(name)));
        Ok(found.map_or_else(|| name.into(), |place| place.join(name)))
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
