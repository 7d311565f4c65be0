//! Tells the host's log what kind of address a build's steps were refused, and not which: the name is the guest's word,
//! and a step can make it of a secret, in whatever form. The step itself is told all of it.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::build::BuildId;
use crate::egress::Observer;
use crate::egress::policy::Class;

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
    fn reached(&self, _host: &str, port: u16) {
        tracing::debug!(id = %self.id, port, "a step reached the network");
    }

    fn refused(&self, _host: &str, class: Option<Class>) {
        // Stops at the bound, so that it never comes round.
        let count = |n: u32| (n <= MOST_REFUSALS).then_some(n + 1);
        let before = self.refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        match before {
            Ok(MOST_REFUSALS) => tracing::info!(
                id = %self.id,
                "steps were refused {MOST_REFUSALS} times; further refusals of this VM are not shown"
            ),
            Ok(_) => {
                let what = class.map_or("the build has no network".to_owned(), |c| c.to_string());
                tracing::info!(id = %self.id, what, "a step was refused");
            }
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
                    observer.refused("hunter2.example", Some(Class::Private));
                }
            });
            let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let observer = LogEgress::new(BuildId::new("b1").unwrap());
        let lines = refuse(&observer, MOST_REFUSALS + 10);
        assert_eq!(lines.len(), MOST_REFUSALS as usize + 1);
        let (last, each) = lines.split_last().unwrap();
        let whole =
            |line: &&String| line.contains("a step was refused") && line.contains("private");
        assert_eq!(each.iter().filter(whole).count(), each.len(), "{each:?}");
        assert!(!lines.concat().contains("hunter2"), "{lines:?}");
        assert!(last.contains("further refusals of this VM are not shown"), "{last}");
    }
}
