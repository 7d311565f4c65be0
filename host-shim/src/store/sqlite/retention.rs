//! What goes when it is old or too much: logs of finished builds, finished builds, and the room that they leave in the file.
//!
//! The table `build_logs` has a row for each build that has log events, and grows with them; so nothing here looks at the events of a
//! build that stays. Whatever is removed goes in pieces: the writing connection is everybody's.

use futures_util::TryStreamExt;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection, SqlitePool};

use super::builds::parsed;
use super::{claims, failed};
use crate::build::{Build, BuildId, Millis, Refused};
use crate::store::{FinishedLog, MAX_PIECE_BYTES, Piece, StoreError};

/// Pages of the file that are given back at one time: 4 MiB.
const PAGES: u32 = 1024;

/// So many bytes more of a build's log are stored. In the transaction that stores them.
pub(super) async fn grew(
    db: &mut SqliteConnection,
    id: &BuildId,
    bytes: usize,
) -> Result<(), StoreError> {
    if bytes == 0 {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO build_logs (build_id, bytes) VALUES ($1, $2)
         ON CONFLICT (build_id) DO UPDATE SET bytes = build_logs.bytes + excluded.bytes",
    )
    .bind(id.as_str())
    .bind(i64::try_from(bytes).map_err(failed("count a log"))?)
    .execute(db)
    .await
    .map_err(failed("count a log"))?;
    Ok(())
}

/// The log of a build that has ended may go. In the transaction that ends it.
pub(super) async fn ended(db: &mut SqliteConnection, build: &Build) -> Result<(), StoreError> {
    let Some(at) = build.completed_at.filter(|_| build.status.is_final()) else { return Ok(()) };
    sqlx::query("UPDATE build_logs SET completed_at = $1 WHERE build_id = $2")
        .bind(at)
        .bind(build.id.as_str())
        .execute(db)
        .await
        .map_err(failed("end a log"))?;
    Ok(())
}

pub(super) const LOG_BYTES: &str = "SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM build_logs
     WHERE completed_at IS NOT NULL";

pub(super) async fn log_bytes(db: &SqlitePool) -> Result<u64, StoreError> {
    let bytes: i64 =
        sqlx::query_scalar(LOG_BYTES).fetch_one(db).await.map_err(failed("measure logs"))?;
    u64::try_from(bytes).map_err(failed("measure logs"))
}

pub(super) const FINISHED_LOGS: &str = "SELECT build_id, completed_at, bytes FROM build_logs
     WHERE completed_at IS NOT NULL ORDER BY completed_at, build_id LIMIT $1";

pub(super) async fn finished_logs(
    db: &SqlitePool,
    at_most: u32,
) -> Result<Vec<FinishedLog>, StoreError> {
    let rows = sqlx::query(FINISHED_LOGS)
        .bind(i64::from(at_most))
        .fetch_all(db)
        .await
        .map_err(failed("list logs"))?;
    rows.iter().map(finished_log).collect()
}

fn finished_log(row: &SqliteRow) -> Result<FinishedLog, StoreError> {
    Ok(FinishedLog {
        id: parsed(row, "build_id", BuildId::new)?,
        completed_at: row.try_get("completed_at").map_err(failed("list logs"))?,
    })
}

/// Removes the log events of the next piece.
pub(super) async fn trim(
    db: &mut SqliteConnection,
    id: &BuildId,
    after: u64,
    at_most: u32,
) -> Result<Piece, StoreError> {
    let remove = "remove a log";
    check_final(db, id).await?;
    let Some(span) = span(db, id, after, at_most).await? else {
        sqlx::query("DELETE FROM build_logs WHERE build_id = $1")
            .bind(id.as_str())
            .execute(db)
            .await
            .map_err(failed(remove))?;
        return Ok(Piece::default());
    };
    let rows = sqlx::query(
        "DELETE FROM events WHERE build_id = $1 AND seq > $2 AND seq <= $3 AND payload ->> 'type' = 'log'
         RETURNING OCTET_LENGTH(payload) AS bytes",
    )
    .bind(id.as_str())
    .bind(number(after))
    .bind(span)
    .fetch_all(&mut *db)
    .await
    .map_err(failed(remove))?;
    let sizes = rows.iter().map(|row| row.try_get::<i64, _>("bytes"));
    let bytes = sizes.sum::<Result<i64, _>>().map_err(failed(remove))?;
    sqlx::query("UPDATE build_logs SET bytes = bytes - $1 WHERE build_id = $2")
        .bind(bytes)
        .bind(id.as_str())
        .execute(&mut *db)
        .await
        .map_err(failed(remove))?;
    Ok(Piece {
        events: rows.len() as u64,
        bytes: u64::try_from(bytes).map_err(failed(remove))?,
        next: Some(u64::try_from(span).map_err(failed(remove))?),
    })
}

