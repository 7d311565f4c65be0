//! The tokens that have sessions: a token that opens nothing any more ends them.
//!
//! One that is revoked over the API ends them at once. Its expiry, and what another process writes into the store
//! (`kiln token revoke --data-dir`), are found by reading these tokens again and again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::build::Millis;
use crate::store::{Store, StoreError};
use crate::token::Lapse;

/// The tokens by their public ids.
#[derive(Clone, Default)]
pub(super) struct Tokens(Arc<Mutex<HashMap<String, Known>>>);

/// How many sessions a token has, and how they hear of its end.
#[derive(Default)]
struct Known {
    sessions: usize,
    lapse: watch::Sender<Option<Lapse>>,
}

/// A session of a token's; it counts until it is dropped.
pub(super) struct Inside {
    tokens: Tokens,
    token_id: String,
    /// Why the token opens nothing any more, once that is so.
    pub(super) lapse: watch::Receiver<Option<Lapse>>,
}

impl Tokens {
    /// Counts a session.
    pub(super) fn enter(&self, token_id: &str) -> Inside {
        let mut all = self.lock();
        let known = all.entry(token_id.to_owned()).or_default();
        known.sessions += 1;
        let lapse = known.lapse.subscribe();
        Inside { tokens: self.clone(), token_id: token_id.to_owned(), lapse }
    }

    /// Tells those that are there.
    pub(super) fn end(&self, token_id: &str, why: Lapse) {
        if let Some(known) = self.lock().get(token_id) {
            known.lapse.send_replace(Some(why));
        }
    }

    /// Reads the tokens that have sessions, and ends the sessions of those that open nothing at that time.
    pub(super) async fn check(&self, store: &dyn Store, now: Millis) -> Result<(), StoreError> {
        let inside: Vec<String> = self.lock().keys().cloned().collect();
        for id in inside {
            let token = store.token(&id).await?;
            // One that is not there at all opens nothing either.
            let lapse = token.map_or(Some(Lapse::Revoked), |token| Lapse::of(&token, now));
            if let Some(why) = lapse {
                self.end(&id, why);
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut all = self.tokens.lock();
        if let Some(known) = all.get_mut(&self.token_id) {
            known.sessions -= 1;
            if known.sessions == 0 {
                all.remove(&self.token_id);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::build::Tenant;
    use crate::store::Role;
    use crate::store::sqlite::SqliteStore;
    use crate::token;

    fn why(inside: &Inside) -> Option<Lapse> {
        *inside.lapse.borrow()
    }

    #[test]
    fn only_the_revoked_token_s_sessions_hear_of_it() {
        let tokens = Tokens::default();
        let (first, second, other) = (tokens.enter("a"), tokens.enter("a"), tokens.enter("b"));
        drop(first);
        tokens.end("a", Lapse::Revoked);
        tokens.end("nobody", Lapse::Revoked);
        assert_eq!((why(&second), why(&other)), (Some(Lapse::Revoked), None));
        assert_eq!(why(&tokens.enter("a")), Some(Lapse::Revoked), "it came too late");
        drop((second, other));
        assert!(tokens.lock().is_empty());
    }

    #[tokio::test]
    async fn a_token_that_expires_or_is_revoked_elsewhere_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        let tenant = Tenant::new("acme").unwrap();
        let make = async |ttl| {
            let made = token::create(&store, tenant.clone(), Role::Tenant, ttl, None, 0).await;
            made.unwrap().1.id
        };
        let (short, long) = (make(Some(10)).await, make(None).await);
        let tokens = Tokens::default();
        let (in_short, in_long) = (tokens.enter(&short), tokens.enter(&long));
        let in_unknown = tokens.enter("unknown");
        tokens.check(&store, 9_999).await.unwrap();
        assert_eq!((why(&in_short), why(&in_long)), (None, None));
        assert_eq!(why(&in_unknown), Some(Lapse::Revoked));
        tokens.check(&store, 10_000).await.unwrap();
        assert_eq!((why(&in_short), why(&in_long)), (Some(Lapse::Expired), None));
        store.revoke_token(&long).await.unwrap();
        tokens.check(&store, 10_000).await.unwrap();
        assert_eq!(why(&in_long), Some(Lapse::Revoked));
    }
}
