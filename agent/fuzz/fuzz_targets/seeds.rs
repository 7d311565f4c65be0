//! Writes the archives that the fuzzer begins with: `seeds DIRECTORY`.

#![allow(dead_code, unused_imports)]

#[path = "../attempt.rs"]
mod attempt;
#[path = "../../src/source/mod.rs"]
mod source;

fn main() -> std::io::Result<()> {
    let dir = std::path::PathBuf::from(std::env::args_os().nth(1).expect("seeds DIRECTORY"));
    std::fs::create_dir_all(&dir)?;
    for (number, seed) in attempt::seeds().into_iter().enumerate() {
        std::fs::write(dir.join(format!("seed-{number}")), seed)?;
    }
    Ok(())
}