pub(super) const FINISHED_BUILDS: &str =
    "SELECT id FROM builds WHERE completed_at < $1 ORDER BY completed_at, id LIMIT $2";

pub(super) async fn finished_builds(
    db: &SqlitePool,
    before: Millis,
    at_most: u32,
) -> Result<Vec<BuildId>, StoreError> {
    let rows = sqlx::query(FINISHED_BUILDS)
        .bind(before)
        .bind(i64::from(at_most))
        .fetch_all(db)
        .await
        .map_err(failed("list old builds"))?;
    rows.iter().map(|row| parsed(row, "id", BuildId::new)).collect()
}

/// Removes the oldest events of a build, and the build with the last of them; whether it has gone. Its tags, its key and what else
/// refers to it go with it.
pub(super) async fn remove(
    db: &mut SqliteConnection,
    id: &BuildId,
    at_most: u32,
) -> Result<bool, StoreError> {
    check_final(db, id).await?;
    let (statement, last) = match span(db, id, 0, at_most).await? {
        Some(last) => ("DELETE FROM events WHERE build_id = $1 AND seq <= $2", last),
        None => ("DELETE FROM builds WHERE id = $1", 0),
    };
    let gone = last == 0;
    let query = sqlx::query(statement).bind(id.as_str());
    let query = if gone { query } else { query.bind(last) };
    query.execute(db).await.map_err(failed("remove a build"))?;
    Ok(gone)
}

/// Gives pages that are free back to the file system; whether there are more.
pub(super) async fn shrink(db: &mut SqliteConnection) -> Result<bool, StoreError> {
    let shrink = "give back free pages";
    let before = free_pages(db).await?;
    if before == 0 {
        return Ok(false);
    }
    let give = sqlx::AssertSqlSafe(format!("PRAGMA incremental_vacuum({PAGES})"));
    sqlx::query(give).execute(&mut *db).await.map_err(failed(shrink))?;
    // Where none is given back, it would not be the next time either.
    Ok((1..before).contains(&free_pages(db).await?))
}

async fn free_pages(db: &mut SqliteConnection) -> Result<i64, StoreError> {
    let pages = sqlx::query_scalar("PRAGMA freelist_count").fetch_one(db).await;
    pages.map_err(failed("count free pages"))
}

/// The last number of the next piece of a build's events: `at_most` of them, and fewer where they are large. `None` where there are
/// none.
async fn span(
    db: &mut SqliteConnection,
    id: &BuildId,
    after: u64,
    at_most: u32,
) -> Result<Option<i64>, StoreError> {
    let read = "measure events";
    let mut rows = sqlx::query(
        "SELECT seq, OCTET_LENGTH(payload) AS bytes FROM events WHERE build_id = $1 AND seq > $2
         ORDER BY seq LIMIT $3",
    )
    .bind(id.as_str())
    .bind(number(after))
    .bind(i64::from(at_most))
    .fetch(db);
    let (mut last, mut bytes) = (None, 0_i64);
    while let Some(row) = rows.try_next().await.map_err(failed(read))? {
        bytes += row.try_get::<i64, _>("bytes").map_err(failed(read))?;
        if bytes > MAX_PIECE_BYTES && last.is_some() {
            break;
        }
        last = Some(row.try_get("seq").map_err(failed(read))?);
    }
    Ok(last)
}

async fn check_final(db: &mut SqliteConnection, id: &BuildId) -> Result<(), StoreError> {
    let (status, _) = claims::status(db, id).await?;
    if status.is_final() { Ok(()) } else { Err(Refused::From(status).into()) }
}

/// No event has a larger number than `i64` holds.
fn number(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}
