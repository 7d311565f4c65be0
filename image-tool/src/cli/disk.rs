//! `kiln-image disk SRC OUT`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use tokio_util::sync::CancellationToken;

use super::{RegistryOptions, print};
use crate::disk::{self, Format, Made, Options, Source};
use crate::registry;

/// A mebibyte.
const MIB: u64 = 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct Disk {
    /// An OCI layout, an archive of one or of `docker save`, or `HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]`
    #[arg(value_name = "SRC")]
    source: String,
    /// The disk to write; an older one is replaced
    out: PathBuf,
    /// The disk's file system
    #[arg(long, value_enum, default_value_t)]
    format: FormatName,
    /// Free room in the file system, in MiB; it takes none in the file
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(..=16 * 1024 * 1024))]
    free_mb: u64,
    /// Which image of several, as in `linux/ARCH` [default: this machine's]
    #[arg(long)]
    arch: Option<String>,
    #[command(flatten)]
    registry: RegistryOptions,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum FormatName {
    /// With a journal; can be mounted to be written
    #[default]
    Ext4,
    /// Read-only, uncompressed
    Erofs,
}

impl Disk {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let mut options = Options { free_bytes: self.free_mb * MIB, ..Options::default() };
        options.format = match self.format {
            FormatName::Ext4 => Format::Ext4,
            FormatName::Erofs => Format::Erofs,
        };
        if let Some(arch) = self.arch {
            options.architecture = arch;
        }
        let cancel = CancellationToken::new();
        let path = Path::new(&self.source);
        let made = if path.exists() || self.source.starts_with(['/', '.']) {
            local(Source::of(path), self.out.clone(), options, &cancel).await
        } else {
            let reference = registry::parse_reference(&self.source)?;
            disk::pull(&reference, &self.registry.into(), &self.out, &options, &cancel).await
        };
        let made = made.with_context(|| format!("cannot make a disk of {}", self.source))?;
        print(&describe(&self.out, &made))
    }
}

async fn local(
    source: Source,
    out: PathBuf,
    options: Options,
    cancel: &CancellationToken,
) -> Result<Made, disk::DiskError> {
    // A signal drops this future; the thread then ends too, and removes what it had begun.
    let _guard = cancel.clone().drop_guard();
    let cancel = cancel.clone();
    let work = move || disk::make(&source, &out, &options, &cancel);
    match tokio::task::spawn_blocking(work).await {
        Ok(made) => made,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(disk::DiskError::Cancelled),
        },
    }
}

fn describe(out: &Path, made: &Made) -> String {
    let (size, nodes) = (made.size / MIB, made.nodes);
    let layers = if made.layers == 1 { "layer" } else { "layers" };
    format!(
        "{}  {}  {size} MiB, {} {layers}, {nodes} files\n",
        made.digest,
        out.display(),
        made.layers
    )
}
