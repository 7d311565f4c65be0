//! How many builds are not finished, from the indexes that hold no others.

use sqlx::{Row, SqlitePool};

use super::failed;
use crate::build::Status;
use crate::store::{StoreError, Unfinished};

pub(super) const QUEUED: &str =
    "SELECT COUNT(*) AS builds, MIN(created_at) AS oldest FROM builds WHERE status = 'queued'";
pub(super) const CLAIMED: &str = "SELECT status, COUNT(*) AS builds FROM builds
     WHERE status IN ('building', 'pushing') GROUP BY status";

pub(super) async fn count(db: &SqlitePool) -> Result<Unfinished, StoreError> {
    const COUNT: &str = "count builds";
    let queued = sqlx::query(QUEUED).fetch_one(db).await.map_err(failed(COUNT))?;
    let mut found = Unfinished {
        queued: queued.try_get("builds").map_err(failed(COUNT))?,
        oldest: queued.try_get("oldest").map_err(failed(COUNT))?,
        ..Unfinished::default()
    };
    for row in sqlx::query(CLAIMED).fetch_all(db).await.map_err(failed(COUNT))? {
        let builds = row.try_get("builds").map_err(failed(COUNT))?;
        match row.try_get("status").map(Status::from_name).map_err(failed(COUNT))? {
            Some(Status::Pushing) => found.pushing = builds,
            _ => found.building = builds,
        }
    }
    Ok(found)
}
