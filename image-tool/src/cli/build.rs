//! `kiln-image build DIR -o OUT`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::progress;
use crate::build::{self, Request};

#[derive(Debug, Args)]
pub(super) struct Build {
    /// The recipe: a directory with recipe.toml
    dir: PathBuf,
    /// The directory to make or replace
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// The agent of a builder; by default kiln-agent beside this program
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Make everything anew, with the packages that the mirror has now
    #[arg(long)]
    force: bool,
}

impl Build {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let request =
            Request { recipe: self.dir, out: self.output, agent: self.agent, force: self.force };
        let built = build::build(&request, &progress)
            .await
            .with_context(|| format!("cannot build {}", request.recipe.display()))?;
        let out = request.out.display();
        if built.made.is_empty() {
            progress(&format!("{out} is up to date ({})", built.digest));
        } else {
            progress(&format!("{out}: made {} ({})", built.made.join(", "), built.digest));
        }
        Ok(())
    }
}
