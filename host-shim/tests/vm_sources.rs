//! Hostile and enormous sources, sent to a real server and unpacked in real VMs.
//!
//! Every archive must either be refused by name, or be contained: exactly what it may make is in the
//! image, and nothing of it is anywhere else.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/archive.rs"]
mod archive;
#[path = "support/inputs.rs"]
mod inputs;
mod support;

use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use archive::{EntryType, Tar, gzip, header, xz, zstd};
use inputs::{
    ImageEntry, MEMORY_ROOM, Memory, accepted, agent_peak, image_entries, over, post, survey,
};
use support::Server;

/// Largest source as it is sent, in these tests.
const MAX_SOURCE_MB: u64 = 16;

/// What a source may have unpacked on the smallest disk: half of it.
const UNPACKED_LIMIT: u64 = 512 << 20;

/// Clears the screen, rings, and sets the window's title, where a terminal is shown it.
const EVIL_NAME: &str = "\x1b[2J\x07\x1b]0;owned";

/// As `setcap all=ep` makes it: `struct vfs_cap_data` of capabilities(7), version 2.
const ALL_CAPABILITIES: &[u8] = b"\x01\0\0\x02\xff\xff\xff\xff\0\0\0\0\xff\x01\0\0\0\0\0\0";

/// An archive that must be refused, and what its failure must say.
struct Refused {
    what: &'static str,
    archive: Vec<u8>,
    says: &'static [&'static str],
}

