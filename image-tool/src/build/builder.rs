//! `kind = "builder"`: root disk, kernel and initrd, each made anew only when its own inputs changed.

use std::path::{Path, PathBuf};

use kiln_protocol::version::SUPPORTED;

use super::{BuildError, Built, Request, architecture, require_root};
use crate::bundle::{self, AgentInfo, Bundle, FileInfo, Files, KernelInfo, Manifest, SCHEMA};
use crate::digest::Digest;
use crate::elf;
use crate::file;
use crate::initrd::{self, LoadedModule};
use crate::inputs::{self, Inputs};
use crate::kernel;
use crate::place::Place;
use crate::recipe::{Builder, Recipe};
use crate::rootfs;
use crate::tools::{self, CHROOT, MKFS_EROFS, MMDEBSTRAP};

/// The agent is some 5 MB; a debug build with symbols stays under this.
const MAX_AGENT: u64 = 256 * 1024 * 1024;

const ROOT: &str = "root";
const KERNEL: &str = "kernel";
const AGENT: &str = "agent";

pub(super) async fn build(
    request: &Request,
    recipe: &Recipe,
    builder: &Builder,
    progress: &dyn Fn(&str),
) -> Result<Built, BuildError> {
    let agent = read_agent(request.agent.as_deref())?;
    let wanted = Inputs::default()
        .with(ROOT, inputs::root(&builder.root, &builder.engine, &recipe.files())?)
        .with(KERNEL, inputs::kernel(&builder.kernel))
        .with(AGENT, inputs::agent(builder, &agent));
    // Taken before the older result is looked at: nobody replaces it meanwhile.
    let place = Place::prepare(&request.out)?;
    let old = if request.force { None } else { Old::load(&request.out, progress) };
    if let Some(old) = &old
        && old.inputs == wanted
    {
        return Ok(Built { digest: old.bundle.digest.clone(), made: Vec::new() });
    }
    let kept = |part| old.as_ref().filter(|old| wanted.same(&old.inputs, part));
    if kept(ROOT).is_none() || kept(KERNEL).is_none() {
        require_root()?;
        tools::require(&[MMDEBSTRAP, MKFS_EROFS, CHROOT])?;
    }

    let mut made = Vec::new();
    let root = if let Some(old) = kept(ROOT) {
        old.keep_root(&place)?
    } else {
        made.push(ROOT);
        make_root(recipe, builder, &place, progress).await?
    };
    let kernel = if let Some(old) = kept(KERNEL) {
        old.keep_kernel(&place)?
    } else {
        made.push(KERNEL);
        make_kernel(builder, &place, progress).await?
    };

    progress("packing the initrd");
    made.push("initrd");
    let identity = format!("{}@{}", builder.name, root.file.digest);
    let path = place.dir().join("initrd");
    initrd::write(file::create(&path)?, &agent, &kernel.modules, &identity)?;
    let manifest = Manifest {
        schema: SCHEMA,
        name: builder.name.clone(),
        identity,
        architecture: architecture().to_owned(),
        suite: builder.root.suite.clone(),
        protocol: SUPPORTED,
        agent: AgentInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            digest: Digest::of(&agent),
        },
        kernel: kernel.info,
        engine: root.engine,
        files: Files { kernel: kernel.file, initrd: FileInfo::of(&path)?, root: root.file },
        created: tools::source_date_epoch(),
    };
    let digest = bundle::write(place.dir(), &manifest)?;
    wanted.save(place.dir()).map_err(BuildError::File)?;
    place.commit()?;
    Ok(Built { digest, made })
}

struct RootPart {
    file: FileInfo,
    engine: std::collections::BTreeMap<String, String>,
}

struct KernelPart {
    file: FileInfo,
    info: KernelInfo,
    modules: Vec<LoadedModule>,
}

async fn make_root(
    recipe: &Recipe,
    builder: &Builder,
    place: &Place,
    progress: &dyn Fn(&str),
) -> Result<RootPart, BuildError> {
    let (dir, disk) = (place.scratch("root"), place.dir().join("root.erofs"));
    progress(&format!("installing Debian {} for the root disk", builder.root.suite));
    rootfs::bootstrap(&builder.root, &recipe.files(), &dir).await?;
    let engine = rootfs::versions(&dir, &builder.engine)?;
    progress("packing root.erofs");
    rootfs::to_erofs(&dir, &disk).await?;
    place.discard(&dir)?;
    Ok(RootPart { file: FileInfo::of(&disk)?, engine })
}

async fn make_kernel(
    builder: &Builder,
    place: &Place,
    progress: &dyn Fn(&str),
) -> Result<KernelPart, BuildError> {
    let spec = &builder.kernel;
    let dir = place.scratch("kernel-package");
    progress(&format!("unpacking {} of Debian {}", spec.package, spec.suite));
    let found = kernel::extract(spec, &dir).await?;
    place.discard(&dir)?;
    if !found.plan.built_in.is_empty() {
        progress(&format!(
            "built into kernel {}: {}",
            found.release,
            found.plan.built_in.join(", ")
        ));
    }
    if !found.plan.added.is_empty() {
        progress(&format!("added because others need them: {}", found.plan.added.join(", ")));
    }
    let path = place.dir().join("kernel");
    file::write(&path, &found.image)?;
    let info = KernelInfo {
        release: found.release,
        version: found.version,
        suite: spec.suite.clone(),
        modules: found.modules.iter().map(|m| m.name.clone()).collect(),
    };
    Ok(KernelPart { file: FileInfo::of(&path)?, info, modules: found.modules })
}

/// The result that is there already, undamaged, and what it was made from.
struct Old {
    inputs: Inputs,
    bundle: Bundle,
}

impl Old {
    fn load(out: &Path, progress: &dyn Fn(&str)) -> Option<Self> {
        let inputs = Inputs::load(out)?;
        let checked = Bundle::open(out).and_then(|bundle| bundle.verify().map(|()| bundle));
        match checked {
            Ok(bundle) => Some(Self { inputs, bundle }),
            Err(error) => {
                progress(&format!("the older result is damaged and is made anew: {error}"));
                None
            }
        }
    }

    fn keep_root(&self, place: &Place) -> Result<RootPart, BuildError> {
        file::hard_link(&self.bundle.root, &place.dir().join("root.erofs"))?;
        let manifest = &self.bundle.manifest;
        Ok(RootPart { file: manifest.files.root.clone(), engine: manifest.engine.clone() })
    }

    fn keep_kernel(&self, place: &Place) -> Result<KernelPart, BuildError> {
        file::hard_link(&self.bundle.kernel, &place.dir().join("kernel"))?;
        let manifest = &self.bundle.manifest;
        Ok(KernelPart {
            file: manifest.files.kernel.clone(),
            info: manifest.kernel.clone(),
            modules: initrd::read_modules(&self.bundle.initrd)?,
        })
    }
}

fn read_agent(chosen: Option<&Path>) -> Result<Vec<u8>, BuildError> {
    let path = chosen.map_or_else(default_agent, Path::to_owned);
    let bytes = file::read_bounded(&path, MAX_AGENT)
        .map_err(|source| BuildError::NoAgent(path.clone(), source))?;
    elf::check_static(&path, &bytes)?;
    Ok(bytes)
}

/// `target/release/kiln-agent` when this is `target/release/kiln-image`.
fn default_agent() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.with_file_name("kiln-agent")
}
