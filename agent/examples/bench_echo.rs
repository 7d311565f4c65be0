//! The bare side of `scripts/bench.d/exec.sh`: bytes into a VM and back over its vsock device, with nothing between.
//!
//! `bench_echo serve PORT` in the VM sends back what comes, itself or through a `cat` as a command of `kiln exec` would
//! be one. `bench_echo drive SOCKET PORT echo|cat BYTES` on the host prints how many milliseconds that took.

use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

/// What is read and written at once: the most of a write on the way through the device.
const CHUNK: usize = 64 * 1024;

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", port] => serve(port.parse()?).await,
        ["drive", socket, port, how, bytes] => drive(socket, port, how, bytes.parse()?).await,
        _ => bail!("usage: bench_echo serve PORT | drive SOCKET PORT echo|cat BYTES"),
    }
}

/// One connection at a time.
async fn serve(port: u32) -> anyhow::Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
    println!("listening");
    loop {
        let (mut stream, _) = listener.accept().await?;
        let (through_cat, bytes) = (stream.read_u8().await? == 1, stream.read_u64().await?);
        if through_cat { cat(stream, bytes).await } else { echo(stream, bytes).await }?;
    }
}

async fn echo(stream: VsockStream, bytes: u64) -> anyhow::Result<()> {
    let (input, output) = tokio::io::split(stream);
    pass(input.take(bytes), output).await
}

async fn cat(stream: VsockStream, bytes: u64) -> anyhow::Result<()> {
    let mut cat =
        tokio::process::Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (input, output) = tokio::io::split(stream);
    let into = cat.stdin.take().context("cat's input")?;
    let out = cat.stdout.take().context("cat's output")?;
    tokio::try_join!(pass(input.take(bytes), into), pass(out, output))?;
    ensure!(cat.wait().await?.success(), "cat failed");
    Ok(())
}

async fn pass(from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> anyhow::Result<()> {
    let mut from = BufReader::with_capacity(CHUNK, from);
    tokio::io::copy_buf(&mut from, &mut to).await?;
    Ok(to.shutdown().await?)
}

async fn drive(socket: &str, port: &str, how: &str, bytes: u64) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = vec![];
    while !answer.ends_with(b"\n") {
        answer.push(stream.read_u8().await?);
    }
    ensure!(answer.starts_with(b"OK "), "the device says {:?}", String::from_utf8_lossy(&answer));
    let begun = Instant::now();
    stream.write_u8(u8::from(how == "cat")).await?;
    stream.write_u64(bytes).await?;
    let (mut input, mut output) = stream.into_split();
    let writing = tokio::spawn(async move {
        let chunk = vec![b'x'; CHUNK];
        let mut left = bytes;
        while left > 0 {
            let next = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            output.write_all(&chunk[..next]).await?;
            left -= next as u64;
        }
        // Whole, or its end would be the connection's.
        anyhow::Ok(output)
    });
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let read = input.read(&mut chunk).await?;
        ensure!(read > 0, "{left} bytes did not come back");
        left = left.checked_sub(read as u64).context("more came back than went")?;
    }
    println!("{}", begun.elapsed().as_millis());
    drop(writing.await??);
    Ok(())
}
