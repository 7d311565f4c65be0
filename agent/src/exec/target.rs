//! What can be entered now.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, oneshot};

/// A container that can be entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// What the container runtime calls it.
    pub id: String,
    /// The runtime's own directory, where it is not the usual one.
    pub root: Option<PathBuf>,
    /// Its config: whose process a session's is like.
    pub config: PathBuf,
    /// Its cgroup, from the hierarchy's root.
    pub cgroup: PathBuf,
    /// Whether its processes see secrets of the build.
    pub secrets: bool,
}

/// The container that can be entered now, if there is one. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Enterable(Arc<Mutex<Option<Way>>>);

/// How one gets to a container.
#[derive(Clone, Debug)]
pub enum Way {
    /// It is there.
    Open(Target),
    /// A failed step that stays: its container is made when somebody asks for it.
    Ask(mpsc::Sender<Wanted>),
}

/// Somebody wants to enter the failed step.
#[derive(Debug)]
pub struct Wanted {
    /// With the step's secrets.
    pub secrets: bool,
    /// The container, or why there is none.
    pub answer: oneshot::Sender<Result<Target, String>>,
}

impl Enterable {
    /// From now on this one can be entered.
    pub fn open(&self, target: Target) {
        *self.lock() = Some(Way::Open(target));
    }

    /// From now on a failed step can be entered, by asking for it.
    pub fn ask(&self, at: mpsc::Sender<Wanted>) {
        *self.lock() = Some(Way::Ask(at));
    }

    /// The container of this name is over. Another one stays.
    pub fn close(&self, id: &str) {
        self.lock().take_if(|way| matches!(way, Way::Open(target) if target.id == id));
    }

    /// What can be entered now.
    pub fn now(&self) -> Option<Way> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Way>> {
        // It holds one value, which is whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_that_ends_is_closed() {
        let target = |id: &str| Target {
            id: id.into(),
            root: None,
            config: "/c".into(),
            cgroup: "/kiln/steps/1".into(),
            secrets: false,
        };
        let (enterable, other) = (Enterable::default(), Enterable::default());
        let clone = enterable.clone();
        enterable.open(target("one"));
        enterable.open(target("two"));
        enterable.close("one");
        assert!(matches!(clone.now(), Some(Way::Open(found)) if found == target("two")));
        clone.close("two");
        assert!(enterable.now().is_none() && other.now().is_none());
        let (asked, _) = mpsc::channel(1);
        enterable.ask(asked);
        enterable.close("two");
        assert!(matches!(clone.now(), Some(Way::Ask(_))), "a failed step stays");
    }
}
