//! Changes of `builds` under a claim. All of them run in a transaction of the caller's.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection, SqlitePool};

use super::builds::{from_row, json, parsed};
use super::failed;
use super::line::CLAIM;
use crate::build::{Build, BuildId, Millis, Status};
use crate::store::{Claimed, Fence, LEASE, StoreError};

pub(super) const RECLAIM: &str = "
    UPDATE builds SET fence = fence + 1, owner = $1, lease_until = $2
    WHERE status IN ('building', 'pushing') RETURNING *";

const LAPSED: &str = "
    SELECT id FROM builds WHERE status IN ('building', 'pushing') AND lease_until < $1
    ORDER BY lease_until, id";

const TAKE_OVER: &str = "
    UPDATE builds SET fence = fence + 1, owner = $1, lease_until = $2
    WHERE id = $3 AND status IN ('building', 'pushing') AND lease_until < $4 RETURNING *";

/// Takes the build that is next in the line; with the number of its last event.
pub(super) async fn claim(
    db: &mut SqliteConnection,
    owner: &str,
    now: Millis,
    most_mb: u32,
) -> Result<Option<(Claimed, i64)>, StoreError> {
    let row = sqlx::query(CLAIM)
        .bind(owner)
        .bind(now)
        .bind(i64::from(most_mb))
        .bind(leased_until(now))
        .fetch_optional(db)
        .await
        .map_err(failed("claim a build"))?;
    row.as_ref().map(|row| Ok((claimed(row)?, highest(row)?))).transpose()
}

/// Gives every claimed build a new fence.
pub(super) async fn reclaim(
    db: &mut SqliteConnection,
    owner: &str,
    now: Millis,
) -> Result<Vec<Claimed>, StoreError> {
    let rows = sqlx::query(RECLAIM)
        .bind(owner)
        .bind(leased_until(now))
        .fetch_all(db)
        .await
        .map_err(failed("take over builds"))?;
    let mut all = rows.iter().map(claimed).collect::<Result<Vec<_>, _>>()?;
    all.sort_by(|a, b| (a.build.created_at, &a.build.id).cmp(&(b.build.created_at, &b.build.id)));
    Ok(all)
}

/// Lets the claim hold from now on. False where it is not the newest one of a build that is under way.
pub(super) async fn renew(
    db: &mut SqliteConnection,
    id: &BuildId,
    fence: Fence,
    now: Millis,
) -> Result<bool, StoreError> {
    let renewed = sqlx::query(
        "UPDATE builds SET lease_until = $1
         WHERE id = $2 AND fence = $3 AND status IN ('building', 'pushing')",
    )
    .bind(leased_until(now))
    .bind(id.as_str())
    .bind(fence.0)
    .execute(db)
    .await
    .map_err(failed("renew a claim"))?;
    Ok(renewed.rows_affected() == 1)
}

/// Builds whose claims have lapsed.
pub(super) async fn lapsed(db: &SqlitePool, now: Millis) -> Result<Vec<BuildId>, StoreError> {
    let rows = sqlx::query(LAPSED)
        .bind(now)
        .fetch_all(db)
        .await
        .map_err(failed("look for claims that were not renewed"))?;
    rows.iter().map(|row| parsed(row, "id", BuildId::new)).collect()
}

/// Gives a build whose claim has lapsed a new one.
pub(super) async fn take_over(
    db: &mut SqliteConnection,
    id: &BuildId,
    owner: &str,
    now: Millis,
) -> Result<Option<Claimed>, StoreError> {
    let row = sqlx::query(TAKE_OVER)
        .bind(owner)
        .bind(leased_until(now))
        .bind(id.as_str())
        .bind(now)
        .fetch_optional(db)
        .await
        .map_err(failed("take over a build"))?;
    row.as_ref().map(claimed).transpose()
}

fn leased_until(now: Millis) -> Millis {
    now.saturating_add(i64::try_from(LEASE.as_millis()).unwrap_or(i64::MAX))
}

/// The build and the fence of its newest claim.
pub(super) async fn load(
    db: &mut SqliteConnection,
    id: &BuildId,
) -> Result<(Build, Fence), StoreError> {
    let (build, fence, _) = load_to_tell(db, id).await?;
    Ok((build, fence))
}

/// The same with the number of its last event.
pub(super) async fn load_to_tell(
    db: &mut SqliteConnection,
    id: &BuildId,
) -> Result<(Build, Fence, i64), StoreError> {
    let row = sqlx::query(
        "SELECT *, (SELECT COALESCE(MAX(e.seq), 0) FROM events AS e WHERE e.build_id = builds.id) AS highest
         FROM builds WHERE id = $1",
    )
    .bind(id.as_str())
    .fetch_optional(db)
    .await
    .map_err(failed("read a build"))?
    .ok_or(StoreError::NotFound("build"))?;
    let Claimed { build, fence } = claimed(&row)?;
    Ok((build, fence, highest(&row)?))
}

fn highest(row: &SqliteRow) -> Result<i64, StoreError> {
    row.try_get("highest").map_err(failed("number events"))
}

/// The status and the attempt, without the rest.
pub(super) async fn status(
    db: &mut SqliteConnection,
    id: &BuildId,
) -> Result<(Status, u32), StoreError> {
    let row = sqlx::query("SELECT status, attempt FROM builds WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(db)
        .await
        .map_err(failed("read a build"))?
        .ok_or(StoreError::NotFound("build"))?;
    let attempt: i64 = row.try_get("attempt").map_err(failed("read a build"))?;
    let status = parsed(&row, "status", |name| Status::from_name(&name).ok_or(()))?;
    Ok((status, u32::try_from(attempt).map_err(failed("read a build"))?))
}

/// Writes what may change, under the fence.
pub(super) async fn save(
    db: &mut SqliteConnection,
    build: &Build,
    fence: Fence,
) -> Result<(), StoreError> {
    let failure = build.failure.as_ref().map(json).transpose()?;
    let saved = sqlx::query(
        "UPDATE builds
         SET status = $1, completed_at = $2, publishing = $3, failure = $4, used = $5, pulled = $6,
             provenance = $7, reached = $8
         WHERE id = $9 AND fence = $10",
    )
    .bind(build.status.as_str())
    .bind(build.completed_at)
    .bind(build.publishing.as_deref())
    .bind(failure)
    .bind(json(&build.usage)?)
    .bind(json(&build.pulled)?)
    .bind(json(&build.provenance)?)
    .bind(json(&build.reached)?)
    .bind(build.id.as_str())
    .bind(fence.0)
    .execute(db)
    .await
    .map_err(failed("change a build"))?;
    if saved.rows_affected() == 0 { Err(StoreError::Fenced) } else { Ok(()) }
}

fn claimed(row: &SqliteRow) -> Result<Claimed, StoreError> {
    let fence = row.try_get("fence").map_err(failed("read a build"))?;
    Ok(Claimed { build: from_row(row)?, fence: Fence(fence) })
}
