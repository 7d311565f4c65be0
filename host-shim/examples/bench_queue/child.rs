//! A server as a child: it prints its address, takes commands as lines, and ends with its standard input.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// Linux's USER_HZ, in which proc(5) counts: the same on every machine of this kind.
const TICKS_PER_SECOND: u64 = 100;

/// A server that is there.
pub struct Server {
    pub address: SocketAddr,
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Server {
    /// `bench_queue KIND NUMBER DIR`.
    pub async fn start(kind: &str, number: usize, dir: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([kind, &number.to_string()])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(dir.join(format!("{kind}.log")))?)
            .kill_on_drop(true)
            .spawn()?;
        let orders = child.stdin.take().context("no stdin")?;
        let answers = child.stdout.take().context("no stdout")?;
        let mut answers = BufReader::new(answers).lines();
        let address = answers.next_line().await?.context("the server did not start")?;
        Ok(Self { address: address.parse()?, child, orders, answers })
    }

    /// Gives an order.
    pub async fn order(&mut self, line: &str) -> anyhow::Result<()> {
        self.orders.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(self.orders.flush().await?)
    }

    /// Gives an order that is answered.
    pub async fn ask(&mut self, line: &str) -> anyhow::Result<String> {
        self.order(line).await?;
        self.answers.next_line().await?.with_context(|| format!("no answer to {line}"))
    }

    /// CPU that it has had, in milliseconds.
    pub fn cpu_ms(&self) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(self.proc("stat")?)?;
        // After the name, which may hold anything; utime and stime are the 14th and 15th field (proc(5)).
        let fields: Vec<_> =
            text.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
        let ticks = |at: usize| -> anyhow::Result<u64> {
            Ok(fields.get(at - 3).context("a short stat")?.parse()?)
        };
        Ok((ticks(14)? + ticks(15)?) * 1000 / TICKS_PER_SECOND)
    }

    /// Its resident memory in KiB.
    pub fn resident_kib(&self) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(self.proc("status")?)?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    fn proc(&self, file: &str) -> anyhow::Result<String> {
        Ok(format!("/proc/{}/{file}", self.child.id().context("the server has ended")?))
    }

    /// Ends it.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        drop(self.orders);
        self.child.wait().await?;
        Ok(())
    }
}
