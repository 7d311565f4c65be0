//! The table `sessions`, and the mark of builds that were entered.

use serde::de::DeserializeOwned;
use sqlx::sqlite::SqliteRow;
use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection, SqlitePool};

use super::builds::{json, parsed};
use super::failed;
use crate::build::{BuildId, Millis, Tenant};
use crate::exec::{End, How, Session, Subject, Who};
use crate::instances::InstanceId;
use crate::store::{Role, SessionFilter, StoreError};

pub(super) async fn insert(db: &mut SqliteConnection, session: &Session) -> Result<(), StoreError> {
    let (build, instance) = match &session.subject {
        Subject::Build(id) => (Some(id.as_str()), None),
        Subject::Instance(id) => (None, Some(id.as_str())),
    };
    let inserted = sqlx::query(
        "INSERT INTO sessions
         (id, tenant, build_id, instance_id, token_id, token_name, token_role, token_tenant, command, env,
          cut, directory, run_as, tty, vm, with_secrets, started_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
         ON CONFLICT DO NOTHING",
    )
    .bind(&session.id)
    .bind(session.tenant.as_str())
    .bind(build)
    .bind(instance)
    .bind(&session.who.token_id)
    .bind(session.who.token_name.as_deref())
    .bind(session.who.role.as_str())
    .bind(session.who.tenant.as_str())
    .bind(json(&session.command)?)
    .bind(json(&session.env)?)
    .bind(session.cut)
    .bind(session.directory.as_deref())
    .bind(session.user.as_deref())
    .bind(session.tty)
    .bind(session.vm)
    .bind(session.with_secrets)
    .bind(session.started_at)
    .execute(db)
    .await
    .map_err(failed("store a session"))?;
    if inserted.rows_affected() == 0 { Err(StoreError::Taken("the session's id")) } else { Ok(()) }
}

/// Marks a build for ever, if it runs: what is done in a failed step that stays changes nothing of the build.
pub(super) async fn mark_entered(
    db: &mut SqliteConnection,
    build: &BuildId,
) -> Result<(), StoreError> {
    let marked = sqlx::query(
        "UPDATE builds SET entered = (entered OR status IN ('building', 'pushing')) WHERE id = $1",
    )
    .bind(build.as_str())
    .execute(db)
    .await
    .map_err(failed("mark a build"))?;
    if marked.rows_affected() == 0 { Err(StoreError::NotFound("build")) } else { Ok(()) }
}

/// Records an end, once.
pub(super) async fn end(db: &mut SqliteConnection, id: &str, end: &End) -> Result<(), StoreError> {
    let ended = sqlx::query(
        "UPDATE sessions SET ended_at = $1, how = $2, exit_code = $3, why = $4
         WHERE id = $5 AND ended_at IS NULL",
    )
    .bind(end.at)
    .bind(end.how.as_str())
    .bind(end.exit_code.map(i64::from))
    .bind(end.why.as_deref())
    .bind(id)
    .execute(db)
    .await
    .map_err(failed("end a session"))?;
    if ended.rows_affected() == 0 { Err(StoreError::NotFound("open session")) } else { Ok(()) }
}

/// Ends what an earlier server left open. How many there were.
pub(super) async fn end_open(db: &mut SqliteConnection, now: Millis) -> Result<u64, StoreError> {
    let ended = sqlx::query("UPDATE sessions SET ended_at = $1, how = $2 WHERE ended_at IS NULL")
        .bind(now)
        .bind(How::ServerStopped.as_str())
        .execute(db)
        .await
        .map_err(failed("end the sessions of an earlier server"))?;
    Ok(ended.rows_affected())
}

/// What still goes on has not ended, and stays.
pub(super) const FORGET: &str = "DELETE FROM sessions WHERE id IN
     (SELECT id FROM sessions WHERE started_at < $1 AND ended_at < $1 ORDER BY started_at, id LIMIT $2)";

pub(super) async fn forget(
    db: &mut SqliteConnection,
    before: Millis,
    at_most: u32,
) -> Result<u64, StoreError> {
    let gone = sqlx::query(FORGET)
        .bind(before)
        .bind(i64::from(at_most))
        .execute(db)
        .await
        .map_err(failed("forget old sessions"))?;
    Ok(gone.rows_affected())
}

pub(super) async fn list(
    db: &SqlitePool,
    filter: &SessionFilter,
) -> Result<Vec<Session>, StoreError> {
    let mut query = QueryBuilder::<Sqlite>::new("SELECT s.* FROM sessions AS s WHERE 1 = 1");
    if let Some(tenant) = &filter.tenant {
        query.push(" AND s.tenant = ").push_bind(tenant.as_str().to_owned());
    }
    match &filter.subject {
        Some(Subject::Build(id)) => {
            query.push(" AND s.build_id = ").push_bind(id.as_str().to_owned());
        }
        Some(Subject::Instance(id)) => {
            query.push(" AND s.instance_id = ").push_bind(id.as_str().to_owned());
        }
        None => {}
    }
    if let Some(before) = &filter.before {
        query
            .push(" AND (s.started_at, s.id) < (SELECT c.started_at, c.id FROM sessions AS c WHERE c.id = ")
            .push_bind(before.clone())
            .push(")");
    }
    query.push(" ORDER BY s.started_at DESC, s.id DESC LIMIT ").push_bind(i64::from(filter.limit));
    let rows = query.build().fetch_all(db).await.map_err(failed("list sessions"))?;
    rows.iter().map(from_row).collect()
}

fn from_row(row: &SqliteRow) -> Result<Session, StoreError> {
    let read = "read a session";
    let text = |column| row.try_get(column).map_err(failed(read));
    let optional = |column| -> Result<Option<String>, StoreError> {
        row.try_get(column).map_err(failed(read))
    };
    let flag = |column| -> Result<bool, StoreError> { row.try_get(column).map_err(failed(read)) };
    let build = optional("build_id")?.map(|_| parsed(row, "build_id", BuildId::new)).transpose()?;
    let subject = match build {
        Some(id) => Subject::Build(id),
        None => Subject::Instance(parsed(row, "instance_id", |id: String| {
            InstanceId::parse(&id).ok_or(())
        })?),
    };
    let exit_code: Option<i64> = row.try_get("exit_code").map_err(failed(read))?;
    let ended_at: Option<Millis> = row.try_get("ended_at").map_err(failed(read))?;
    let end = match ended_at {
        Some(at) => Some(End {
            at,
            how: parsed(row, "how", |name: String| How::from_name(&name).ok_or(()))?,
            exit_code: exit_code.map(u8::try_from).transpose().map_err(failed(read))?,
            why: optional("why")?,
        }),
        None => None,
    };
    Ok(Session {
        id: text("id")?,
        tenant: parsed(row, "tenant", Tenant::new)?,
        subject,
        who: Who {
            token_id: text("token_id")?,
            token_name: optional("token_name")?,
            role: parsed(row, "token_role", |name: String| Role::from_name(&name).ok_or(()))?,
            tenant: parsed(row, "token_tenant", Tenant::new)?,
        },
        command: words(row, "command")?,
        cut: flag("cut")?,
        env: words(row, "env")?,
        directory: optional("directory")?,
        user: optional("run_as")?,
        tty: flag("tty")?,
        vm: flag("vm")?,
        with_secrets: flag("with_secrets")?,
        started_at: row.try_get("started_at").map_err(failed(read))?,
        end,
    })
}

fn words<T: DeserializeOwned>(row: &SqliteRow, column: &'static str) -> Result<T, StoreError> {
    let text: String = row.try_get(column).map_err(failed("read a session"))?;
    serde_json::from_str(&text).map_err(failed("read a session"))
}
