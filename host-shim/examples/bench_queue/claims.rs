//! Claims and ends of builds, one after the other: as the queue makes them, and as bare statements.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use kiln::build::{Build, BuildId, Change, Failure, FailureKind, Status, Tenant};
use kiln::clock::now;
use kiln::events::{EventLog, payload};
use kiln::store::Store;
use kiln::store::sqlite::SqliteStore;
use sqlx::{Row, SqlitePool};

use super::bare;

/// Of a run.
const BUILDS: usize = 500;

/// A line for every pair: builds a second of Kiln and of the bare statements.
pub async fn measure(pairs: usize, dir: &Path) -> anyhow::Result<()> {
    for pair in 0..pairs {
        let (kiln_dir, bare_dir) = (dir.join("kiln-claims"), dir.join("bare-claims"));
        for dir in [&kiln_dir, &bare_dir] {
            std::fs::create_dir(dir)?;
            queue(dir).await?;
        }
        let (kiln, bare);
        if pair.is_multiple_of(2) {
            kiln = by_kiln(&kiln_dir).await?;
            bare = by_statements(&bare_dir).await?;
        } else {
            bare = by_statements(&bare_dir).await?;
            kiln = by_kiln(&kiln_dir).await?;
        }
        println!("{kiln:.1} {bare:.1}");
        std::fs::remove_dir_all(kiln_dir)?;
        std::fs::remove_dir_all(bare_dir)?;
    }
    Ok(())
}

/// Builds that wait.
async fn queue(dir: &Path) -> anyhow::Result<()> {
    let store = SqliteStore::open(dir).await?;
    let builds = (0..BUILDS).map(async |n| {
        let id = BuildId::new(format!("{n:032x}"))?;
        let build = Build::queued(id, Tenant::new("bench")?, bare::request(1000), now());
        let told = payload::of_host(now(), payload::status(Status::Queued, None));
        anyhow::Ok(store.insert_build(&build, &[told], None, &[]).await?)
    });
    futures_util::future::try_join_all(builds).await?;
    store.close().await;
    Ok(())
}

fn failure() -> Failure {
    Failure::new(FailureKind::StepFailed, "make test failed")
}

/// As the dispatcher claims, and a driver ends.
async fn by_kiln(dir: &Path) -> anyhow::Result<f64> {
    let store = Arc::new(SqliteStore::open(dir).await?);
    let events = EventLog::new(Arc::clone(&store) as Arc<dyn Store>);
    let begun = Instant::now();
    for _ in 0..BUILDS {
        store.next_queued().await?.context("nobody waits")?;
        let told = [payload::of_host(now(), payload::status(Status::Building, None))];
        let claimed = events.claim_within("bench", now(), &told, 65536).await?;
        let claimed = claimed.context("nothing was claimed")?;
        let failure = failure();
        let told = [
            payload::of_host(now(), payload::failure(&failure)),
            payload::of_host(now(), payload::status(Status::Failed, None)),
        ];
        let change = Change::Fail(failure);
        events.change(&claimed.build.id, claimed.fence, change, now(), &told).await?;
    }
    let took = begun.elapsed();
    ensure!(store.next_queued().await?.is_none(), "somebody waits still");
    store.close().await;
    Ok(BUILDS as f64 / took.as_secs_f64())
}

/// The oldest first, whosever it is; what is known of a build is written without a look at it.
async fn by_statements(dir: &Path) -> anyhow::Result<f64> {
    let database = bare::database(dir).await?;
    let begun = Instant::now();
    for _ in 0..BUILDS {
        claim_and_end(&database).await?;
    }
    let took = begun.elapsed();
    database.close().await;
    Ok(BUILDS as f64 / took.as_secs_f64())
}

async fn claim_and_end(database: &SqlitePool) -> anyhow::Result<()> {
    let mut tx = database.begin_with("BEGIN IMMEDIATE").await?;
    let claimed = sqlx::query(
        "UPDATE builds SET status = 'building', fence = fence + 1, owner = $1, attempt = attempt + 1, started_at = $2
         WHERE id = (SELECT id FROM builds WHERE status = 'queued' ORDER BY created_at, id LIMIT 1) RETURNING *",
    )
    .bind("bench")
    .bind(now())
    .fetch_one(&mut *tx)
    .await?;
    let (id, fence): (String, i64) = (claimed.try_get("id")?, claimed.try_get("fence")?);
    let event = async |tx: &mut sqlx::SqliteConnection, seq: i64, payload: &str| {
        sqlx::query(
            "INSERT INTO events (build_id, seq, at, attempt, payload) VALUES ($1, $2, $3, 1, $4)",
        )
        .bind(&id)
        .bind(seq)
        .bind(now())
        .bind(payload)
        .execute(tx)
        .await
    };
    event(&mut tx, 2, "{\"status\":\"building\",\"type\":\"status\"}").await?;
    tx.commit().await?;
    let mut tx = database.begin_with("BEGIN IMMEDIATE").await?;
    let failure = serde_json::to_string(&failure())?;
    sqlx::query(
        "UPDATE builds SET status = 'failed', completed_at = $1, failure = $2 WHERE id = $3 AND fence = $4",
    )
    .bind(now())
    .bind(&failure)
    .bind(&id)
    .bind(fence)
    .execute(&mut *tx)
    .await?;
    event(&mut tx, 3, &payload::failure(&self::failure()).to_string()).await?;
    event(&mut tx, 4, "{\"status\":\"failed\",\"type\":\"status\"}").await?;
    tx.commit().await?;
    Ok(())
}
