//! The configuration files that Kiln gives to buildah, so that none of the builder image's count.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kiln_protocol::name;

/// Where the gateway's registry is reached in the VM's own network namespace.
pub const GATEWAY: &str = "127.0.0.1:5000";

/// Where the files are.
#[derive(Clone, Debug)]
pub struct Files {
    directory: PathBuf,
}

impl Files {
    /// The files of a directory.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Writes them; the directory is made.
    pub fn write(&self, storage: &Path, run_root: &Path) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        self.lead_to(&[])?;
        fs::write(self.policy(), POLICY)?;
        fs::write(self.storage(), storage_conf(storage, run_root))?;
        fs::write(self.containers(), CONTAINERS)
    }

    /// Writes which registries names of images lead to, by way of the gateway.
    pub fn lead_to(&self, upstreams: &[String]) -> io::Result<()> {
        fs::write(self.registries(), registries(upstreams))
    }

    /// `registries.conf`
    pub fn registries(&self) -> PathBuf {
        self.directory.join("registries.conf")
    }

    /// `policy.json`
    pub fn policy(&self) -> PathBuf {
        self.directory.join("policy.json")
    }

    /// `storage.conf`
    pub fn storage(&self) -> PathBuf {
        self.directory.join("storage.conf")
    }

    /// `containers.conf`
    pub fn containers(&self) -> PathBuf {
        self.directory.join("containers.conf")
    }
}

/// Signatures are the host's affair: it decides what the gateway serves.
const POLICY: &str = r#"{"default":[{"type":"insecureAcceptAnything"}]}
"#;

/// Nothing but the defaults, and no variables of the VM in the steps.
const CONTAINERS: &str = "[containers]\nhttp_proxy = false\n";

fn storage_conf(storage: &Path, run_root: &Path) -> String {
    // TOML's basic strings and Rust's debug strings agree on what a path of ours may hold.
    // Debug of a path is a quoted string with escapes, as TOML has them.
    #[allow(clippy::unnecessary_debug_formatting, reason = "it is quoted and escaped")]
    let text = format!(
        "[storage]\ndriver = \"overlay\"\ngraphroot = {storage:?}\nrunroot = {run_root:?}\n"
    );
    text
}

/// Only pulls follow a `location`. A push goes to the host that its destination names.
///
/// One entry for each registry, for the engine tells the gateway nothing of whom it asks but the path: a wildcard's
/// location (`*.example`) would lose the name. What has no entry would be dialled itself, and this VM has no network.
/// No name of a Dockerfile comes in here; [`name::upstream_repository`] lets nothing through that could be more than
/// a name.
///
/// buildah reads `/etc/containers/registries.conf.d` besides, whatever it is told: the builder image
/// has no list of aliases there, or short names would lead to other registries.
fn registries(upstreams: &[String]) -> String {
    let mut text = format!(
        "unqualified-search-registries = [\"{}\"]\nshort-name-mode = \"permissive\"\n",
        name::DEFAULT_UPSTREAM
    );
    let mut lead = |prefix: &str, location: &str| {
        text.push_str(&format!(
            "\n[[registry]]\nprefix = \"{prefix}\"\nlocation = \"{location}\"\ninsecure = true\n"
        ));
    };
    lead(name::REGISTRY, GATEWAY);
    // That one always: the gateway says that it has none.
    let upstreams = upstreams.iter().map(String::as_str);
    let upstreams: BTreeSet<_> = upstreams.chain([name::DEFAULT_UPSTREAM]).collect();
    for upstream in upstreams {
        if let Some(repository) = name::upstream_repository(upstream) {
            lead(upstream, &format!("{GATEWAY}/{repository}"));
        }
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let directory = tempfile::tempdir().unwrap();
        let conf = directory.path().join("engine");
        let files = Files::new(&conf);
        files.write(Path::new("/s"), Path::new("/r")).unwrap();
        // Again over what is there.
        files.write(Path::new("/s"), Path::new("/r")).unwrap();
        let all = [files.registries(), files.policy(), files.storage(), files.containers()]
            .map(|path| fs::read_to_string(path).unwrap());
        insta::assert_snapshot!(all.join("---\n"));
    }

    #[test]
    fn every_upstream_has_its_place_at_the_gateway_and_nothing_else_does() {
        let upstreams =
            ["quay.io", "registry.example:5000", "docker.io", "a\"]\nblocked", "registry", ""];
        insta::assert_snapshot!(registries(&upstreams.map(str::to_owned)));
    }
}
