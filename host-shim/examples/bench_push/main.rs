//! A push through the registry gateway beside the same push straight to its registry, for `scripts/bench.d/push.sh`.
//!
//! ```text
//! bench_push layout DIR                      an OCI layout of fresh content, for other clients
//! bench_push requests PAIRS REGISTRY HOST    a line for every pair: straight, through the gateway, and the same
//!                                            images once more (ms)
//! ```
//!
//! REGISTRY is the directory of the registry that `kiln serve` runs, HOST:PORT where its gateway is, and `KILN_TOKEN` a token.
//! Both ways lead to one process with one storage: straight is the Unix socket that the gateway uses itself.

mod client;
mod image;
mod push;

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, bail};

const USAGE: &str = "usage: bench_push layout DIR | requests PAIRS REGISTRY HOST:PORT";

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["layout", dir] => image::Image::fresh()?.layout(Path::new(dir)),
        ["requests", pairs, registry, gateway] => {
            let gateway: SocketAddr = gateway.parse().context(USAGE)?;
            let token = std::env::var("KILN_TOKEN").context("no KILN_TOKEN")?;
            let way = push::Ways { registry: Path::new(registry), gateway, token: &token };
            way.measure(pairs.parse().context(USAGE)?)
        }
        _ => bail!(USAGE),
    }
}
