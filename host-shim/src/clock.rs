//! The host's clock.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::build::Millis;

/// Now, in milliseconds since the Unix epoch.
pub fn now() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Millis::try_from(since.as_millis()).unwrap_or(Millis::MAX)
}

/// A time as the API writes it.
pub fn rfc3339(at: Millis) -> String {
    // Out of range only by a clock that is off by millennia.
    // Always three digits, so that times sort as texts.
    let at = jiff::Timestamp::from_millisecond(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{at:.3}")
}
