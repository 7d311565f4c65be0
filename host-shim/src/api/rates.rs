//! How fast one token may ask: so many requests a second, and twice that at once after a pause. Beyond it a token is told when to
//! come back, and the others do not notice.
//!
//! The generic cell rate algorithm (ITU-T I.371, annex A): of each token only the time is kept at which all that it
//! has asked will have been due. Who asks nothing takes no memory.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::error::ApiError;

/// What may be asked at once after a pause: the requests of so long. A page of a list is followed by a burst.
const BURST: Duration = Duration::from_secs(2);
/// Tokens that are kept before the first look for idle ones.
const FIRST_SWEEP: usize = 1024;

/// The rates of all tokens.
pub(super) struct Rates {
    interval: Duration,
    per_second: u32,
    tokens: Mutex<Tokens>,
}

struct Tokens {
    /// By a token's public id.
    due: HashMap<String, Instant>,
    sweep_at: usize,
}

impl Rates {
    /// So many requests of one token.
    pub(super) fn new(per_second: u32) -> Self {
        let per_second = per_second.max(1);
        let interval = Duration::from_secs(1) / per_second;
        let tokens = Tokens { due: HashMap::new(), sweep_at: FIRST_SWEEP };
        Self { interval, per_second, tokens: Mutex::new(tokens) }
    }

    /// Counts a request of a token's, unless there were too many.
    pub(super) fn admit(&self, token: &str) -> Result<(), ApiError> {
        self.admit_at(token, Instant::now()).map_err(|wait| {
            let most = self.per_second;
            let message =
                format!("this token asks more often than {most} times a second; try again later");
            // Rounded up: sooner would be too soon.
            let seconds = u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
            ApiError::too_many("too_many_requests", message, seconds.max(1))
        })
    }

    fn admit_at(&self, token: &str, now: Instant) -> Result<(), Duration> {
        // Every change is a single step, so a panic elsewhere leaves nothing half done.
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let due = tokens.due.get(token).copied().filter(|due| *due > now).unwrap_or(now);
        let after = due + self.interval;
        if let Some(wait) = (after - now).checked_sub(BURST).filter(|wait| !wait.is_zero()) {
            return Err(wait);
        }
        tokens.due.insert(token.to_owned(), after);
        if tokens.due.len() >= tokens.sweep_at {
            tokens.due.retain(|_, due| *due > now);
            tokens.sweep_at = FIRST_SWEEP.max(2 * tokens.due.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_the_rate() {
        let rates = Rates::new(10);
        let begun = Instant::now();
        let taken = |token: &str, at: u64| {
            let at = begun + Duration::from_millis(at);
            (0..1000).take_while(|_| rates.admit_at(token, at).is_ok()).count()
        };
        assert_eq!(taken("a", 0), 20);
        assert_eq!(taken("b", 0), 20, "another token is another's");
        assert_eq!(rates.admit_at("a", begun), Err(Duration::from_millis(100)));
        assert_eq!(taken("a", 99), 0);
        assert_eq!(taken("a", 100), 1, "what was refused does not count");
        assert_eq!(taken("a", 1100), 10);
        assert_eq!(taken("a", 60_000), 20, "no more than a burst is saved up");
    }

    #[test]
    fn who_is_refused_is_told_when_to_come_back() {
        let rates = Rates::new(1);
        assert!(rates.admit("a").is_ok() && rates.admit("a").is_ok());
        assert_eq!(rates.admit("a").map_err(|error| error.code()), Err("too_many_requests"));
    }

    #[test]
    fn idle_tokens_take_no_memory() {
        let rates = Rates::new(1000);
        let begun = Instant::now();
        for n in 0..10 * FIRST_SWEEP as u64 {
            let at = begun + Duration::from_millis(n);
            assert!(rates.admit_at(&n.to_string(), at).is_ok());
        }
        let tokens = rates.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(tokens.due.len() <= FIRST_SWEEP, "{}", tokens.due.len());
    }
}
