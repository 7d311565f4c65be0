//! Time and randomness, which a VM that was restored from a snapshot has no way to know.

use std::io;

use kiln_protocol::hello::Welcome;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use super::sys;

/// Takes clock and entropy from the host. Only from the first Welcome of a session: a clock that
/// jumps during a build confuses it.
pub fn take_from(welcome: &Welcome) -> io::Result<()> {
    sys::add_entropy(&welcome.entropy)?;
    clock_settime(ClockId::CLOCK_REALTIME, time(welcome.time_ms))?;
    Ok(())
}

fn time(ms: u64) -> TimeSpec {
    let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
    // Less than a thousand million, which always fits.
    let nanoseconds = i64::try_from(ms % 1000 * 1_000_000).unwrap_or(0);
    TimeSpec::new(seconds, nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_become_a_time() {
        assert_eq!(time(1_700_000_000_123), TimeSpec::new(1_700_000_000, 123_000_000));
        assert_eq!(time(0), TimeSpec::new(0, 0));
        assert_eq!(time(999), TimeSpec::new(0, 999_000_000));
    }
}
