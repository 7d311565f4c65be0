//! The queue and the API beside bare references, for `scripts/bench.d/queue.sh`: `bench_queue WHAT PAIRS DIR`.
//!
//! ```text
//! submits    a line for every pair: submits a second at 32 clients, of Kiln and of a bare handler
//! claims     claims with their ends a second, of Kiln and of the bare statements
//! followers  CPU of Kiln and of a bare loop (ms), KiB a follower, p99 without and with one that stalls (µs)
//! lists      a list, one by status, one by tag and a build: each with 100 and with 10,000 finished builds (µs)
//! ```
//!
//! Servers are children: the same program, `serve` or `bare-…`, so that their CPU and memory are theirs alone. Kiln's is the
//! API as `kiln serve` has it, over its store and its events, with nobody who runs builds. All data is in DIR, on its disk.

// Counts of things that were counted here are far from what a float holds.
#![allow(clippy::cast_precision_loss)]

mod bare;
mod child;
mod claims;
mod followers;
mod http;
mod lists;
mod server;
mod submits;

use std::path::Path;

use anyhow::{Context, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const USAGE: &str = "usage: bench_queue submits|claims|followers|lists PAIRS DIR";

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [what, number, dir] = args.as_slice() else { bail!(USAGE) };
    let (number, dir): (usize, _) = (number.parse().context(USAGE)?, Path::new(dir));
    // Each follower is a descriptor here and one in the server.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    // As the program of Kiln does.
    let many = || tokio::runtime::Builder::new_multi_thread().enable_all().build();
    // Load comes from one thread, and leaves the rest to the server.
    let one = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    match what.as_str() {
        "serve" => many()?.block_on(server::serve(dir)),
        "bare-submits" => many()?.block_on(bare::submits(dir)),
        "bare-followers" => bare::followers(dir, number),
        "submits" => one()?.block_on(submits::measure(number, dir)),
        "claims" => many()?.block_on(claims::measure(number, dir)),
        "followers" => one()?.block_on(followers::measure(number, dir)),
        "lists" => one()?.block_on(lists::measure(number, dir)),
        _ => bail!(USAGE),
    }
}
