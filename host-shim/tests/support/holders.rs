//! Which files hold a text: as they are on the disk, and as what is packed in them unpacks.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A text that was found.
#[derive(Debug)]
pub struct Holder {
    pub path: PathBuf,
    pub text: String,
    /// It is in what the file unpacks to, and not in the file.
    pub packed: bool,
}

/// Files below a directory that hold one of these texts, each of which is on one line.
pub fn holders(dir: &Path, texts: &[&str]) -> Vec<Holder> {
    let mut found = vec![];
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let kind = entry.file_type().unwrap();
        // Empty disks of many GiB.
        if path.ends_with("templates") {
            continue;
        }
        if kind.is_dir() {
            found.extend(holders(&path, texts));
        } else if kind.is_file() {
            let as_it_is = lines(texts, File::open(&path).unwrap().into());
            let unpacked = unpacked(&path, texts);
            for (texts, packed) in [(as_it_is, false), (unpacked, true)] {
                let one = |text| Holder { path: path.clone(), text, packed };
                found.extend(texts.into_iter().map(one));
            }
        }
    }
    found
}

/// By the first bytes, as the registry's blobs have no names that say it.
fn unpacked(path: &Path, texts: &[&str]) -> Vec<String> {
    let mut magic = vec![];
    File::open(path).unwrap().take(4).read_to_end(&mut magic).unwrap();
    let program = match magic[..] {
        [0x1f, 0x8b, ..] => "gzip",
        [0x28, 0xb5, 0x2f, 0xfd] => "zstd",
        _ => return vec![],
    };
    let mut child = Command::new(program)
        .args(["-d", "-c"])
        .stdin(File::open(path).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let found = lines(texts, child.stdout.take().unwrap().into());
    assert!(child.wait().unwrap().success(), "{} does not unpack", path.display());
    found
}

/// Which of the texts there are. Zeros end what `grep` takes for a line; all is read, whatever is found.
pub fn lines(texts: &[&str], input: Stdio) -> Vec<String> {
    let mut grep = Command::new("grep");
    grep.args(["-a", "-z", "-o", "-F"]).env("LC_ALL", "C").stdin(input);
    for text in texts {
        grep.args(["-e", text]);
    }
    let out = grep.output().unwrap();
    assert!(matches!(out.status.code(), Some(0 | 1)), "{out:?}");
    let found = out.stdout.split(|byte| *byte == 0).filter(|text| !text.is_empty());
    let mut found: Vec<_> = found.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect();
    found.sort();
    found.dedup();
    found
}