fn refused(what: &'static str, archive: Vec<u8>, says: &'static [&'static str]) -> Refused {
    Refused { what, archive, says }
}

/// A source that would build.
fn good() -> Tar {
    Tar::default().file("Dockerfile", b"FROM scratch\nCOPY . /\n")
}

fn names_and_links() -> Vec<Refused> {
    vec![
        refused("..", good().file("../evil", b"x").end(), &["`../evil`", "`..` in its name"]),
        refused("absolute", good().file("/etc/evil", b"x").end(), &["`/etc/evil`", "absolute"]),
        refused(
            "PAX path",
            good().pax(&[("path", b"../x")]).file("harmless", b"x").end(),
            &["`../x`", "`..`"],
        ),
        refused(
            "GNU long name",
            good().long_name(b"../../x").file("harmless", b"x").end(),
            &["`../../x`", "`..`"],
        ),
        refused(
            "through a link up",
            good().symlink("link", "../..").file("link/evil", b"x").end(),
            &["`link/evil`", "symbolic link"],
        ),
        refused(
            "through an absolute link",
            good().symlink("link", "/etc").file("link/passwd", b"x").end(),
            &["`link/passwd`", "symbolic link"],
        ),
        refused(
            "hard link, absolute",
            good().hard_link("h", "/etc/passwd").end(),
            &["`h`", "hard link to `/etc/passwd`"],
        ),
        refused(
            "hard link up",
            good().hard_link("h", "../x").end(),
            &["`h`", "hard link to `../x`"],
        ),
        refused(
            "hard link through a link",
            good().symlink("l", "/etc").hard_link("h", "l/passwd").end(),
            &["`h`", "hard link to `l/passwd`"],
        ),
        refused(
            "hard link up, in PAX",
            good().pax(&[("linkpath", b"../x")]).hard_link("h", "Dockerfile").end(),
            &["`h`", "hard link to `../x`"],
        ),
        refused(
            "hard link up, in GNU's long form",
            good().long_link(b"../../x").hard_link("h", "Dockerfile").end(),
            &["`h`", "hard link to `../../x`"],
        ),
        refused(
            "the root as a link",
            good().symlink(".", "/etc").file("passwd", b"x").end(),
            &["`.`", "the archive's directory itself"],
        ),
        refused(
            "character device",
            good().of(EntryType::Char, "dev", "").end(),
            &["`dev`", "device"],
        ),
        refused("block device", good().of(EntryType::Block, "dev", "").end(), &["`dev`", "device"]),
        refused("FIFO", good().of(EntryType::Fifo, "pipe", "").end(), &["`pipe`", "FIFO"]),
        refused(
            "a name that speaks to terminals",
            good().of(EntryType::Fifo, EVIL_NAME, "").end(),
            &["`\\u{1b}[2J\\u{7}\\u{1b}]0;owned`"],
        ),
        refused(
            "a name of 256 bytes",
            good().pax(&[("path", &[b'n'; 256])]).file("x", b"").end(),
            &["`nnnn", "longer than 255 bytes"],
        ),
        refused(
            "a path of 4096 bytes",
            good().long_name(&b"d/".repeat(2048)).file("x", b"").end(),
            &["`d/d/", "longer than 4095 bytes"],
        ),
        refused(
            "257 directories",
            good().long_name(&[&b"d/".repeat(257)[..], b"f"].concat()).file("x", b"").end(),
            &["`d/d/", "256 directories deep"],
        ),
    ]
}

fn sizes_and_damage() -> Vec<Refused> {
    let whole = good().file("body", &[7; 2000]).end();
    // Of the second file, a part of the header; and of its content.
    let (in_header, in_body) = (1024 + 100, 1024 + 512 + 700);
    let noise: Vec<u8> =
        (0..20_000_u32).map(|i| (i.wrapping_mul(i) >> 7).to_le_bytes()[0]).collect();
    let packed = good().file("noise", &noise).end();
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    let claims = |size| {
        let mut header = header(EntryType::Regular, b"bomb", b"", size);
        header.set_cksum();
        good().raw(&header, b"")
    };
    // With the Dockerfile, the last of eight is too much.
    let zeros = vec![0; 64 << 20];
    let bomb = (0..8).fold(good(), |tar, i| tar.file(format!("zeros{i}"), &zeros)).end();
    let past_the_limit = UNPACKED_LIMIT + 1;
    vec![
        refused("cut in a header", whole[..in_header].to_vec(), &["cut off", "`Dockerfile`"]),
        refused("cut in a body", whole[..in_body].to_vec(), &["cut off", "`body`"]),
        refused("cut in gzip", half(gzip(&packed)), &["cut off"]),
        refused("cut in zstd", half(zstd(&packed)), &["cut off"]),
        refused(
            "a wrong checksum",
            [&whole[..1024 + 5], b"!", &whole[1024 + 6..]].concat(),
            &["damaged", "`Dockerfile`"],
        ),
        refused(
            "a checksum that speaks to terminals",
            whole_with_evil_checksum(&whole),
            &["damaged", "\\u{1b}[2J\\u{7}"],
        ),
        refused("two archives", [&whole[..], &whole[..]].concat(), &["goes on after its end"]),
        refused("larger than the limit", claims(past_the_limit).end(), &["`bomb`", "536870912"]),
        refused(
            "PAX size over the limit",
            good().pax(&[("size", b"8589934592")]).file("a", b"x").end(),
            &["`a`", "536870912"],
        ),
        refused(
            "PAX size that overflows",
            good().pax(&[("size", b"18446744073709551615")]).file("a", b"x").end(),
            &["damaged", "`Dockerfile`"],
        ),
        refused(
            "PAX size past the end",
            good().pax(&[("size", b"100000")]).file("a", b"x").end(),
            &["cut off", "`a`"],
        ),
        refused(
            "sparse, over the limit",
            good().sparse("holes", 1 << 40, &[7; 512], (1 << 40) + 512).end(),
            &["`holes`", "536870912"],
        ),
        refused(
            "sparse, in PAX",
            good()
                .pax(&[
                    ("GNU.sparse.major", b"1"),
                    ("GNU.sparse.minor", b"0"),
                    ("GNU.sparse.name", b"../x"),
                    ("GNU.sparse.realsize", b"1099511627776"),
                ])
                .file("GNUSparseFile.0/x", b"1\n0\n512\n")
                .end(),
            &["`GNUSparseFile.0/x`", "sparse"],
        ),
        refused(
            "headers of 2 MiB",
            good().long_name(&[b'n'; 2 << 20]).file("a", b"").end(),
            &["over-long headers", "`Dockerfile`"],
        ),
        refused(
            "gzip bomb",
            gzip(&good().file("zeros", &vec![0; usize::try_from(past_the_limit).unwrap()]).end()),
            &["`zeros`", "536870912"],
        ),
        refused("zstd bomb of many files", zstd(&bomb), &["`zeros7`", "536870912"]),
        refused("too many entries", too_many(), &["more than 1000000 files", "`./`"]),
    ]
}

/// A million entries, each of which changes nothing, and one more. In frames: none has to be made whole here.
fn too_many() -> Vec<u8> {
    const A_FRAME: usize = 10_000;
    let roots = (0..A_FRAME).fold(Tar::default(), |tar, _| tar.dir("./"));
    [zstd(&good().0), zstd(&roots.0).repeat(1_000_000 / A_FRAME), zstd(&Tar::default().end())]
        .concat()
}

/// tar's reader quotes the field in what it says.
fn whole_with_evil_checksum(whole: &[u8]) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    bytes[1024 + 148..][..8].copy_from_slice(b"\x1b[2J\x07\x07\x07\0");
    bytes
}

