//! When tokens were last used: noted in memory by requests, stored by a task of its own once a minute. No request waits for
//! it, and a server that is killed has forgotten at most a minute of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::build::Millis;
use crate::causes::chain;
use crate::store::{Store, StoreError};

/// How often uses are stored, and how coarse they are.
const EVERY: Duration = Duration::from_mins(1);

/// Uses that are not stored yet. Cheap to clone. Only tokens that were valid are noted, so there are no more than those.
#[derive(Clone, Debug, Default)]
pub struct Uses(Arc<Mutex<HashMap<String, Millis>>>);

impl Uses {
    /// A token was shown, and is valid.
    pub fn note(&self, token_id: &str, now: Millis) {
        let mut uses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match uses.get_mut(token_id) {
            Some(last) => *last = now.max(*last),
            None => {
                uses.insert(token_id.to_owned(), now);
            }
        }
    }

    /// Stores what was noted. What cannot be stored is noted still.
    pub async fn store(&self, store: &dyn Store) -> Result<(), StoreError> {
        let noted = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if noted.is_empty() {
            return Ok(());
        }
        let uses: Vec<_> = noted.into_iter().collect();
        let stored = store.tokens_used(&uses).await;
        if stored.is_err() {
            for (id, at) in &uses {
                self.note(id, *at);
            }
        }
        stored
    }

    /// Stores once a minute, and at the end.
    pub async fn run(self, store: Arc<dyn Store>, stop: CancellationToken) {
        loop {
            let over = stop.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_none();
            if let Err(error) = self.store(store.as_ref()).await {
                let error = chain(&error);
                tracing::warn!(error, "when tokens were used cannot be stored now");
            }
            if over {
                return;
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
    use crate::token::create;

    #[tokio::test]
    async fn the_latest_use_is_stored_and_kept_until_it_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        let tenant = Tenant::new("acme").unwrap();
        let (_, token) = create(&store, tenant, Role::Reader, None, None, 0).await.unwrap();
        let last =
            async |store: &SqliteStore| store.token(&token.id).await.unwrap().unwrap().last_used_at;
        let uses = Uses::default();
        uses.store(&store).await.unwrap();
        assert_eq!(last(&store).await, None);
        uses.note(&token.id, 2_000);
        uses.note(&token.id, 1_000);
        uses.note("of a token that is gone", 1_000);
        uses.store(&store).await.unwrap();
        assert_eq!(last(&store).await, Some(2_000));
        assert!(uses.0.lock().unwrap().is_empty());
        // A clock that went back takes nothing back.
        uses.note(&token.id, 1_500);
        uses.store(&store).await.unwrap();
        assert_eq!(last(&store).await, Some(2_000));

        store.close().await;
        uses.note(&token.id, 3_000);
        assert!(uses.store(&store).await.is_err());
        let store = SqliteStore::open(dir.path()).await.unwrap();
        uses.store(&store).await.unwrap();
        assert_eq!(last(&store).await, Some(3_000));
    }

    #[tokio::test]
    async fn a_server_that_stops_stores_what_was_noted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(SqliteStore::open(dir.path()).await.unwrap());
        let tenant = Tenant::new("acme").unwrap();
        let (_, token) = create(&*store, tenant, Role::Reader, None, None, 0).await.unwrap();
        let (uses, stop) = (Uses::default(), CancellationToken::new());
        uses.note(&token.id, 1_000);
        stop.cancel();
        uses.run(store.clone(), stop).await;
        assert_eq!(store.token(&token.id).await.unwrap().unwrap().last_used_at, Some(1_000));
    }
}
