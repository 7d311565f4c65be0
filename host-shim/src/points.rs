//! Named points at which a test can end the server, as SIGKILL would: between what is durable and what follows from it; and
//! pauses that a test can make shorter. A release has none of it.

/// Ends the process here when `KILN_TEST_KILL_AT` is this name; with `NAME:N`, the Nth time.
#[cfg(debug_assertions)]
pub fn point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static WANTED: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static PASSED: AtomicU32 = AtomicU32::new(0);
    let wanted = WANTED.get_or_init(|| {
        let wanted = std::env::var("KILN_TEST_KILL_AT").ok()?;
        let (name, times) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        Some((name.to_owned(), times.parse().ok()?))
    });
    let Some((wanted, times)) = wanted else { return };
    if wanted == name && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *times {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub fn point(_name: &str) {}

/// How long something takes, or the milliseconds that this variable says.
#[cfg(debug_assertions)]
pub fn shorter(name: &str, usual: std::time::Duration) -> std::time::Duration {
    let milliseconds = std::env::var(name).ok().and_then(|text| text.parse().ok());
    milliseconds.map_or(usual, std::time::Duration::from_millis)
}

/// How long something takes.
#[cfg(not(debug_assertions))]
pub fn shorter(_name: &str, usual: std::time::Duration) -> std::time::Duration {
    usual
}
