//! What is packed, and what comes of it when it is unpacked again.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;
use crate::{Limits, land, unpack};

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn packed(path: &Path) -> Vec<u8> {
    packed_and_left_out(path).0
}

fn packed_and_left_out(path: &Path) -> (Vec<u8>, LeftOut) {
    let mut out = vec![];
    let left_out = Packing::find(path, open).unwrap().pack(&mut out, &|| false).unwrap();
    (out, left_out)
}

fn names(archive: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(archive);
    let names = archive.entries().unwrap();
    let mut names: Vec<_> = names
        .map(|entry| String::from_utf8(entry.unwrap().path_bytes().into_owned()).unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_tree_is_the_same_after_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir_all(from.join("sub")).unwrap();
    let content: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    fs::write(from.join("sub/file"), &content).unwrap();
    fs::write(from.join("empty"), "").unwrap();
    fs::hard_link(from.join("sub/file"), from.join("other")).unwrap();
    let far = "../".repeat(100) + "a//b/";
    symlink(&far, from.join("link")).unwrap();
    let long = "n".repeat(200);
    fs::write(from.join(&long), "long").unwrap();
    let odd = OsStr::from_bytes(b"odd \xff\n");
    fs::write(from.join(odd), "odd").unwrap();
    fs::set_permissions(from.join("sub/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o1555)).unwrap();
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for name in ["sub/file", "sub"] {
        File::open(from.join(name)).unwrap().set_modified(old).unwrap();
    }
    nix::unistd::mkfifo(&from.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();

    let (archive, left_out) = packed_and_left_out(&from);
    let left_out = left_out.to_string();
    assert!(left_out.starts_with("2 devices, sockets and FIFOs: "), "{left_out}");
    assert!(left_out.contains("from/fifo") && left_out.contains("from/socket"), "{left_out}");
    let to = dir.path().join("to");
    let tree = land(&to, open).unwrap().tree(None);
    unpack(&archive[..], tree, Limits::NONE, &|| false).unwrap();
    let meta = |name: &str| fs::symlink_metadata(to.join(name)).unwrap();
    assert!(fs::read(to.join("sub/file")).unwrap() == content);
    assert_eq!(meta("sub/file").mode() & 0o7777, 0o751, "without set-user-id");
    assert_eq!(meta("sub").mode() & 0o7777, 0o1555);
    assert_eq!((meta("sub/file").mtime(), meta("sub").mtime()), (1_000_000_000, 1_000_000_000));
    assert_eq!(meta("other").ino(), meta("sub/file").ino(), "a hard link stays one");
    assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new(&far));
    assert_eq!(fs::read(to.join(&long)).unwrap(), b"long");
    assert_eq!(fs::read(to.join(odd)).unwrap(), b"odd");
    assert_eq!(meta("empty").len(), 0);
    assert!(!to.join("fifo").exists() && !to.join("socket").exists(), "they are left out");
    for sub in [from.join("sub"), to.join("sub")] {
        fs::set_permissions(sub, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn names_are_those_that_were_meant() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/b")).unwrap();
    fs::write(at("a/b/c"), "c").unwrap();
    symlink("a", at("link")).unwrap();
    for (path, expected) in [
        ("a", &["a", "a/b", "a/b/c"][..]),
        ("a/", &["a", "a/b", "a/b/c"]),
        ("a/.", &[".", "b", "b/c"]),
        ("a/b/..", &[".", "b", "b/c"]),
        ("a/b/c", &["c"]),
        ("link", &["link"]),
        ("link/", &["link", "link/b", "link/b/c"]),
        ("link/b", &["b", "b/c"]),
    ] {
        assert_eq!(names(&packed(&at(path))), expected, "{path}");
    }
    for (path, kind) in [("none", ErrorKind::NotFound), ("a/b/c/d", ErrorKind::NotADirectory)] {
        assert_eq!(Packing::find(&at(path), open).unwrap_err().kind(), kind, "{path}");
    }
    let error = Packing::find(Path::new("/dev/null"), open).unwrap_err();
    assert_eq!(error.to_string(), "it is a device");
}

#[test]
fn the_kernel_s_files_are_read_and_its_file_systems_are_not_walked() {
    let archive = packed(Path::new("/proc/version"));
    let mut archive = tar::Archive::new(&archive[..]);
    let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
    let text = io::read_to_string(&mut entry).unwrap();
    assert_eq!(text, fs::read_to_string("/proc/version").unwrap());
    assert!(is_kernels(&open(Path::new("/proc")).unwrap()).unwrap());
    assert!(!is_kernels(&open(Path::new("/")).unwrap()).unwrap());
}

#[test]
fn a_directory_that_is_too_deep_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let deep = |n: usize| dir.path().join("top").join("d/".repeat(n));
    fs::create_dir_all(deep(MAX_DEPTH - 1)).unwrap();
    packed(&dir.path().join("top"));
    fs::create_dir_all(deep(MAX_DEPTH)).unwrap();
    let packing = Packing::find(&dir.path().join("top"), open).unwrap();
    let error = packing.pack(io::sink(), &|| false).unwrap_err().to_string();
    assert!(error.contains("directories deep"), "{error}");
}

#[test]
fn packing_ends_when_nobody_wants_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), vec![0; 1 << 20]).unwrap();
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() > 3
    };
    let packing = Packing::find(dir.path(), open).unwrap();
    assert!(packing.pack(io::sink(), &stop).is_err());
    assert_eq!(asked.get(), 4);
}
