//! Which step runs now: for what is told of the steps' network, whose connections name nobody.
//!
//! The engine runs one step at a time, and when a step is over the kernel has ended all of its processes: whoever
//! connects is of the step that runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The number of the step that runs. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct CurrentStep(Arc<AtomicU32>);

/// No step has this number.
const NONE: u32 = 0;

impl CurrentStep {
    /// This step runs until what is returned goes.
    #[must_use]
    pub fn begin(&self, index: u32) -> Running {
        self.0.store(index, Ordering::SeqCst);
        Running { current: self.clone(), index }
    }

    /// The step that runs, if one does.
    pub fn now(&self) -> Option<u32> {
        Some(self.0.load(Ordering::SeqCst)).filter(|index| *index != NONE)
    }
}

/// A step while it runs.
#[derive(Debug)]
pub struct Running {
    current: CurrentStep,
    index: u32,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Where another one has begun, that one goes on.
        let step = &self.current.0;
        let _ = step.compare_exchange(self.index, NONE, Ordering::SeqCst, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_the_current_one_until_it_ends() {
        let current = CurrentStep::default();
        assert_eq!(current.now(), None);
        let first = current.begin(1);
        assert_eq!(current.clone().now(), Some(1));
        let second = current.begin(2);
        drop(first);
        assert_eq!(current.now(), Some(2));
        drop(second);
        assert_eq!(current.now(), None);
    }
}
