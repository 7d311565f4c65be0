//! A store that fails, or whose caller breaks down, as often as a test wants.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use kiln::build::{Build, BuildId, Change, Failure, Millis, Tenant};
use kiln::exec::{End, Session};
use kiln::instances::instance::{self, Instance, InstanceId};
use kiln::secrets::Sealed;
use kiln::store::sqlite::SqliteStore;
use kiln::store::{
    Claimed, Fence, Filter, FinishedLog, IdempotencyKey, NewEvent, Next, Piece, SecretRecord,
    SessionFilter, Store, StoreError, StoredEvent, TokenRecord, Unfinished,
};
use kiln_protocol::secret::SecretId;
use tokio::sync::watch;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is stored.
    Fails,
    /// It is stored, and the caller is told that it failed.
    Unheard,
    /// The caller panics.
    Panics,
}

/// SQLite, and what is wrong with it.
pub struct Faulty {
    store: SqliteStore,
    /// By the name of a call: what becomes of it, and how often.
    faults: Mutex<BTreeMap<&'static str, (Fault, u32)>>,
    /// How many calls had a fault.
    had: watch::Sender<u32>,
}

impl Faulty {
    pub fn new(store: SqliteStore) -> Arc<Self> {
        Arc::new(Self { store, faults: Mutex::default(), had: watch::Sender::new(0) })
    }

    pub fn fault(&self, call: &'static str, fault: Fault, times: u32) {
        self.faults.lock().unwrap().insert(call, (fault, times));
    }

    /// Waits until so many calls had a fault.
    pub async fn had(&self, times: u32) {
        self.had.subscribe().wait_for(|had| *had >= times).await.unwrap();
    }

    /// The fault of this call.
    fn of(&self, call: &'static str) -> Option<Fault> {
        let fault = {
            let mut faults = self.faults.lock().unwrap();
            let (fault, times) = faults.get_mut(call).filter(|(_, times)| *times > 0)?;
            *times -= 1;
            *fault
        };
        self.had.send_modify(|had| *had += 1);
        assert!(fault != Fault::Panics, "the panic that the test wants");
        Some(fault)
    }
}

fn broken<T>() -> Result<T, StoreError> {
    Err(StoreError::Database {
        operation: "write",
        disk: None,
        source: "database or disk is full".into(),
    })
}

impl Faulty {
    /// What it stores, with the fault of this call.
    async fn at<T>(
        &self,
        call: &'static str,
        stored: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        match self.of(call) {
            None => stored.await,
            Some(Fault::Unheard) => {
                stored.await?;
                broken()
            }
            Some(_) => broken(),
        }
    }
}

/// The store: some calls that have faults, and the rest as it is.
macro_rules! store {
    ({ $($own:item)* } $($call:ident($($arg:ident: $type:ty),*) -> $ok:ty;)*) => {
        #[async_trait]
        impl Store for Faulty {
            $($own)*
            $(async fn $call(&self, $($arg: $type),*) -> Result<$ok, StoreError> {
                self.store.$call($($arg),*).await
            })*
        }
    };
}

store! {
    {
        async fn change(
            &self,
            id: &BuildId,
            fence: Fence,
            change: Change,
            now: Millis,
            events: &[NewEvent],
        ) -> Result<Build, StoreError> {
            let call = match &change {
                Change::Claim => "claim",
                Change::Push => "push",
                Change::Publish(_) => "publish",
                Change::Finish => "finish",
                Change::Fail(_) => "fail",
                Change::Cancel => "cancel",
                Change::Requeue => "requeue",
            };
            self.at(call, self.store.change(id, fence, change, now, events)).await
        }
        async fn annotate(&self, build: &Build, fence: Fence) -> Result<(), StoreError> {
            self.at("annotate", self.store.annotate(build, fence)).await
        }
        async fn append_events(&self, id: &BuildId, events: &[NewEvent]) -> Result<u64, StoreError> {
            self.at("events", self.store.append_events(id, events)).await
        }
    }
    insert_build(build: &Build, events: &[NewEvent], key: Option<&IdempotencyKey>, secrets: &[(SecretId, Sealed)]) -> ();
    build_by_key(tenant: &Tenant, key: &str) -> Option<(BuildId, String)>;
    build(id: &BuildId) -> Option<Build>;
    builds(filter: &Filter) -> Vec<Build>;
    queue_position(id: &BuildId) -> Option<u32>;
    queued_count(tenant: &Tenant) -> u32;
    next_queued() -> Option<Next>;
    claim_within(owner: &str, now: Millis, events: &[NewEvent], most_mb: u32) -> Option<Claimed>;
    cancel_queued(id: &BuildId, now: Millis, events: &[NewEvent]) -> Build;
    expire_queued(before: Millis, at_most: u32, failure: &Failure, now: Millis, events: &[NewEvent]) -> Vec<BuildId>;
    renew(id: &BuildId, fence: Fence, now: Millis) -> ();
    lapsed(now: Millis) -> Vec<BuildId>;
    take_over(id: &BuildId, owner: &str, now: Millis) -> Option<Claimed>;
    reclaim(owner: &str, now: Millis) -> Vec<Claimed>;
    events_after(id: &BuildId, after: u64, limit: u32) -> Vec<StoredEvent>;
    log_bytes() -> u64;
    finished_logs(at_most: u32) -> Vec<FinishedLog>;
    trim_log(id: &BuildId, after: u64, at_most: u32) -> Piece;
    finished_builds(before: Millis, at_most: u32) -> Vec<BuildId>;
    remove_build(id: &BuildId, at_most: u32) -> bool;
    shrink() -> bool;
    put_secret(tenant: &Tenant, id: &SecretId, sealed: &Sealed, now: Millis, at_most: u32) -> ();
    secret(tenant: &Tenant, id: &SecretId) -> Option<Sealed>;
    secrets(tenant: &Tenant) -> Vec<SecretRecord>;
    delete_secret(tenant: &Tenant, id: &SecretId) -> ();
    build_secret(build: &BuildId, id: &SecretId) -> Option<Sealed>;
    insert_instance(instance: &Instance, at_most: u32) -> ();
    instance(id: &InstanceId) -> Option<Instance>;
    instances(tenant: Option<&Tenant>) -> Vec<Instance>;
    change_instance(id: &InstanceId, change: instance::Change, now: Millis) -> Instance;
    delete_instance(id: &InstanceId) -> ();
    insert_session(session: &Session) -> ();
    mark_entered(build: &BuildId) -> ();
    end_session(id: &str, end: &End) -> ();
    end_open_sessions(now: Millis) -> u64;
    forget_sessions(before: Millis, at_most: u32) -> u64;
    sessions(filter: &SessionFilter) -> Vec<Session>;
    insert_token(token: &TokenRecord) -> ();
    token_by_hash(hash: &str) -> Option<TokenRecord>;
    token(id: &str) -> Option<TokenRecord>;
    tokens() -> Vec<TokenRecord>;
    revoke_token(id: &str) -> ();
    tokens_used(uses: &[(String, Millis)]) -> ();
    unfinished() -> Unfinished;
    ready() -> ();
}
