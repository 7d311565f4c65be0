//! The table `tokens`.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection, SqlitePool};

use super::builds::parsed;
use super::failed;
use crate::build::{Millis, Tenant};
use crate::store::{Role, StoreError, TokenRecord};

pub(super) async fn insert(
    db: &mut SqliteConnection,
    token: &TokenRecord,
) -> Result<(), StoreError> {
    let inserted = sqlx::query(
        "INSERT INTO tokens (id, hash, name, tenant, role, created_at, expires_at, revoked)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING",
    )
    .bind(&token.id)
    .bind(&token.hash)
    .bind(token.name.as_deref())
    .bind(token.tenant.as_str())
    .bind(token.role.as_str())
    .bind(token.created_at)
    .bind(token.expires_at)
    .bind(token.revoked)
    .execute(db)
    .await
    .map_err(failed("store a token"))?;
    if inserted.rows_affected() == 0 { Err(StoreError::Taken("the token's id")) } else { Ok(()) }
}

pub(super) async fn by_hash(
    db: &SqlitePool,
    hash: &str,
) -> Result<Option<TokenRecord>, StoreError> {
    let row = sqlx::query("SELECT * FROM tokens WHERE hash = $1")
        .bind(hash)
        .fetch_optional(db)
        .await
        .map_err(failed("find a token"))?;
    row.as_ref().map(from_row).transpose()
}

pub(super) async fn one(db: &SqlitePool, id: &str) -> Result<Option<TokenRecord>, StoreError> {
    let row = sqlx::query("SELECT * FROM tokens WHERE id = $1")
        .bind(id)
        .fetch_optional(db)
        .await
        .map_err(failed("read a token"))?;
    row.as_ref().map(from_row).transpose()
}

pub(super) async fn all(db: &SqlitePool) -> Result<Vec<TokenRecord>, StoreError> {
    let rows = sqlx::query("SELECT * FROM tokens ORDER BY created_at, id")
        .fetch_all(db)
        .await
        .map_err(failed("list tokens"))?;
    rows.iter().map(from_row).collect()
}

pub(super) async fn revoke(db: &mut SqliteConnection, id: &str) -> Result<(), StoreError> {
    let revoked = sqlx::query("UPDATE tokens SET revoked = TRUE WHERE id = $1")
        .bind(id)
        .execute(db)
        .await
        .map_err(failed("revoke a token"))?;
    if revoked.rows_affected() == 0 { Err(StoreError::NotFound("token")) } else { Ok(()) }
}

pub(super) async fn used(
    db: &mut SqliteConnection,
    uses: &[(String, Millis)],
) -> Result<(), StoreError> {
    for (id, at) in uses {
        sqlx::query(
            "UPDATE tokens SET last_used_at = $2
             WHERE id = $1 AND (last_used_at IS NULL OR last_used_at < $2)",
        )
        .bind(id)
        .bind(at)
        .execute(&mut *db)
        .await
        .map_err(failed("store when tokens were used"))?;
    }
    Ok(())
}

fn from_row(row: &SqliteRow) -> Result<TokenRecord, StoreError> {
    let read = "read a token";
    Ok(TokenRecord {
        id: row.try_get("id").map_err(failed(read))?,
        hash: row.try_get("hash").map_err(failed(read))?,
        name: row.try_get("name").map_err(failed(read))?,
        tenant: parsed(row, "tenant", Tenant::new)?,
        role: parsed(row, "role", |name| Role::from_name(&name).ok_or(()))?,
        created_at: row.try_get("created_at").map_err(failed(read))?,
        expires_at: row.try_get("expires_at").map_err(failed(read))?,
        revoked: row.try_get("revoked").map_err(failed(read))?,
        last_used_at: row.try_get("last_used_at").map_err(failed(read))?,
    })
}
