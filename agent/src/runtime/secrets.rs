//! The secrets of a step, as its wrapper gives them: in place of the placeholders that the engine has, and as
//! variables.
//!
//! buildah copies a secret's file and mounts the copy, by way of a mount namespace in between: neither path nor inode
//! tell what it is, but the content does.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

/// Where a secret that a step wants as a variable is mounted, by the Dockerfile as the agent rewrote it. The
/// mount is taken away again: only the variable's name counts.
pub const VARIABLE_MOUNTS: &str = "/dev/kiln-secret-variables";

/// A secret that a step may have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepSecret {
    /// What its placeholder holds.
    pub marker: String,
    /// Holds the value.
    pub file: PathBuf,
    /// A variable of every step that is to hold it.
    pub variable: Option<String>,
}

/// Where a step sees secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// In files.
    pub mounted: bool,
    /// In variables, so that its config holds a value itself.
    pub in_config: bool,
}

impl Placed {
    /// Whether it sees any.
    pub fn any(self) -> bool {
        self.mounted || self.in_config
    }
}

/// Puts the values into a step's config. Copies for its mounts go below `directory`, which is memory, with the mode
/// and the owner that the engine gave to its own. Tells where the step sees any.
pub fn place(
    spec: &mut Spec,
    secrets: &[StepSecret],
    directory: &Path,
    container: &OsStr,
) -> io::Result<Placed> {
    let (mut variables, mut mounted) = (Vec::new(), false);
    for secret in secrets {
        if let Some(name) = &secret.variable {
            variables.push((name.clone(), secret));
        }
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let mut kept = Vec::with_capacity(mounts.len());
    for (index, mut mount) in mounts.drain(..).enumerate() {
        let Some((secret, given)) = mount
            .source()
            .as_ref()
            .and_then(|source| Some((of_source(secrets, source)?, source.clone())))
        else {
            kept.push(mount);
            continue;
        };
        if let Ok(name) = mount.destination().strip_prefix(VARIABLE_MOUNTS) {
            variables.push((name.display().to_string(), secret));
            continue;
        }
        let mut name = container.to_owned();
        name.push(format!("-{index}"));
        let copy = directory.join(name);
        copy_like(&secret.file, &given, &copy)?;
        mounted = true;
        mount.set_source(Some(copy));
        kept.push(mount);
    }
    spec.set_mounts(Some(kept));
    let in_config = !variables.is_empty();
    if let Some(mut process) = spec.process().clone() {
        let env = process.env_mut().get_or_insert_default();
        for (name, secret) in variables {
            let value = fs::read_to_string(&secret.file)?;
            // The secret wins: the image's own would hide it.
            env.retain(|entry| entry.split_once('=').is_none_or(|(key, _)| key != name));
            env.push(format!("{name}={value}"));
        }
        spec.set_process(Some(process));
    }
    Ok(Placed { mounted, in_config })
}

/// The secret whose placeholder, or a copy of it, is at `source`.
fn of_source<'a>(secrets: &'a [StepSecret], source: &Path) -> Option<&'a StepSecret> {
    let meta = fs::symlink_metadata(source).ok().filter(fs::Metadata::is_file)?;
    let is_long_enough = |secret: &&StepSecret| secret.marker.len() as u64 == meta.len();
    // Nearly every source is something else, and is not read.
    secrets.iter().find(is_long_enough)?;
    let content = fs::read(source).ok()?;
    secrets.iter().find(|secret| secret.marker.as_bytes() == content)
}

fn copy_like(from: &Path, like: &Path, to: &Path) -> io::Result<()> {
    let like = fs::symlink_metadata(like)?;
    let mut copy = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    io::copy(&mut File::open(from)?, &mut copy)?;
    fchown(&copy, Some(like.uid()), Some(like.gid()))?;
    copy.set_permissions(fs::Permissions::from_mode(like.mode() & 0o7777))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    struct Step {
        dir: tempfile::TempDir,
        secrets: Vec<StepSecret>,
    }

    impl Step {
        /// A step of a build that has the secrets `npm` and `pip`, the second of them as a variable too.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let secrets = [("npm", None), ("pip", Some("PIP"))].map(|(id, variable)| {
                let file = dir.path().join(id);
                fs::write(&file, format!("{id} value\n")).unwrap();
                let marker = format!("marker of {id}");
                fs::write(dir.path().join(format!("copy of {id}")), &marker).unwrap();
                StepSecret { marker, file, variable: variable.map(str::to_owned) }
            });
            Self { dir, secrets: secrets.to_vec() }
        }

        /// The engine's copy of a placeholder.
        fn source(&self, id: &str) -> PathBuf {
            self.dir.path().join(format!("copy of {id}"))
        }

        fn place(&self, mounts: &Value) -> (Value, Placed) {
            let spec = json!({
                "ociVersion": "1.0.0",
                "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["A=1", "PIP=image"]},
                "mounts": mounts,
            });
            let mut spec: Spec = serde_json::from_value(spec).unwrap();
            let held =
                place(&mut spec, &self.secrets, self.dir.path(), OsStr::new("container")).unwrap();
            (serde_json::to_value(spec).unwrap(), held)
        }
    }

    #[test]
    fn a_mounts_file_is_replaced_by_the_value_with_its_mode() {
        let step = Step::new();
        fs::set_permissions(step.source("npm"), fs::Permissions::from_mode(0o440)).unwrap();
        // As long as a marker.
        let file = step.dir.path().join("other");
        fs::write(&file, "marker of xyz").unwrap();
        let other = json!({"destination": "/b", "type": "bind", "source": file});
        let mount = json!({"destination": "/run/secrets/npm", "source": step.source("npm")});
        let (config, held) = step.place(&json!([other, mount]));
        assert!(held.in_config, "the variable of every step");
        assert_eq!(config["mounts"][0]["source"], file.to_str().unwrap());
        let copy = step.dir.path().join("container-1");
        assert_eq!(config["mounts"][1]["source"], copy.to_str().unwrap());
        assert_eq!(fs::read_to_string(&copy).unwrap(), "npm value\n");
        assert_eq!(fs::metadata(&copy).unwrap().mode() & 0o7777, 0o440);
    }

    #[test]
    fn variables_hold_the_bytes_as_they_are_and_win() {
        let mut step = Step::new();
        let wanted = format!("{VARIABLE_MOUNTS}/NPM_TOKEN");
        let (config, held) =
            step.place(&json!([{"destination": wanted, "source": step.source("npm")}]));
        assert!(held.in_config);
        assert_eq!(config["mounts"], json!([]));
        assert_eq!(
            config["process"]["env"],
            json!(["A=1", "PIP=pip value\n", "NPM_TOKEN=npm value\n"])
        );
        step.secrets[1].variable = None;
        let (config, held) = step.place(&json!([]));
        assert!(!held.any());
        assert_eq!(config["process"]["env"], json!(["A=1", "PIP=image"]));
    }
}
