//! The table `instances`.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection, SqlitePool};

use super::builds::parsed;
use super::failed;
use crate::build::Tenant;
use crate::instances::{Instance, InstanceId, State};
use crate::store::StoreError;

/// How many the tenant has, stopped ones too, in a transaction that holds the write lock.
pub(super) async fn count(db: &mut SqliteConnection, tenant: &Tenant) -> Result<i64, StoreError> {
    sqlx::query_scalar("SELECT COUNT(*) FROM instances WHERE tenant = $1")
        .bind(tenant.as_str())
        .fetch_one(db)
        .await
        .map_err(failed("count a tenant's instances"))
}

pub(super) async fn insert(
    db: &mut SqliteConnection,
    instance: &Instance,
) -> Result<(), StoreError> {
    let inserted = sqlx::query(
        "INSERT INTO instances (id, tenant, name, image, image_digest, vcpus, memory_mb, state, created_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING",
    )
    .bind(instance.id.as_str())
    .bind(instance.tenant.as_str())
    .bind(&instance.name)
    .bind(&instance.image)
    .bind(&instance.image_digest)
    .bind(i64::from(instance.vcpus))
    .bind(i64::from(instance.memory_mb))
    .bind(instance.state.as_str())
    .bind(instance.created_at)
    .execute(db)
    .await
    .map_err(failed("store an instance"))?;
    if inserted.rows_affected() == 0 {
        return Err(StoreError::Taken("the instance's name"));
    }
    Ok(())
}

pub(super) async fn one(db: &SqlitePool, id: &InstanceId) -> Result<Option<Instance>, StoreError> {
    let row = sqlx::query("SELECT * FROM instances WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(db)
        .await
        .map_err(failed("find an instance"))?;
    row.as_ref().map(from_row).transpose()
}

pub(super) async fn all(
    db: &SqlitePool,
    tenant: Option<&Tenant>,
) -> Result<Vec<Instance>, StoreError> {
    let query = match tenant {
        Some(tenant) => sqlx::query(
            "SELECT * FROM instances WHERE tenant = $1 ORDER BY created_at DESC, id DESC",
        )
        .bind(tenant.as_str()),
        None => sqlx::query("SELECT * FROM instances ORDER BY created_at DESC, id DESC"),
    };
    let rows = query.fetch_all(db).await.map_err(failed("list instances"))?;
    rows.iter().map(from_row).collect()
}

/// The instance, in a transaction that holds the write lock.
pub(super) async fn locked(
    db: &mut SqliteConnection,
    id: &InstanceId,
) -> Result<Instance, StoreError> {
    let row = sqlx::query("SELECT * FROM instances WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(db)
        .await
        .map_err(failed("find an instance"))?;
    from_row(&row.ok_or(StoreError::NotFound("instance"))?)
}

pub(super) async fn save(db: &mut SqliteConnection, instance: &Instance) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE instances
         SET state = $1, started_at = $2, stopped_at = $3, exit_code = $4, exit_message = $5
         WHERE id = $6",
    )
    .bind(instance.state.as_str())
    .bind(instance.started_at)
    .bind(instance.stopped_at)
    .bind(instance.exit_code.map(i64::from))
    .bind(instance.exit_message.as_deref())
    .bind(instance.id.as_str())
    .execute(db)
    .await
    .map_err(failed("change an instance"))?;
    Ok(())
}

pub(super) async fn delete(db: &mut SqliteConnection, id: &InstanceId) -> Result<(), StoreError> {
    let deleted = sqlx::query("DELETE FROM instances WHERE id = $1")
        .bind(id.as_str())
        .execute(db)
        .await
        .map_err(failed("delete an instance"))?;
    if deleted.rows_affected() == 0 { Err(StoreError::NotFound("instance")) } else { Ok(()) }
}

fn from_row(row: &SqliteRow) -> Result<Instance, StoreError> {
    let read = "read an instance";
    let text = |column| row.try_get(column).map_err(failed(read));
    let number = |column| -> Result<u32, StoreError> {
        let number: i64 = row.try_get(column).map_err(failed(read))?;
        u32::try_from(number).map_err(failed(read))
    };
    let exit_code: Option<i64> = row.try_get("exit_code").map_err(failed(read))?;
    Ok(Instance {
        id: parsed(row, "id", |id: String| InstanceId::parse(&id).ok_or(()))?,
        tenant: parsed(row, "tenant", Tenant::new)?,
        name: text("name")?,
        image: text("image")?,
        image_digest: text("image_digest")?,
        vcpus: number("vcpus")?,
        memory_mb: number("memory_mb")?,
        state: parsed(row, "state", |name: String| State::from_name(&name).ok_or(()))?,
        created_at: row.try_get("created_at").map_err(failed(read))?,
        started_at: row.try_get("started_at").map_err(failed(read))?,
        stopped_at: row.try_get("stopped_at").map_err(failed(read))?,
        exit_code: exit_code.map(u8::try_from).transpose().map_err(failed(read))?,
        exit_message: row.try_get("exit_message").map_err(failed(read))?,
    })
}
