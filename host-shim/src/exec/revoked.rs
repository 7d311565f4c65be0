//! The tokens that have sessions: a token that is revoked ends them. Pure but for a lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// How many sessions each token has, and how they hear of its revocation.
#[derive(Clone, Default)]
pub(super) struct Tokens(Arc<Mutex<HashMap<String, (usize, CancellationToken)>>>);

/// A session of a token's; it counts until it is dropped.
pub(super) struct Inside {
    tokens: Tokens,
    token_id: String,
    /// Cancelled when the token is revoked.
    pub(super) revoked: CancellationToken,
}

impl Tokens {
    /// Counts a session.
    pub(super) fn enter(&self, token_id: &str) -> Inside {
        let mut all = self.lock();
        let (count, revoked) = all.entry(token_id.to_owned()).or_default();
        *count += 1;
        Inside { tokens: self.clone(), token_id: token_id.to_owned(), revoked: revoked.clone() }
    }

    /// Tells those that are there.
    pub(super) fn revoke(&self, token_id: &str) {
        if let Some((_, revoked)) = self.lock().get(token_id) {
            revoked.cancel();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (usize, CancellationToken)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut all = self.tokens.lock();
        if let Some((count, _)) = all.get_mut(&self.token_id) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.token_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_revoked_token_s_sessions_hear_of_it() {
        let tokens = Tokens::default();
        let (first, second, other) = (tokens.enter("a"), tokens.enter("a"), tokens.enter("b"));
        drop(first);
        tokens.revoke("a");
        tokens.revoke("nobody");
        assert!(second.revoked.is_cancelled() && !other.revoked.is_cancelled());
        drop((second, other));
        assert!(tokens.lock().is_empty());
    }
}