/// Hostile, or merely odd, and unpacked all the same.
fn contained() -> Tar {
    // What a reader that believes the header, and not the extended one, takes for an entry.
    let smuggled = Tar::default().file("smuggled", b"").0;
    let deep = [&b"d/".repeat(60)[..], b"leaf"].concat();
    let long = [b'n'; 255];
    Tar::default()
        .file("Dockerfile", b"FROM scratch\nCOPY in /\n")
        .dir("in/")
        .mode("in/setuid", 0o6755, b"root?")
        .file("in/twice", b"the first, and longer")
        .file("in/twice", b"the last")
        .symlink("in/was-link", "../../../../etc/passwd")
        .file("in/was-link", b"a file now")
        .symlink("in/was-dir-link", "/etc")
        .dir("in/was-dir-link/")
        .file("in/was-dir-link/passwd", b"contained")
        .file(b"in/caf\xe9", b"latin1")
        .file(format!("in/{EVIL_NAME}"), b"evil name")
        .long_name(&[&b"in/"[..], &deep].concat())
        .file("x", b"deep")
        .pax(&[("path", &[&b"in/"[..], &long].concat())])
        .file("x", b"long")
        .symlink("in/absolute", "/etc/passwd")
        .symlink("in/up", "../../../../etc/passwd")
        .symlink("in/alias", "was-dir-link")
        .file("in/alias/through", b"inside")
        .hard_link("in/hard", "in/twice")
        .hard_link("in/hard-to-link", "in/absolute")
        .file("in/hard-to-link", b"replaced")
        .sparse("in/sparse", 0o1000, &[7; 512], 0o2000)
        .pax(&[("size", b"512")])
        .raw(&header(EntryType::Regular, b"in/pax-size", b"", 0), &smuggled)
        .pax(&[("SCHILY.xattr.security.capability", ALL_CAPABILITIES)])
        .mode("in/capable", 0o755, b"root?")
        .pax_of_all(&[("path", b"../x"), ("comment", b"by git archive")])
        .file("in/after-all", b"by its own name")
}

