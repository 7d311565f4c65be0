//! What a recipe directory asks for: `recipe.toml` read and checked, nothing done.
//!
//! Neighbours: [`crate::build`] does what is asked; [`crate::inputs`] hashes it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::file::{self, FileError};

/// A recipe and where its files are.
#[derive(Debug)]
pub struct Recipe {
    /// The directory that `recipe.toml` lies in.
    pub dir: PathBuf,
    /// What to make.
    pub target: Target,
}

/// The two things that can be made.
#[derive(Debug)]
pub enum Target {
    /// A bundle that builds run in.
    Builder(Builder),
    /// An image for `FROM`.
    Base(Base),
}

/// `kind = "builder"`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Builder {
    #[serde(rename = "kind")]
    _kind: Kind,
    /// The bundle's name.
    pub name: String,
    /// The root disk.
    pub root: Root,
    /// Kernel and modules.
    pub kernel: Kernel,
    /// Packages of the root whose versions `bundle.json` states.
    #[serde(default)]
    pub engine: Vec<String>,
}

/// `kind = "base"`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    #[serde(rename = "kind")]
    _kind: Kind,
    /// The image's name.
    pub name: String,
    /// The one layer.
    pub root: Root,
    /// Its configuration.
    pub image: Image,
}

/// A Debian root.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// Debian's release.
    pub suite: String,
    /// Packages beside the minimal ones.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Paths that dpkg leaves out, as `path-exclude` patterns. They stay in force in the root.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Exceptions from `exclude`.
    #[serde(default)]
    pub include: Vec<String>,
    /// Files and directories of the finished root that are removed.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// The kernel's package; it may come from another release than the root.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Debian's release.
    pub suite: String,
    /// The package, or a metapackage that depends on it.
    pub package: String,
    /// Modules in load order; what they need is added before them.
    pub modules: Vec<String>,
}

/// What the image's configuration says.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The default command.
    pub cmd: Vec<String>,
    /// Variables.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// How the layer is packed.
    pub compression: Compression,
}

/// How a layer is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// For old clients.
    Gzip,
    /// Five times as fast to unpack.
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Builder,
    Base,
}

/// A recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// `recipe.toml` cannot be read.
    #[error("{} is not a recipe directory", dir.display())]
    Unreadable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: FileError,
    },
    /// It is not TOML, or has unknown or missing keys.
    #[error("{} is not a valid recipe", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that could become an option or leave the root.
    #[error("{}: {field} holds {value:?}, {why}", path.display())]
    BadValue {
        /// The file.
        path: PathBuf,
        /// The key.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        why: &'static str,
    },
}

/// A recipe is a page of text; this is many.
const MAX_RECIPE: u64 = 1024 * 1024;

impl Recipe {
    /// Reads `dir/recipe.toml`.
    pub fn load(dir: &Path) -> Result<Self, RecipeError> {
        let path = dir.join("recipe.toml");
        let bytes = file::read_bounded(&path, MAX_RECIPE)
            .map_err(|source| RecipeError::Unreadable { dir: dir.to_owned(), source })?;
        let target = Target::parse(&String::from_utf8_lossy(&bytes), &path)?;
        Ok(Self { dir: dir.to_owned(), target })
    }

    /// Where files that go into the root lie; the directory may be missing.
    pub fn files(&self) -> PathBuf {
        self.dir.join("files")
    }
}

impl Target {
    /// Parses and checks; `path` is for messages only.
    pub fn parse(text: &str, path: &Path) -> Result<Self, RecipeError> {
        #[derive(Deserialize)]
        struct OnlyKind {
            kind: Kind,
        }
        let malformed =
            |source| RecipeError::Malformed { path: path.to_owned(), source: Box::new(source) };
        // In two steps, because an internally tagged enum would lose line numbers.
        let target = match toml::from_str::<OnlyKind>(text).map_err(malformed)?.kind {
            Kind::Builder => Self::Builder(toml::from_str(text).map_err(malformed)?),
            Kind::Base => Self::Base(toml::from_str(text).map_err(malformed)?),
        };
        target.check(path)?;
        Ok(target)
    }

