//! The table `events`: numbered from 1 in each build, without gaps until its log goes (`retention`).

use futures_util::TryStreamExt;
use sqlx::{Row, SqliteConnection, SqlitePool};

use super::{failed, retention};
use crate::build::BuildId;
use crate::store::{MAX_PAGE_BYTES, NewEvent, StoreError, StoredEvent};

/// Appends and returns the highest number. In a transaction that holds the write lock.
pub(super) async fn append(
    db: &mut SqliteConnection,
    id: &BuildId,
    attempt: u32,
    events: &[NewEvent],
) -> Result<u64, StoreError> {
    let mut highest: i64 =
        sqlx::query_scalar("SELECT COALESCE(MAX(seq), 0) FROM events WHERE build_id = $1")
            .bind(id.as_str())
            .fetch_one(&mut *db)
            .await
            .map_err(failed("number events"))?;
    let mut log_bytes = 0;
    for event in events {
        let payload = event.payload.to_string();
        let size = payload.len();
        let agent_seq =
            event.agent_seq.map(i64::try_from).transpose().map_err(failed("number events"))?;
        let inserted = sqlx::query(
            "INSERT INTO events (build_id, seq, at, attempt, agent_seq, payload)
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
        )
        .bind(id.as_str())
        .bind(highest + 1)
        .bind(event.at)
        .bind(i64::from(attempt))
        .bind(agent_seq)
        .bind(payload)
        .execute(&mut *db)
        .await
        .map_err(failed("store events"))?;
        // The number is free under the write lock, so a conflict is the agent's number.
        if inserted.rows_affected() == 1 {
            highest += 1;
            log_bytes += if event.is_log() { size } else { 0 };
        }
    }
    retention::grew(db, id, log_bytes).await?;
    u64::try_from(highest).map_err(failed("number events"))
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