#[test]
fn vm_hostile_sources_are_refused_or_contained() {
    let server = Server::start_with(&["--max-source-mb", &MAX_SOURCE_MB.to_string()]);
    let around = server.data().parent().unwrap().to_owned();
    std::fs::write(around.join("x"), "untouched").unwrap();
    let passwd =
        || std::fs::metadata("/etc/passwd").map(|m| (m.ino(), m.len(), m.mtime())).unwrap();
    let small_disk = &[("disk_gb", "1")];
    // One that is good makes what every first build makes, such as the template of its disk.
    let first = server.wait(&accepted(&server, &good().end(), small_disk));
    assert_eq!(first["status"], "ready", "{first:#}");
    let (before, passwd_before) = (survey(&around), passwd());

    // The slow ones first, so that they overlap.
    let cases: Vec<_> = sizes_and_damage().into_iter().rev().chain(names_and_links()).collect();
    let ids: Vec<_> =
        cases.iter().map(|case| accepted(&server, &case.archive, small_disk)).collect();
    let kept = contained().end();
    let packings = [gzip(&kept), in_frames(&kept)];
    let kept: Vec<_> = packings.iter().map(|a| accepted(&server, a, small_disk)).collect();

    let mut wrong = Vec::new();
    for (case, id) in cases.iter().zip(&ids) {
        let build = server.wait(id);
        let message = build["failure"]["message"].as_str().unwrap_or_default();
        let fails = build["status"] == "failed" && build["failure"]["kind"] == "source_invalid";
        let says = case.says.iter().all(|part| message.contains(part));
        if !fails || !says || message.chars().any(char::is_control) {
            wrong.push(format!("{}: {} {}", case.what, build["status"], build["failure"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    for id in &kept {
        let build = server.wait(id);
        assert_eq!(build["status"], "ready", "{build:#}");
        assert_contained(&server, build["image_ref"].as_str().unwrap());
    }

    // What is beyond the limit as it is sent is not even taken.
    let large = tempfile::NamedTempFile::new().unwrap();
    large.as_file().write_all(&good().0).unwrap();
    large.as_file().set_len((MAX_SOURCE_MB << 20) + 1).unwrap();
    let (status, problem) = post(&server, large.path(), &[]);
    assert_eq!((status, &problem["code"]), (413, &"too_large".into()), "{problem}");
    // Nor is what no agent unpacks.
    let packed = tempfile::NamedTempFile::new().unwrap();
    packed.as_file().write_all(&xz(&good().end())).unwrap();
    let (status, problem) = post(&server, packed.path(), &[]);
    assert_eq!((status, &problem["code"]), (400, &"invalid_source".into()), "{problem}");

    for program in ["qemu-system-x86_64", "vhost-device-vsock"] {
        assert!(server.processes(program).is_empty(), "{program} is left");
    }
    assert_eq!(passwd(), passwd_before);
    let mut unexpected = Vec::new();
    let after = survey(&around);
    for name in before.keys().chain(after.keys()) {
        if before.get(name) != after.get(name) && !is_expected(name) {
            let both = (before.get(name), after.get(name));
            unexpected.push(format!("{name}: {both:?}"));
        }
    }
    assert!(unexpected.is_empty(), "the surroundings changed:\n{}", unexpected.join("\n"));
    server.stop();
}

/// As pzstd packs: a frame that is skipped before each that has content.
fn in_frames(bytes: &[u8]) -> Vec<u8> {
    let skipped = [0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];
    let (first, second) = bytes.split_at(700);
    [&skipped[..], &zstd(first), &skipped, &zstd(second)].concat()
}

/// What changes when builds run and images are published.
fn is_expected(name: &str) -> bool {
    name == "serve.log" || name.starts_with("data/kiln.db") || name.starts_with("data/registry/")
}

fn assert_contained(server: &Server, image: &str) {
    let entries = image_entries(server, image);
    let file = |mode, content: &[u8]| ImageEntry {
        kind: EntryType::Regular,
        mode,
        owner: (0, 0),
        content: content.to_vec(),
        xattrs: vec![],
    };
    let link = |target: &str| ImageEntry {
        kind: EntryType::Symlink,
        mode: 0o777,
        owner: (0, 0),
        content: target.into(),
        xattrs: vec![],
    };
    let directory = ImageEntry { kind: EntryType::Directory, ..file(0o755, b"") };
    let mut expected = vec![
        (b"setuid".to_vec(), file(0o755, b"root?")),
        (b"twice".to_vec(), file(0o644, b"the last")),
        (b"hard".to_vec(), file(0o644, b"the last")),
        (b"was-link".to_vec(), file(0o644, b"a file now")),
        (b"was-dir-link".to_vec(), directory.clone()),
        (b"was-dir-link/passwd".to_vec(), file(0o644, b"contained")),
        (b"was-dir-link/through".to_vec(), file(0o644, b"inside")),
        (b"caf\xe9".to_vec(), file(0o644, b"latin1")),
        (EVIL_NAME.into(), file(0o644, b"evil name")),
        (vec![b'n'; 255], file(0o644, b"long")),
        (b"absolute".to_vec(), link("/etc/passwd")),
        (b"up".to_vec(), link("../../../../etc/passwd")),
        (b"alias".to_vec(), link("was-dir-link")),
        (b"hard-to-link".to_vec(), file(0o644, b"replaced")),
        (b"capable".to_vec(), file(0o755, b"root?")),
        (b"after-all".to_vec(), file(0o644, b"by its own name")),
        (b"sparse".to_vec(), file(0o644, &[[0; 512], [7; 512]].concat())),
        (b"pax-size".to_vec(), file(0o644, &Tar::default().file("smuggled", b"").0)),
        ([&b"d/".repeat(60)[..], b"leaf"].concat(), file(0o644, b"deep")),
    ];
    expected.extend(
        (1..=60).map(|depth| (b"d/".repeat(depth)[..2 * depth - 1].to_vec(), directory.clone())),
    );
    let mut wrong = Vec::new();
    for (name, entry) in &expected {
        let shown = String::from_utf8_lossy(name).into_owned();
        // One of two names of a file is a link to the other, whichever comes first.
        let found = entries.get(name).map(|found| match entries.get(&found.content) {
            Some(linked) if found.kind == EntryType::Link => linked,
            _ => found,
        });
        if found != Some(entry) {
            wrong.push(format!("{shown:?}: {found:?}, not {entry:?}"));
        }
    }
    for name in entries.keys().filter(|name| !expected.iter().any(|(known, _)| known == *name)) {
        wrong.push(format!("{:?} is there too", String::from_utf8_lossy(name)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// By `KILN_TEST_SOURCE_MB`; the default takes some twenty seconds under emulation.
fn source_mb() -> u64 {
    std::env::var("KILN_TEST_SOURCE_MB").map_or(128, |mb| mb.parse().unwrap())
}

#[test]
fn vm_a_large_source_costs_neither_side_memory() {
    let mb = source_mb();
    let server = Server::start_with(&["--max-source-mb", &(mb + 1).to_string()]);
    let build = |archive: &Path| {
        let (status, build) = post(&server, archive, &[]);
        assert_eq!(status, 202, "{build}");
        let build = server.wait(build["id"].as_str().unwrap());
        assert_eq!(build["status"], "ready", "{build:#}");
        let entries = image_entries(&server, build["image_ref"].as_str().unwrap());
        assert_eq!(entries[&b"last"[..]].content, b"the last entry");
        build
    };
    let first = Tar::default().file("Dockerfile", b"FROM scratch\nCOPY last /\n");
    let last = Tar::default().file("last", b"the last entry").end();
    let archive = tempfile::NamedTempFile::new().unwrap();
    let mut file = archive.as_file();
    file.write_all(&[&first.0[..], &last].concat()).unwrap();
    let tiny = build(archive.path());

    // A file with a hole: neither this disk nor the VM's has to hold it.
    let large = first.raw(&header(EntryType::Regular, b"large", b"", mb << 20), b"").0;
    file.seek(SeekFrom::Start(0)).unwrap();
    file.write_all(&large).unwrap();
    file.seek(SeekFrom::Start(large.len() as u64 + (mb << 20))).unwrap();
    file.write_all(&last).unwrap();
    let memory = Memory::watch(server.pid());
    let begun = std::time::Instant::now();
    let build = build(archive.path());
    let (rise, took) = (memory.rise(), begun.elapsed());
    let (base, peak) = (agent_peak(&tiny), agent_peak(&build));
    eprintln!(
        "{mb} MiB in {took:?}; the server's memory rose by {} KiB; the agent's: {}",
        rise >> 10,
        over(peak, base)
    );
    assert!(rise <= MEMORY_ROOM, "the server's memory rose by {rise} bytes");
    assert!(peak - base.min(peak) <= MEMORY_ROOM, "the agent's: {}", over(peak, base));
    server.stop();
}
