//! From a recipe to a result: decides what must be made anew, makes it, puts it in place.
//!
//! Neighbours: [`crate::inputs`] says what changed, [`crate::rootfs`], [`crate::kernel`] and
//! [`crate::initrd`] make the parts, [`crate::place`] replaces the older result.

mod base;
mod builder;

use std::path::PathBuf;

use crate::bundle::BundleError;
use crate::digest::Digest;
use crate::elf::NotAnAgent;
use crate::file::FileError;
use crate::initrd::InitrdError;
use crate::kernel::KernelError;
use crate::layout::LayoutError;
use crate::place::PlaceError;
use crate::recipe::{Recipe, RecipeError, Target};
use crate::rootfs::RootfsError;
use crate::tools::ToolError;

/// What to build.
#[derive(Debug)]
pub struct Request {
    /// The recipe's directory.
    pub recipe: PathBuf,
    /// Where the result goes.
    pub out: PathBuf,
    /// The agent's program; by default `kiln-agent` beside this program.
    pub agent: Option<PathBuf>,
    /// Makes everything anew, with the packages that mirrors have now.
    pub force: bool,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Built {
    /// Digest of the OCI manifest.
    pub digest: Digest,
    /// The parts that were made; empty when the result was up to date.
    pub made: Vec<&'static str>,
}

/// The build failed; an older result is untouched.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The recipe.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The place of the result.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A program.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The root.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initrd.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The agent's program cannot be used.
    #[error(transparent)]
    Agent(#[from] NotAnAgent),
    /// The agent's program is not there.
    #[error("no agent at {}; build it (cargo build -p kiln-agent) or name it with --agent", .0.display())]
    NoAgent(PathBuf, #[source] FileError),
    /// Device nodes and owners need root.
    #[error("building an image needs root: it makes device nodes and files of other owners")]
    NotRoot,
}

/// Builds; `progress` gets one line for each step.
pub async fn build(request: &Request, progress: &dyn Fn(&str)) -> Result<Built, BuildError> {
    let recipe = Recipe::load(&request.recipe)?;
    match &recipe.target {
        Target::Builder(builder) => builder::build(request, &recipe, builder, progress).await,
        Target::Base(base) => base::build(request, &recipe, base, progress).await,
    }
}

fn require_root() -> Result<(), BuildError> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(BuildError::NotRoot) }
}

/// Debian's name of the architecture that this machine, and so the image, has.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
