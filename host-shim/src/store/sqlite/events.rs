//! The table `events`: numbered from 1 in each build, without gaps until its log goes (`retention`).

use std::collections::HashSet;

use futures_util::TryStreamExt;
use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection, SqlitePool};

use super::{failed, retention};
use crate::build::BuildId;
use crate::store::{MAX_PAGE_BYTES, NewEvent, StoreError, StoredEvent};

/// Most rows of one statement, six values each: SQLite takes 32,766 of them, PostgreSQL 65,535.
const ROWS: usize = 128;

/// Appends after the number of the last event. In a transaction that holds the write lock, in which the number was read.
pub(super) async fn append_after(
    db: &mut SqliteConnection,
    id: &BuildId,
    attempt: u32,
    highest: i64,
    events: &[NewEvent],
) -> Result<(), StoreError> {
    if events.iter().all(|event| event.agent_seq.is_none()) {
        // The host's: there is none that may have come before.
        insert(db, id, attempt, highest, HashSet::new(), events).await?;
    } else {
        append(db, id, attempt, events).await?;
    }
    Ok(())
}

/// Appends and returns the highest number. In a transaction that holds the write lock.
pub(super) async fn append(
    db: &mut SqliteConnection,
    id: &BuildId,
    attempt: u32,
    events: &[NewEvent],
) -> Result<u64, StoreError> {
    // Two questions: SQLite takes the last entry of an index for one that asks for nothing else.
    let (highest, last_of_agent): (i64, Option<i64>) = sqlx::query_as(
        "SELECT COALESCE((SELECT MAX(seq) FROM events WHERE build_id = $1), 0),
                (SELECT MAX(agent_seq) FROM events
                 WHERE build_id = $1 AND attempt = $2 AND agent_seq IS NOT NULL)",
    )
    .bind(id.as_str())
    .bind(i64::from(attempt))
    .fetch_one(&mut *db)
    .await
    .map_err(failed("number events"))?;
    let known = match last_of_agent {
        Some(last) => known(db, id, attempt, events, last).await?,
        None => HashSet::new(),
    };
    insert(db, id, attempt, highest, known, events).await
}

/// Inserts those events whose numbers are not known, and returns the highest number.
async fn insert(
    db: &mut SqliteConnection,
    id: &BuildId,
    attempt: u32,
    mut highest: i64,
    mut known: HashSet<i64>,
    events: &[NewEvent],
) -> Result<u64, StoreError> {
    let mut log_bytes = 0;
    let mut rows = Vec::with_capacity(events.len());
    for event in events {
        let agent_seq = agent_seq(event)?;
        if agent_seq.is_some_and(|number| !known.insert(number)) {
            continue;
        }
        highest += 1;
        let payload = event.payload.to_string();
        log_bytes += if event.is_log() { payload.len() } else { 0 };
        rows.push((highest, event.at, agent_seq, payload));
    }
    let mut rows = rows.into_iter().peekable();
    while rows.peek().is_some() {
        let mut insert = QueryBuilder::<Sqlite>::new(
            "INSERT INTO events (build_id, seq, at, attempt, agent_seq, payload) ",
        );
        let mut count = 0;
        insert.push_values(rows.by_ref().take(ROWS), |mut row, (seq, at, agent_seq, payload)| {
            count += 1;
            row.push_bind(id.as_str()).push_bind(seq).push_bind(at);
            row.push_bind(i64::from(attempt)).push_bind(agent_seq).push_bind(payload);
        });
        // Of each number of rows there is a text. Only those of the usual ones stay prepared: of what the host tells, and of what an agent
        // sends before it wants to hear that it is stored. All would drive out the other statements.
        let insert = insert.build().persistent(matches!(count, 1..=3 | 16));
        insert.execute(&mut *db).await.map_err(failed("store events"))?;
    }
    retention::grew(db, id, log_bytes).await?;
    u64::try_from(highest).map_err(failed("number events"))
}

/// Which of the agent's numbers among these are stored already; it is known which is the last one that is.
async fn known(
    db: &mut SqliteConnection,
    id: &BuildId,
    attempt: u32,
    events: &[NewEvent],
    last: i64,
) -> Result<HashSet<i64>, StoreError> {
    let numbers: Result<Vec<_>, _> =
        events.iter().filter_map(|e| agent_seq(e).transpose()).collect();
    let numbers = numbers?;
    let Some(first) = numbers.iter().min().filter(|first| **first <= last) else {
        // Nearly always: nothing is sent twice.
        return Ok(HashSet::new());
    };
    let known: Vec<i64> = sqlx::query_scalar(
        "SELECT agent_seq FROM events
         WHERE build_id = $1 AND attempt = $2 AND agent_seq >= $3 AND agent_seq <= $4",
    )
    .bind(id.as_str())
    .bind(i64::from(attempt))
    .bind(first)
    .bind(numbers.iter().max())
    .fetch_all(db)
    .await
    .map_err(failed("number events"))?;
    Ok(known.into_iter().collect())
}

fn agent_seq(event: &NewEvent) -> Result<Option<i64>, StoreError> {
    event.agent_seq.map(i64::try_from).transpose().map_err(failed("number events"))
}

pub(super) async fn after(
    db: &SqlitePool,
    id: &BuildId,
    after: u64,
    limit: u32,
) -> Result<Vec<StoredEvent>, StoreError> {
    // No event has a larger number than i64 holds.
    let after = i64::try_from(after).unwrap_or(i64::MAX);
    let mut rows = sqlx::query(
        "SELECT seq, at, payload FROM events WHERE build_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
    )
    .bind(id.as_str())
    .bind(after)
    .bind(i64::from(limit))
    .fetch(db);
    let mut page = Vec::new();
    let mut bytes = 0;
    while let Some(row) = rows.try_next().await.map_err(failed("read events"))? {
        let seq: i64 = row.try_get("seq").map_err(failed("read events"))?;
        let payload: &str = row.try_get("payload").map_err(failed("read events"))?;
        bytes += payload.len();
        if bytes > MAX_PAGE_BYTES && !page.is_empty() {
            break;
        }
        page.push(StoredEvent {
            seq: u64::try_from(seq).map_err(failed("read events"))?,
            at: row.try_get("at").map_err(failed("read events"))?,
            payload: serde_json::from_str(payload).map_err(failed("read events"))?,
        });
    }
    Ok(page)
}
