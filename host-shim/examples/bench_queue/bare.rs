//! What Kiln is measured against: the same bytes on the same disk and over the same sockets, and nothing else.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use kiln::build::{NetworkMode, Request, Usage};
use kiln::store::sqlite::{FILE_NAME, SqliteStore};
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use super::http::{find, source_of};

/// Connections to a store's file, of one writer, without the store. The tables are the store's.
pub async fn database(dir: &Path) -> anyhow::Result<SqlitePool> {
    SqliteStore::open(dir).await?.close().await;
    let options = SqliteConnectOptions::new()
        .filename(dir.join(FILE_NAME))
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_secs(10));
    let pool = SqlitePoolOptions::new().max_connections(1).test_before_acquire(false);
    Ok(pool.connect_with(options).await?)
}

/// What the store holds of a build's request.
pub fn request(source_bytes: u64) -> Request {
    Request {
        dockerfile: Some("FROM scratch\nCOPY . /\n".into()),
        target: None,
        image_name: None,
        build_args: [].into(),
        tags: [].into(),
        base_image_digest: None,
        network: NetworkMode::Open,
        allowed_domains: vec![],
        secrets: vec![],
        timeout_seconds: 600,
        memory_mb: 2048,
        cpus: 2,
        disk_gb: 10,
        keep_failed_seconds: 0,
        priority: 50,
        source_digest: format!("sha256:{}", "0".repeat(64)),
        source_bytes,
    }
}

struct Handler {
    sources: PathBuf,
    database: SqlitePool,
}

/// A handler that reads a submit, makes its source and its rows durable and answers.
pub async fn submits(dir: &Path) -> anyhow::Result<()> {
    let sources = dir.join("builds");
    std::fs::create_dir(&sources)?;
    let handler = Arc::new(Handler { sources, database: database(dir).await? });
    let app = Router::new()
        .route("/builds", post(submit))
        .layer(DefaultBodyLimit::disable())
        .with_state(handler);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, app).await });
    // Until nobody gives orders any more.
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut vec![])).await??;
    Ok(())
}

async fn submit(
    State(handler): State<Arc<Handler>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<(StatusCode, String), (StatusCode, String)> {
    let stored = store(&handler, &headers, body).await;
    match stored {
        Ok(id) => Ok((StatusCode::ACCEPTED, format!("{{\"id\":\"{id}\"}}"))),
        Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))),
    }
}

async fn store(handler: &Handler, headers: &HeaderMap, body: Bytes) -> anyhow::Result<String> {
    let id = uuid::Uuid::now_v7().simple().to_string();
    let key = headers.get("idempotency-key").context("no key")?.to_str()?;
    let bytes = source_of(&body).context("no source")?.len();
    let (dir, file) = (handler.sources.clone(), handler.sources.join(&id));
    let written = tokio::task::spawn_blocking(move || {
        let mut file = std::fs::File::create_new(file)?;
        file.write_all(source_of(&body).unwrap_or_default())?;
        file.sync_all()?;
        // Its name too.
        std::fs::File::open(dir)?.sync_all()
    });
    written.await??;
    let now = kiln::clock::now();
    let mut tx = handler.database.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::query(
        "INSERT INTO builds (id, tenant, status, request, created_at, attempt, used, pulled, memory_mb)
         VALUES ($1, 'bench', 'queued', $2, $3, 0, $4, '[]', 2048)",
    )
    .bind(&id)
    .bind(serde_json::to_string(&request(bytes as u64))?)
    .bind(now)
    .bind(serde_json::to_string(&Usage::default())?)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "INSERT INTO idempotency_keys (tenant, name, digest, build_id) VALUES ('bench', $1, $2, $3)",
    )
    .bind(key)
    .bind("0".repeat(64))
    .bind(&id)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "INSERT INTO events (build_id, seq, at, attempt, payload) VALUES ($1, 1, $2, 0, $3)",
    )
    .bind(&id)
    .bind(now)
    .bind("{\"status\":\"queued\",\"type\":\"status\"}")
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(id)
}

/// The pieces that a loop writes, as a file of `DIR`: each after its length.
pub fn write_pieces(dir: &Path, pieces: &[Vec<u8>]) -> std::io::Result<()> {
    let mut all = Vec::new();
    for piece in pieces {
        all.extend_from_slice(&(piece.len() as u64).to_le_bytes());
        all.extend_from_slice(piece);
    }
    std::fs::write(dir.join("pieces"), all)
}

fn read_pieces(dir: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let all = std::fs::read(dir.join("pieces"))?;
    let (mut rest, mut pieces) = (all.as_slice(), vec![]);
    while let Some((length, after)) = rest.split_first_chunk() {
        let (piece, after) = after.split_at(usize::try_from(u64::from_le_bytes(*length))?);
        pieces.push(piece.to_vec());
        rest = after;
    }
    Ok(pieces)
}

/// A loop that writes each piece to so many sockets when it is told to: the first of them as the answer to a request.
pub fn followers(dir: &Path, sockets: usize) -> anyhow::Result<()> {
    let pieces = read_pieces(dir)?;
    let mut pieces = pieces.iter();
    let first = pieces.next().context("no pieces")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let mut open = Vec::with_capacity(sockets);
    while open.len() < sockets {
        let (mut socket, _) = listener.accept()?;
        read_head(&mut socket)?;
        socket.write_all(first)?;
        open.push(socket);
    }
    for order in std::io::stdin().lines() {
        order?;
        let piece = pieces.next().context("no more pieces")?;
        for socket in &mut open {
            socket.write_all(piece)?;
        }
    }
    Ok(())
}

fn read_head(socket: &mut TcpStream) -> anyhow::Result<()> {
    let (mut head, mut part) = (vec![], [0; 1024]);
    while find(&head, b"\r\n\r\n").is_none() {
        match socket.read(&mut part)? {
            0 => bail!("the client has gone"),
            read => head.extend_from_slice(&part[..read]),
        }
    }
    Ok(())
}
