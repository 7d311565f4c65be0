//! A bare side of `scripts/bench.d/script.sh`: the agent's boot, then a script in place of everything else of it.
//!
//! The script comes with its files in a tar archive on the third disk. Its output goes to a file, for a console is
//! slow; how long it took is on the console; then the VM ends.
#![allow(dead_code, unused_imports, reason = "not every part of the agent's files is used here")]

use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::Context;

#[path = "../src/init/mod.rs"]
mod init;

const ARCHIVE_DEVICE: &str = "/dev/vdc";
/// On the scratch disk, where the agent unpacks a source.
const PLACE: &str = "/var/lib/kiln";

fn main() -> ExitCode {
    init::run(|booted| match bench(booted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark failed: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn bench(booted: init::Booted) -> anyhow::Result<()> {
    booted.wait()?;
    init::wait_for(ARCHIVE_DEVICE)?;
    tar::Archive::new(File::open(ARCHIVE_DEVICE)?).unpack(PLACE).context("the archive")?;
    let begun = Instant::now();
    let output = File::create(Path::new(PLACE).join("output"))?;
    let status = Command::new("/bin/sh")
        .arg("script")
        .current_dir(PLACE)
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()?;
    if !status.success() {
        let said = std::fs::read_to_string(Path::new(PLACE).join("output"))?;
        anyhow::bail!("the script failed: {status}: {said}");
    }
    println!("script_ms={}", begun.elapsed().as_millis());
    Ok(())
}