    fn check(&self, path: &Path) -> Result<(), RecipeError> {
        let (name, root) = match self {
            Self::Builder(b) => (&b.name, &b.root),
            Self::Base(b) => (&b.name, &b.root),
        };
        let mut words = vec![("name", name), ("root.suite", &root.suite)];
        words.extend(root.packages.iter().map(|p| ("root.packages", p)));
        if let Self::Builder(b) = self {
            words
                .extend([("kernel.suite", &b.kernel.suite), ("kernel.package", &b.kernel.package)]);
            words.extend(b.kernel.modules.iter().map(|m| ("kernel.modules", m)));
        }
        let bad = |field, value: &String, why| {
            Err(RecipeError::BadValue { path: path.to_owned(), field, value: value.clone(), why })
        };
        for (field, word) in words {
            if !is_word(word) {
                return bad(field, word, "which is not a plain name");
            }
        }
        let patterns = root.exclude.iter().map(|p| ("root.exclude", p));
        for (field, pattern) in patterns.chain(root.include.iter().map(|p| ("root.include", p))) {
            if !pattern.starts_with('/') || pattern.chars().any(char::is_control) {
                return bad(field, pattern, "which is not an absolute path pattern");
            }
        }
        for removed in &root.remove {
            let inside = removed.starts_with('/') && removed.split('/').all(|part| part != "..");
            if !inside || removed.trim_matches('/').is_empty() {
                return bad("root.remove", removed, "which is not an absolute path below /");
            }
        }
        Ok(())
    }
}

/// Debian's package, release and module names; never an option, a path or a list.
fn is_word(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_alphanumeric())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "+-._".contains(c))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const BUILDER: &str = r#"
        kind = "builder"
        name = "builder"
        engine = ["buildah"]
        [root]
        suite = "trixie"
        packages = ["buildah", "libstdc++6"]
        exclude = ["/usr/share/man/*"]
        [kernel]
        suite = "bookworm"
        package = "linux-image-cloud-amd64"
        modules = ["virtio_pci", "crc32c-intel"]
    "#;

    fn parse(text: &str) -> Result<Target, RecipeError> {
        Target::parse(text, Path::new("recipe.toml"))
    }

    fn chain(error: &RecipeError) -> String {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        format!("{error}: {}", cause.unwrap_or_default())
    }

    #[test]
    fn a_builder_is_read() {
        let Target::Builder(b) = parse(BUILDER).unwrap() else { panic!("not a builder") };
        assert_eq!(b.root.packages, ["buildah", "libstdc++6"]);
        assert_eq!((b.kernel.suite.as_str(), b.kernel.modules.len()), ("bookworm", 2));
    }

    #[test]
    fn unknown_keys_are_refused_by_name_and_line() {
        let error = chain(&parse(&BUILDER.replace("exclude", "excludes")).unwrap_err());
        assert!(error.contains("unknown field `excludes`") && error.contains("line 8"), "{error}");
        let error = chain(&parse(&format!("colour = 1\n{BUILDER}")).unwrap_err());
        assert!(error.contains("unknown field `colour`"), "{error}");
    }

    #[test]
    fn kinds_do_not_mix() {
        let error = chain(
            &parse(&BUILDER.replace("\"builder\"\n        name", "\"base\"\n        name"))
                .unwrap_err(),
        );
        assert!(error.contains("unknown field `engine`"), "{error}");
        let error = chain(&parse("kind = \"disk\"").unwrap_err());
        assert!(error.contains("disk"), "{error}");
        let error = chain(&parse("name = \"x\"").unwrap_err());
        assert!(error.contains("missing field `kind`"), "{error}");
    }

    #[test]
    fn values_that_could_be_options_or_paths_are_refused() {
        for (from, to, field) in [
            ("\"buildah\", ", "\"--hook=x\", ", "root.packages"),
            ("\"buildah\", ", "\"a,b\", ", "root.packages"),
            ("\"trixie\"", "\"../x\"", "root.suite"),
            ("\"crc32c-intel\"", "\"../../x\"", "kernel.modules"),
            ("\"/usr/share/man/*\"", "\"usr\"", "root.exclude"),
            ("exclude = [", "remove = [\"/../x\"]\n exclude = [", "root.remove"),
            ("exclude = [", "remove = [\"/\"]\n exclude = [", "root.remove"),
        ] {
            let error = parse(&BUILDER.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(field), "{from} → {to}: {error}");
        }
    }

    #[test]
    fn the_recipes_of_this_repository_are_valid() {
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images");
        assert!(matches!(
            Recipe::load(&images.join("builder")).unwrap().target,
            Target::Builder(_)
        ));
        assert!(matches!(Recipe::load(&images.join("debian")).unwrap().target, Target::Base(_)));
    }

    #[test]
    fn a_directory_without_a_recipe_is_named() {
        let error = Recipe::load(Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.to_string(), "/nowhere is not a recipe directory");
    }
}
