//! The audit log does not grow for ever: sessions that ended long ago are forgotten.

use super::{BATCH, days_ago};
use crate::build::Millis;
use crate::store::{Store, StoreError};

/// Those that ended so many days ago; how many there were.
pub(super) async fn forget(store: &dyn Store, days: u32, now: Millis) -> Result<u64, StoreError> {
    let Some(before) = days_ago(days, now) else { return Ok(0) };
    let mut all = 0;
    loop {
        let gone = store.forget_sessions(before, BATCH).await?;
        all += gone;
        if gone < u64::from(BATCH) {
            return Ok(all);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::exec::{Exec, Place};

    use super::*;
    use crate::build::{BuildId, Tenant};
    use crate::exec::{End, How, Session, Subject, Who};
    use crate::store::sqlite::SqliteStore;
    use crate::store::{Role, SessionFilter};

    async fn log(store: &dyn Store, started: Millis, ended: Option<Millis>) -> String {
        let tenant = Tenant::new("acme").unwrap();
        let (token_id, token_name) = ("t".into(), None);
        let who = Who { token_id, token_name, role: Role::Tenant, tenant: tenant.clone() };
        let exec = Exec {
            place: Place::Job { secrets: false },
            command: vec!["id".into()],
            env: vec![],
            directory: None,
            user: None,
            terminal: None,
        };
        let subject = Subject::Build(BuildId::new("b").unwrap());
        let session = Session::begin(tenant, subject, who, &exec, started);
        store.insert_session(&session).await.unwrap();
        if let Some(at) = ended {
            let end = End { at, how: How::Exited, exit_code: Some(0), why: None };
            store.end_session(&session.id, &end).await.unwrap();
        }
        session.id
    }

    async fn left(store: &dyn Store) -> Vec<String> {
        let filter = SessionFilter { limit: 200, ..SessionFilter::default() };
        let sessions = store.sessions(&filter).await.unwrap();
        sessions.into_iter().map(|session| session.id).collect()
    }

    const DAYS: Millis = 24 * 60 * 60 * 1000;

    #[tokio::test]
    async fn what_ended_long_ago_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        let now = 1000 * DAYS;
        log(&store, now - 3 * DAYS, Some(now - 2 * DAYS - 1)).await;
        let just = log(&store, now - 4 * DAYS, Some(now - 2 * DAYS)).await;
        let open = log(&store, now - 99 * DAYS, None).await;
        assert_eq!(forget(&store, 2, now).await.unwrap(), 1);
        assert_eq!(left(&store).await, [just, open]);
        assert_eq!(forget(&store, 2, now).await.unwrap(), 0);
        assert_eq!(forget(&store, 0, now).await.unwrap(), 0, "for ever");
    }

    #[tokio::test]
    async fn more_than_go_at_one_time_go_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(dir.path()).await.unwrap();
        for n in 0..5 {
            log(&store, n, Some(9)).await;
        }
        assert_eq!(store.forget_sessions(10, 2).await.unwrap(), 2);
        assert_eq!(left(&store).await.len(), 3, "the oldest go first");
        assert_eq!(forget(&store, 1, 2 * DAYS).await.unwrap(), 3);
    }
}
