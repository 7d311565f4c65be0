//! A list and a build, with a hundred finished builds in the store and with ten thousand.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use kiln::build::{Build, BuildId, Change, Failure, FailureKind, Status, Tenant};
use kiln::clock::now;
use kiln::events::payload;
use kiln::store::Store;
use kiln::store::sqlite::SqliteStore;

use super::bare;
use super::child::Server;
use super::http::{self, Connection};

const FEW: usize = 100;
const MANY: usize = 10_000;
/// Every so many of them failed, and have a tag.
const RARE: usize = 50;
/// Of each question in a pair.
const TIMES: usize = 200;

struct Place {
    server: Server,
    connection: Connection,
    token: String,
}

/// A line for every pair: medians in microseconds, with few and with many builds, of each question.
pub async fn measure(pairs: usize, dir: &Path) -> anyhow::Result<()> {
    let mut few = start(&dir.join("few"), FEW).await?;
    let mut many = start(&dir.join("many"), MANY).await?;
    for _ in 0..pairs {
        let mut line = String::new();
        let question = |path: &'static str| move |_: usize, _: usize| path.to_owned();
        line += &ask(&mut few, &mut many, question("/builds?limit=50")).await?;
        // None of these is rare where there are few.
        line += &ask(&mut few, &mut many, question("/builds?limit=2&status=failed")).await?;
        line += &ask(&mut few, &mut many, question("/builds?limit=2&tags[rare]=yes")).await?;
        let one = |n: usize, of: usize| format!("/builds/{:032x}", n * 7919 % of);
        line += &ask(&mut few, &mut many, one).await?;
        println!("{}", line.trim_end());
    }
    few.server.stop().await?;
    many.server.stop().await
}

async fn ask(
    few: &mut Place,
    many: &mut Place,
    path: impl Fn(usize, usize) -> String,
) -> anyhow::Result<String> {
    let (mut of_few, mut of_many) = (vec![], vec![]);
    for n in 0..TIMES {
        // Who goes first changes.
        for many_now in [n.is_multiple_of(2), n % 2 == 1] {
            let (place, of, times) = if many_now {
                (&mut *many, MANY, &mut of_many)
            } else {
                (&mut *few, FEW, &mut of_few)
            };
            let request = http::get(&path(n, of), &place.token, "");
            let begun = Instant::now();
            let (status, _) = place.connection.ask(&request).await?;
            times.push(begun.elapsed());
            ensure!(status == 200, "{status}");
        }
    }
    Ok(format!("{} {} ", median(of_few), median(of_many)))
}

fn median(mut times: Vec<Duration>) -> u128 {
    times.sort_unstable();
    times[times.len() / 2].as_micros()
}

async fn start(dir: &Path, builds: usize) -> anyhow::Result<Place> {
    std::fs::create_dir(dir)?;
    fill(dir, builds).await?;
    let mut server = Server::start("serve", 0, dir).await?;
    let token = server.ask("token bench").await?;
    let connection = Connection::open(server.address).await?;
    Ok(Place { server, connection, token })
}

/// Builds that have ended, each with a small log.
async fn fill(dir: &Path, builds: usize) -> anyhow::Result<()> {
    let store = SqliteStore::open(dir).await?;
    let (begun, store) = (Instant::now(), &store);
    let finished = (0..builds).map(|n| async move {
        let mut request = bare::request(1000);
        let rare = n.is_multiple_of(RARE);
        request.tags.insert("rare".into(), if rare { "yes" } else { "no" }.into());
        request.tags.insert("commit".into(), format!("{n:040x}"));
        let id = BuildId::new(format!("{n:032x}"))?;
        let at = 1_700_000_000_000 + i64::try_from(n)?;
        let build = Build::queued(id, Tenant::new("bench")?, request, at);
        let queued = payload::of_host(at, payload::status(Status::Queued, None));
        let mut told = vec![queued];
        told.extend(
            (0..8).map(|line| payload::of_host(at, payload::kiln_log(&format!("line {line}")))),
        );
        store.insert_build(&build, &told, None, &[]).await?;
        anyhow::Ok(())
    });
    stream::iter(finished).buffer_unordered(64).try_collect::<()>().await?;
    let ended = (0..builds).map(|_| async move {
        let told = [payload::of_host(now(), payload::status(Status::Building, None))];
        let claimed = store.claim("bench", now(), &told).await?.context("nobody waits")?;
        let n = usize::from_str_radix(claimed.build.id.as_str(), 16)?;
        let (id, fence) = (&claimed.build.id, claimed.fence);
        if n.is_multiple_of(RARE) {
            let failure = Failure::new(FailureKind::StepFailed, "make test failed");
            let told = [payload::of_host(now(), payload::status(Status::Failed, None))];
            store.change(id, fence, Change::Fail(failure), now(), &told).await?;
        } else {
            let digest = format!("sha256:{}", "0".repeat(64));
            store.change(id, fence, Change::Push, now(), &[]).await?;
            store.change(id, fence, Change::Publish(digest), now(), &[]).await?;
            let told = [payload::of_host(now(), payload::status(Status::Ready, None))];
            store.change(id, fence, Change::Finish, now(), &told).await?;
        }
        anyhow::Ok(())
    });
    stream::iter(ended).buffer_unordered(64).try_collect::<()>().await?;
    store.close().await;
    eprintln!("{builds} builds made in {:.1?}", begun.elapsed());
    Ok(())
}
