//! `kiln-image publish OUT|LAYOUT REF`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::{RegistryOptions, print, progress};
use crate::{publish, registry};

#[derive(Debug, Args)]
pub(super) struct Publish {
    /// A result of `build`, or an OCI layout with one image
    layout: PathBuf,
    /// `HOST[:PORT]/REPOSITORY[:TAG]`
    #[arg(value_name = "REF")]
    reference: String,
    #[command(flatten)]
    registry: RegistryOptions,
}

impl Publish {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let reference = registry::parse_reference(&self.reference)?;
        let published =
            publish::push_layout(&self.layout, &reference, &self.registry.into(), &progress)
                .await
                .with_context(|| format!("cannot publish {}", self.layout.display()))?;
        print(&format!("{}\n", publish::pinned(&reference, &published.digest)))
    }
}
