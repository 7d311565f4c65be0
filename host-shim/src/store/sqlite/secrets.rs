//! The tables `secrets` and `build_secrets`.

use kiln_protocol::secret::SecretId;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection, SqlitePool};

use super::builds::parsed;
use super::failed;
use crate::build::{Build, BuildId, Millis, Tenant};
use crate::secrets::Sealed;
use crate::store::{SecretRecord, StoreError};

pub(super) async fn put(
    db: &mut SqliteConnection,
    tenant: &Tenant,
    id: &SecretId,
    sealed: &Sealed,
    now: Millis,
    at_most: u32,
) -> Result<(), StoreError> {
    let stored = sqlx::query(
        "INSERT INTO secrets (tenant, id, sealed, created_at, updated_at)
         SELECT $1, $2, $3, $4, $4
         WHERE EXISTS (SELECT 1 FROM secrets WHERE tenant = $1 AND id = $2)
            OR (SELECT COUNT(*) FROM secrets WHERE tenant = $1) < $5
         ON CONFLICT (tenant, id) DO UPDATE SET sealed = excluded.sealed, updated_at = excluded.updated_at",
    )
    .bind(tenant.as_str())
    .bind(id.as_str())
    .bind(&sealed.0)
    .bind(now)
    .bind(at_most)
    .execute(db)
    .await
    .map_err(failed("store a secret"))?;
    if stored.rows_affected() == 0 {
        return Err(StoreError::TooMany { what: "secrets", limit: at_most });
    }
    Ok(())
}

pub(super) async fn one(
    db: &SqlitePool,
    tenant: &Tenant,
    id: &SecretId,
) -> Result<Option<Sealed>, StoreError> {
    let row = sqlx::query("SELECT sealed FROM secrets WHERE tenant = $1 AND id = $2")
        .bind(tenant.as_str())
        .bind(id.as_str())
        .fetch_optional(db)
        .await
        .map_err(failed("read a secret"))?;
    row.as_ref().map(sealed).transpose()
}

pub(super) async fn all(db: &SqlitePool, tenant: &Tenant) -> Result<Vec<SecretRecord>, StoreError> {
    let rows =
        sqlx::query("SELECT id, created_at, updated_at FROM secrets WHERE tenant = $1 ORDER BY id")
            .bind(tenant.as_str())
            .fetch_all(db)
            .await
            .map_err(failed("list secrets"))?;
    rows.iter().map(record).collect()
}

pub(super) async fn delete(
    db: &mut SqliteConnection,
    tenant: &Tenant,
    id: &SecretId,
) -> Result<(), StoreError> {
    let deleted = sqlx::query("DELETE FROM secrets WHERE tenant = $1 AND id = $2")
        .bind(tenant.as_str())
        .bind(id.as_str())
        .execute(db)
        .await
        .map_err(failed("remove a secret"))?;
    if deleted.rows_affected() == 0 { Err(StoreError::NotFound("secret")) } else { Ok(()) }
}

pub(super) async fn insert_own(
    db: &mut SqliteConnection,
    build: &BuildId,
    own: &[(SecretId, Sealed)],
) -> Result<(), StoreError> {
    for (id, sealed) in own {
        sqlx::query("INSERT INTO build_secrets (build_id, id, sealed) VALUES ($1, $2, $3)")
            .bind(build.as_str())
            .bind(id.as_str())
            .bind(&sealed.0)
            .execute(&mut *db)
            .await
            .map_err(failed("store a build's secrets"))?;
    }
    Ok(())
}

pub(super) async fn own(
    db: &SqlitePool,
    build: &BuildId,
    id: &SecretId,
) -> Result<Option<Sealed>, StoreError> {
    let row = sqlx::query("SELECT sealed FROM build_secrets WHERE build_id = $1 AND id = $2")
        .bind(build.as_str())
        .bind(id.as_str())
        .fetch_optional(db)
        .await
        .map_err(failed("read a build's secret"))?;
    row.as_ref().map(sealed).transpose()
}

/// A build that has ended keeps none of its own.
pub(super) async fn forget_own(db: &mut SqliteConnection, build: &Build) -> Result<(), StoreError> {
    if !build.status.is_final() || build.request.secrets.is_empty() {
        return Ok(());
    }
    sqlx::query("DELETE FROM build_secrets WHERE build_id = $1")
        .bind(build.id.as_str())
        .execute(db)
        .await
        .map_err(failed("forget a build's secrets"))?;
    Ok(())
}

fn sealed(row: &SqliteRow) -> Result<Sealed, StoreError> {
    row.try_get("sealed").map(Sealed).map_err(failed("read a secret"))
}

fn record(row: &SqliteRow) -> Result<SecretRecord, StoreError> {
    let read = "read a secret";
    Ok(SecretRecord {
        id: parsed(row, "id", SecretId::new)?,
        created_at: row.try_get("created_at").map_err(failed(read))?,
        updated_at: row.try_get("updated_at").map_err(failed(read))?,
    })
}
