//! Tells the host's log what a build's steps reached, and what they were refused.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::build::BuildId;
use crate::egress::Observer;

/// Refusals of one VM that are logged: enough to see what a build wants, too few to fill a disk. A guest
/// can make thousands in a second.
const MOST_REFUSALS: u32 = 100;

/// The observer of one VM.
pub(super) struct LogEgress {
    id: BuildId,
    refusals: AtomicU32,
}

impl LogEgress {
    pub(super) fn new(id: BuildId) -> Self {
        Self { id, refusals: AtomicU32::new(0) }
    }
}

impl Observer for LogEgress {
    fn reached(&self, host: &str, port: u16) {
        tracing::debug!(id = %self.id, host, port, "a step reached");
    }

    fn refused(&self, host: &str, reason: &str) {
        // Stops at the bound, so that it never comes round.
        let count = |n: u32| (n <= MOST_REFUSALS).then_some(n + 1);
        let before = self.refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        match before {
            Ok(MOST_REFUSALS) => tracing::info!(
                id = %self.id,
                "steps were refused {MOST_REFUSALS} times; further refusals of this VM are not shown"
            ),
            Ok(_) => tracing::info!(id = %self.id, host, reason, "a step was refused"),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn so_many_refusals_are_logged_and_then_one_line_more() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let refuse = |observer: &LogEgress, times: u32| {
            tracing::subscriber::with_default(subscriber, || {
                for _ in 0..times {
                    observer.refused("10.0.0.1", "10.0.0.1 is private");
                }
            });
            let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let observer = LogEgress::new(BuildId::new("b1").unwrap());
        let lines = refuse(&observer, MOST_REFUSALS + 10);
        assert_eq!(lines.len(), MOST_REFUSALS as usize + 1);
        let (last, each) = lines.split_last().unwrap();
        assert!(each.iter().all(|line| line.contains("a step was refused")), "{each:?}");
        assert!(last.contains("further refusals of this VM are not shown"), "{last}");
    }
}
