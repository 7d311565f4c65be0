//! `kiln-image verify DIR|REF`.

use anyhow::Context as _;
use clap::Args;

use super::{RegistryOptions, Subject, print};
use crate::verify;

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// A directory, or `HOST[:PORT]/REPOSITORY[:TAG]`
    #[arg(value_name = "DIR|REF")]
    subject: String,
    #[command(flatten)]
    registry: RegistryOptions,
}

impl Verify {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let checked = match Subject::parse(&self.subject)? {
            Subject::Dir(dir) => verify::verify_dir(&dir),
            Subject::Ref(reference) => verify::verify_ref(&reference, &self.registry.into()).await,
        };
        let digest = checked.with_context(|| format!("cannot verify {}", self.subject))?;
        print(&format!("{digest}\n"))
    }
}
