//! Which phase each build is in that a driver of this process has, and since when.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::build::BuildId;

/// From the claim to the agent's Hello.
pub(super) const BOOT: &str = "boot";
/// The Dockerfile.
pub(super) const BUILD: &str = "build";
/// From the engine's push until what was staged is checked.
pub(super) const PUSH: &str = "push";
/// To the registry.
pub(super) const PUBLISH: &str = "publish";

/// As many as there are builds under way.
#[derive(Default)]
pub(super) struct Phases(Mutex<HashMap<BuildId, (&'static str, Instant)>>);

impl Phases {
    /// A build comes into a phase; the one that it leaves, if it is another one and was seen to begin.
    pub(super) fn enter(
        &self,
        id: &BuildId,
        next: &'static str,
    ) -> Option<(&'static str, Duration)> {
        let mut phases = self.lock();
        match phases.get(id) {
            Some((phase, _)) if *phase == next => None,
            _ => phases.insert(id.clone(), (next, Instant::now())).map(lasted),
        }
    }

    /// A build is done with; the phase that it leaves.
    pub(super) fn leave(&self, id: &BuildId) -> Option<(&'static str, Duration)> {
        self.lock().remove(id).map(lasted)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<BuildId, (&'static str, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lasted((phase, since): (&'static str, Instant)) -> (&'static str, Duration) {
    (phase, since.elapsed())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_ends_when_another_begins_and_nothing_is_left_of_a_build() {
        let phases = Phases::default();
        let id = BuildId::new("b1").unwrap();
        assert!(phases.enter(&id, BOOT).is_none());
        assert_eq!(phases.enter(&id, BUILD).unwrap().0, BOOT);
        // What is told twice has begun once.
        assert!(phases.enter(&id, BUILD).is_none());
        assert_eq!(phases.leave(&id).unwrap().0, BUILD);
        assert!(phases.leave(&id).is_none());
        assert!(phases.lock().is_empty());
    }
}
