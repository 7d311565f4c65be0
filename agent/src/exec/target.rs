//! What can be entered now.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// A container that can be entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// What the container runtime calls it.
    pub id: String,
    /// The runtime's own directory, where it is not the usual one.
    pub root: Option<PathBuf>,
    /// Its config: whose process a session's is like.
    pub config: PathBuf,
    /// Whether its processes see secrets of the build.
    pub secrets: bool,
}

/// The container that can be entered now, if there is one. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Enterable(Arc<Mutex<Option<Target>>>);

impl Enterable {
    /// From now on this one can be entered.
    pub fn open(&self, target: Target) {
        *self.lock() = Some(target);
    }

    /// The container of this name is over. Another one stays.
    pub fn close(&self, id: &str) {
        self.lock().take_if(|target| target.id == id);
    }

    /// What can be entered now.
    pub fn now(&self) -> Option<Target> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Target>> {
        // It holds one value, which is whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_that_ends_is_closed() {
        let target =
            |id: &str| Target { id: id.into(), root: None, config: "/c".into(), secrets: false };
        let (enterable, seen) = (Enterable::default(), Enterable::default());
        let clone = enterable.clone();
        enterable.open(target("one"));
        enterable.open(target("two"));
        enterable.close("one");
        assert_eq!(clone.now(), Some(target("two")));
        clone.close("two");
        assert_eq!((enterable.now(), seen.now()), (None, None));
    }
}
