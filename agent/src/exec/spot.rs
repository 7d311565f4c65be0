//! Whose root a copy's path is in, and who what is copied in belongs to.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kiln_protocol::exec::{Cause, Copy, Place};
use serde_json::{Map, Value};

use super::launch::{Places, Refused, find, own_process, root_of};
use super::target::Enterable;
use crate::run::Root;

/// A path below a root.
#[derive(Debug)]
pub struct Spot {
    root: Root,
    /// Absolute in the root.
    pub path: PathBuf,
    /// Who what is copied in belongs to; whoever the agent is otherwise.
    pub owner: Option<(u32, u32)>,
}

#[cfg_attr(test, allow(clippy::unwrap_used))]
impl Spot {
    #[cfg(test)]
    pub fn below(root: &Path, path: &str, owner: Option<(u32, u32)>) -> Self {
        Self { root: Root::open(root).unwrap(), path: path.into(), owner }
    }

    /// Opens a directory of the root: no link leads out of it.
    pub fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(self.root.open_directory(path)?)
    }
}

/// Finds the root and the path in it.
pub async fn spot(places: &Places, enterable: &Enterable, copy: &Copy) -> Result<Spot, Refused> {
    if copy.path.is_empty() || copy.path.contains('\0') {
        return Err(Refused::new(Cause::Invalid, "a path is needed, without zero bytes"));
    }
    let (root, process) = match copy.place {
        Place::Vm => ("/".into(), Map::new()),
        Place::Job { secrets } => {
            let target = find(enterable, secrets).await?;
            (root_of(places, &target).await?, own_process(&target)?)
        }
    };
    let root = Root::open(&root)
        .map_err(|_| Refused::new(Cause::NoStep, "the step is over; there is nothing to enter"))?;
    let directory = process.get("cwd").and_then(Value::as_str).unwrap_or("/");
    Ok(Spot { root, path: Path::new(directory).join(&copy.path), owner: owner(&process) })
}

/// The user and group of the container's own process.
fn owner(process: &Map<String, Value>) -> Option<(u32, u32)> {
    let user = process.get("user")?;
    let number = |name: &str| u32::try_from(user[name].as_u64()?).ok();
    Some((number("uid")?, number("gid")?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_owner_is_the_process_s_user() {
        let of = |process: Value| owner(process.as_object().unwrap());
        assert_eq!(of(json!({ "user": { "uid": 7, "gid": 8 } })), Some((7, 8)));
        assert_eq!(of(json!({ "user": {} })), None);
        assert_eq!(of(json!({})), None);
    }
}
