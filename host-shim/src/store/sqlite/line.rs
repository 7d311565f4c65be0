//! The line of queued builds, fair between tenants: the SQL that says who is next. See [`crate::store::line`].

use sqlx::{Row, SqlitePool};

use super::builds::parsed;
use super::failed;
use crate::build::{BuildId, Tenant};
use crate::store::line::{Waiting, position};
use crate::store::{Next, StoreError};

/// The tenants that wait, found one after the other by the index, however many builds each has. The last row is NULL.
macro_rules! waiting {
    () => {
        "WITH RECURSIVE waiting (tenant) AS (
            SELECT MIN(tenant) FROM builds WHERE status = 'queued'
            UNION ALL
            SELECT (SELECT MIN(n.tenant) FROM builds AS n
                    WHERE n.status = 'queued' AND n.tenant > waiting.tenant)
            FROM waiting WHERE waiting.tenant IS NOT NULL)"
    };
}

/// Of a tenant that waits: how many builds it has under way.
macro_rules! active {
    () => {
        "(SELECT COUNT(*) FROM builds AS a
          WHERE a.tenant = w.tenant AND a.status IN ('building', 'pushing'))"
    };
}

/// Of a tenant that waits: when one of its builds was last claimed.
macro_rules! turn {
    () => {
        "(SELECT MAX(t.turn) FROM builds AS t WHERE t.tenant = w.tenant)"
    };
}

/// Of a tenant that waits: since when.
macro_rules! oldest {
    () => {
        "(SELECT MIN(o.created_at) FROM builds AS o
          WHERE o.status = 'queued' AND o.tenant = w.tenant)"
    };
}

/// Of a tenant that waits: what its first build wants, in MiB.
macro_rules! wants {
    () => {
        "(SELECT h.memory_mb FROM builds AS h
          WHERE h.status = 'queued' AND h.tenant = w.tenant ORDER BY h.priority DESC, h.created_at, h.id LIMIT 1)"
    };
}

/// The first build of the tenant that is next, of those that wait for whom this holds.
macro_rules! next {
    ($columns:literal, $holds:expr) => {
        concat!(
            waiting!(),
            "SELECT ",
            $columns,
            " FROM builds AS b
             WHERE b.status = 'queued' AND b.tenant = (
                 SELECT w.tenant FROM waiting AS w WHERE w.tenant IS NOT NULL",
            $holds,
            " ORDER BY ",
            active!(),
            ", ",
            turn!(),
            ", ",
            oldest!(),
            ", w.tenant LIMIT 1)
             ORDER BY b.priority DESC, b.created_at, b.id LIMIT 1"
        )
    };
}

/// Claims the next build whose memory is no more than this: [`crate::build::Change::Claim`] as one statement.
pub(super) const CLAIM: &str = concat!(
    "UPDATE builds
     SET status = 'building', fence = fence + 1, owner = $1, lease_until = $4, attempt = attempt + 1,
         started_at = COALESCE(started_at, $2),
         turn = (SELECT MAX(l.turn) + 1 FROM builds AS l)
     WHERE status = 'queued' AND id = (",
    next!("b.id", concat!(" AND ", wants!(), " <= $3")),
    ") RETURNING *, (SELECT COALESCE(MAX(e.seq), 0) FROM events AS e WHERE e.build_id = builds.id) AS highest"
);

/// The next build.
pub(super) const NEXT: &str = next!("b.id, b.memory_mb", "");

/// Each tenant that waits, while this build does; and how many of its own tenant are before it.
pub(super) const LINE: &str = concat!(
    waiting!(),
    "SELECT w.tenant AS tenant, b.tenant AS own, ",
    active!(),
    " AS active, ",
    turn!(),
    " AS turn, ",
    oldest!(),
    " AS oldest,
     (SELECT COUNT(*) FROM builds AS q WHERE q.status = 'queued' AND q.tenant = w.tenant) AS queued,
     (SELECT COUNT(*) FROM builds AS e
      WHERE e.status = 'queued' AND e.tenant = b.tenant
        AND (e.priority > b.priority OR e.priority = b.priority AND (e.created_at, e.id) < (b.created_at, b.id))) AS ahead
     FROM builds AS b, waiting AS w
     WHERE b.id = $1 AND b.status = 'queued' AND w.tenant IS NOT NULL"
);

/// A build's number in the line.
pub(super) async fn queue_position(
    db: &SqlitePool,
    id: &BuildId,
) -> Result<Option<u32>, StoreError> {
    let rows = sqlx::query(LINE)
        .bind(id.as_str())
        .fetch_all(db)
        .await
        .map_err(failed("read the queue"))?;
    let mut waiting = Vec::with_capacity(rows.len());
    let mut own = None;
    for row in &rows {
        let number = |column| row.try_get::<i64, _>(column).map_err(failed("read the queue"));
        let count = |column| number(column).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        waiting.push(Waiting {
            tenant: parsed(row, "tenant", Tenant::new)?,
            queued: count("queued")?,
            active: count("active")?,
            turn: number("turn")?,
            oldest: number("oldest")?,
        });
        own = Some((parsed(row, "own", Tenant::new)?, count("ahead")?));
    }
    Ok(own.and_then(|(tenant, ahead)| position(&waiting, &tenant, ahead)))
}

/// The build that is next.
pub(super) async fn next(db: &SqlitePool) -> Result<Option<Next>, StoreError> {
    let row = sqlx::query(NEXT).fetch_optional(db).await.map_err(failed("read the queue"))?;
    let Some(row) = row else { return Ok(None) };
    let memory: i64 = row.try_get("memory_mb").map_err(failed("read the queue"))?;
    let memory_mb = u32::try_from(memory).unwrap_or(u32::MAX);
    Ok(Some(Next { id: parsed(&row, "id", BuildId::new)?, memory_mb }))
}
