//! Durable submits: 32 clients, each of which sends its next when the last is acknowledged.

use std::cell::Cell;
use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use futures_util::future::try_join_all;

use super::child::Server;
use super::http::{self, Connection};

const CLIENTS: usize = 32;
/// Of a run; of each tenant no more than may be queued.
const SUBMITS: usize = 1920;
const TENANTS: usize = 4;
const SOURCE_BYTES: usize = 16 * 1024;

/// A line for every pair: submits a second of Kiln and of a bare handler.
pub async fn measure(pairs: usize, dir: &Path) -> anyhow::Result<()> {
    for pair in 0..pairs {
        let (kiln, bare);
        // Who goes first changes from pair to pair.
        if pair.is_multiple_of(2) {
            kiln = run("serve", &dir.join(format!("kiln-{pair}"))).await?;
            bare = run("bare-submits", &dir.join(format!("bare-{pair}"))).await?;
        } else {
            bare = run("bare-submits", &dir.join(format!("bare-{pair}"))).await?;
            kiln = run("serve", &dir.join(format!("kiln-{pair}"))).await?;
        }
        println!("{kiln:.1} {bare:.1}");
    }
    Ok(())
}

async fn run(kind: &str, dir: &Path) -> anyhow::Result<f64> {
    std::fs::create_dir(dir)?;
    let mut server = Server::start(kind, 0, dir).await?;
    let mut tokens = vec![];
    for n in 0..TENANTS {
        tokens.push(if kind == "serve" {
            server.ask(&format!("token tenant-{n}")).await?
        } else {
            String::from("none")
        });
    }
    let source = http::source(SOURCE_BYTES);
    let next = Cell::new(0);
    let mut connections = vec![];
    for _ in 0..CLIENTS {
        connections.push(Connection::open(server.address).await?);
    }
    let (begun, cpu) = (Instant::now(), server.cpu_ms()?);
    let clients = connections.into_iter().enumerate().map(async |(client, mut connection)| {
        let mut ids = vec![];
        while next.get() < SUBMITS {
            let n = next.replace(next.get() + 1);
            let key = format!("submit-{n:08}");
            let request = http::submit(&tokens[client % TENANTS], &key, &source);
            let (status, body) = connection.ask(&request).await?;
            ensure!(status == 202, "{status}: {}", String::from_utf8_lossy(body));
            let build: serde_json::Value = serde_json::from_slice(body)?;
            ids.push(build["id"].as_str().context("no id")?.to_owned());
        }
        anyhow::Ok(ids)
    });
    let ids = try_join_all(clients).await?.concat();
    let took = begun.elapsed();
    eprintln!("{kind}: {SUBMITS} in {took:.1?}, CPU {} ms", server.cpu_ms()? - cpu);
    let different: HashSet<_> = ids.iter().collect();
    ensure!(different.len() == SUBMITS, "{} ids of {SUBMITS} builds", different.len());
    server.stop().await?;
    std::fs::remove_dir_all(dir)?;
    Ok(SUBMITS as f64 / took.as_secs_f64())
}
