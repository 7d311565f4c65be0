//! The tables `builds`, `build_tags` and `idempotency_keys`: to insert, to find, to list.

use futures_util::TryStreamExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::sqlite::SqliteRow;
use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection, SqlitePool};

use super::{BadColumn, failed};
use crate::build::{Build, BuildId, Millis, Status, Tenant};
use crate::store::{Filter, IdempotencyKey, StoreError};

pub(super) async fn insert(db: &mut SqliteConnection, build: &Build) -> Result<(), StoreError> {
    let inserted = sqlx::query(
        "INSERT INTO builds (id, tenant, status, request, created_at, attempt, used, pulled, memory_mb, priority)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING",
    )
    .bind(build.id.as_str())
    .bind(build.tenant.as_str())
    .bind(build.status.as_str())
    .bind(json(&build.request)?)
    .bind(build.created_at)
    .bind(i64::from(build.attempt))
    .bind(json(&build.usage)?)
    .bind(json(&build.pulled)?)
    .bind(i64::from(build.request.memory_mb))
    .bind(i64::from(build.request.priority))
    .execute(&mut *db)
    .await
    .map_err(failed("store a build"))?;
    if inserted.rows_affected() == 0 {
        return Err(StoreError::Taken("the build's id"));
    }
    for (name, content) in &build.request.tags {
        sqlx::query(
            "INSERT INTO build_tags (build_id, name, content, tenant, created_at)
             VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(build.id.as_str())
        .bind(name)
        .bind(content)
        .bind(build.tenant.as_str())
        .bind(build.created_at)
        .execute(&mut *db)
        .await
        .map_err(failed("store a build's tags"))?;
    }
    Ok(())
}

pub(super) async fn insert_key(
    db: &mut SqliteConnection,
    build: &Build,
    key: &IdempotencyKey,
) -> Result<(), StoreError> {
    let inserted = sqlx::query(
        "INSERT INTO idempotency_keys (tenant, name, digest, build_id)
         VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
    )
    .bind(build.tenant.as_str())
    .bind(&key.key)
    .bind(&key.digest)
    .bind(build.id.as_str())
    .execute(db)
    .await
    .map_err(failed("store an idempotency key"))?;
    if inserted.rows_affected() == 0 {
        return Err(StoreError::Taken("the idempotency key"));
    }
    Ok(())
}

pub(super) async fn by_key(
    db: &SqlitePool,
    tenant: &Tenant,
    key: &str,
) -> Result<Option<(BuildId, String)>, StoreError> {
    let row = sqlx::query(
        "SELECT build_id, digest FROM idempotency_keys WHERE tenant = $1 AND name = $2",
    )
    .bind(tenant.as_str())
    .bind(key)
    .fetch_optional(db)
    .await
    .map_err(failed("find an idempotency key"))?;
    let Some(row) = row else { return Ok(None) };
    let digest = row.try_get("digest").map_err(failed("find an idempotency key"))?;
    Ok(Some((parsed(&row, "build_id", BuildId::new)?, digest)))
}

pub(super) async fn get(db: &SqlitePool, id: &BuildId) -> Result<Option<Build>, StoreError> {
    let row = sqlx::query("SELECT * FROM builds WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(db)
        .await
        .map_err(failed("read a build"))?;
    row.as_ref().map(from_row).transpose()
}

/// The statement of a list. A tenant's is read from its end by an index that has its order: that of the tag where it asks for one, or
/// else of its status, or of all its builds. Partial indexes hold for their own words alone.
pub(super) fn listing(filter: &Filter) -> QueryBuilder<Sqlite> {
    let mut tags = filter.tags.iter();
    let leading = filter.tenant.as_ref().and_then(|tenant| Some((tenant, tags.next()?)));
    let mut query = QueryBuilder::<Sqlite>::new("SELECT b.* FROM ");
    let order = if let Some((tenant, (name, content))) = leading {
        // In this order, whatever SQLite thinks of it.
        query
            .push("build_tags AS g CROSS JOIN builds AS b ON b.id = g.build_id WHERE g.tenant = ")
            .push_bind(tenant.as_str().to_owned())
            .push(" AND g.name = ")
            .push_bind(name.clone())
            .push(" AND g.content = ")
            .push_bind(content.clone());
        ("g.created_at", "g.build_id")
    } else {
        query.push("builds AS b WHERE ");
        match &filter.tenant {
            Some(tenant) => query.push("b.tenant = ").push_bind(tenant.as_str().to_owned()),
            None => query.push("1 = 1"),
        };
        match filter.status {
            // There are few, and they have an index without an order: it is not to be looked for elsewhere.
            Some(Status::Building | Status::Pushing) => ("+b.created_at", "b.id"),
            _ => ("b.created_at", "b.id"),
        }
    };
    if let Some(status) = filter.status {
        query.push(" AND b.status = '").push(status.as_str()).push("'");
        match status {
            Status::Queued => {}
            Status::Building | Status::Pushing => {
                query.push(" AND b.status IN ('building', 'pushing')");
            }
            Status::Ready | Status::Failed | Status::Cancelled => {
                query.push(" AND b.completed_at IS NOT NULL");
            }
        }
    }
    for (name, content) in tags {
        query
            .push(
                " AND EXISTS (SELECT 1 FROM build_tags AS t WHERE t.build_id = b.id AND t.name = ",
            )
            .push_bind(name.clone())
            .push(" AND t.content = ")
            .push_bind(content.clone())
            .push(")");
    }
    let (created_at, id) = order;
    if let Some(before) = &filter.before {
        query
            .push(format!(
                " AND ({created_at}, {id}) < (SELECT c.created_at, c.id FROM builds AS c WHERE c.id = "
            ))
            .push_bind(before.as_str().to_owned())
            .push(")");
    }
    query
        .push(format!(" ORDER BY {created_at} DESC, {id} DESC LIMIT "))
        .push_bind(i64::from(filter.limit));
    query
}

pub(super) async fn list(db: &SqlitePool, filter: &Filter) -> Result<Vec<Build>, StoreError> {
    let mut query = listing(filter);
    let mut rows = query.build().fetch(db);
    let mut listed = Vec::new();
    while let Some(row) = rows.try_next().await.map_err(failed("list builds"))? {
        let mut build = from_row(&row)?;
        // They can be megabytes, a page has 200 builds, and a list shows neither.
        build.request.dockerfile = None;
        build.request.build_args.clear();
        listed.push(build);
    }
    Ok(listed)
}

pub(super) const QUEUED_COUNT: &str =
    "SELECT COUNT(*) FROM builds WHERE status = 'queued' AND tenant = $1";

pub(super) async fn queued_count(db: &SqlitePool, tenant: &Tenant) -> Result<u32, StoreError> {
    let queued: i64 = sqlx::query_scalar(QUEUED_COUNT)
        .bind(tenant.as_str())
        .fetch_one(db)
        .await
        .map_err(failed("count the queue"))?;
    Ok(u32::try_from(queued).unwrap_or(u32::MAX))
}

pub(super) const QUEUED_BEFORE: &str = "
    SELECT id FROM builds WHERE status = 'queued' AND created_at < $1 AND attempt = 0
    ORDER BY created_at, id LIMIT $2";

/// Builds that were submitted before then and have not been claimed yet, the oldest first.
pub(super) async fn queued_before(
    db: &SqlitePool,
    before: Millis,
    at_most: u32,
) -> Result<Vec<BuildId>, StoreError> {
    let rows = sqlx::query(QUEUED_BEFORE)
        .bind(before)
        .bind(i64::from(at_most))
        .fetch_all(db)
        .await
        .map_err(failed("read the queue"))?;
    rows.iter().map(|row| parsed(row, "id", BuildId::new)).collect()
}

/// The build of a row that holds every column.
pub(super) fn from_row(row: &SqliteRow) -> Result<Build, StoreError> {
    let time = |column| row.try_get(column).map_err(failed("read a build"));
    let text = |column| row.try_get(column).map_err(failed("read a build"));
    let attempt: i64 = row.try_get("attempt").map_err(failed("read a build"))?;
    let failure: Option<String> = text("failure")?;
    Ok(Build {
        id: parsed(row, "id", BuildId::new)?,
        tenant: parsed(row, "tenant", Tenant::new)?,
        status: parsed(row, "status", |name| Status::from_name(&name).ok_or(()))?,
        request: from_json(&row.try_get::<String, _>("request").map_err(failed("read a build"))?)?,
        created_at: row.try_get("created_at").map_err(failed("read a build"))?,
        started_at: time("started_at")?,
        completed_at: time("completed_at")?,
        attempt: u32::try_from(attempt).map_err(failed("read a build"))?,
        entered: row.try_get("entered").map_err(failed("read a build"))?,
        publishing: text("publishing")?,
        failure: failure.as_deref().map(from_json).transpose()?,
        usage: from_json(&row.try_get::<String, _>("used").map_err(failed("read a build"))?)?,
        pulled: from_json(&row.try_get::<String, _>("pulled").map_err(failed("read a build"))?)?,
        reached: from_json(&row.try_get::<String, _>("reached").map_err(failed("read a build"))?)?,
        provenance: from_json(
            &row.try_get::<String, _>("provenance").map_err(failed("read a build"))?,
        )?,
    })
}

/// A column whose text has a form.
pub(super) fn parsed<T, E>(
    row: &SqliteRow,
    column: &'static str,
    parse: impl FnOnce(String) -> Result<T, E>,
) -> Result<T, StoreError> {
    let text: String = row.try_get(column).map_err(failed("read a row"))?;
    parse(text.clone()).map_err(|_| failed("read a row")(BadColumn { column, text }))
}

pub(super) fn json<T: Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(failed("write a column"))
}

fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(failed("read a column"))
}
