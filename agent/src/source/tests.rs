#![allow(clippy::unwrap_used)]
//! Archives by hand, most of them hostile. Each is unpacked beside files that must not change.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use kiln_protocol::event::FailureKind;
use tar::{EntryType, Header};

use kiln_archive::{Problem, shown};

use super::*;

const ROOMY: SourceLimits = SourceLimits { bytes: 64 << 20, entries: 10_000 };

fn header(kind: EntryType, name: &[u8], link: &[u8], size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_mtime(1_000_000_000);
    header.set_size(size);
    header.set_cksum();
    header
}

fn padded(content: &[u8]) -> Vec<u8> {
    let mut bytes = content.to_vec();
    bytes.resize(content.len().next_multiple_of(512), 0);
    bytes
}

/// An archive that grows entry by entry.
#[derive(Clone, Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn raw(mut self, header: &Header, content: &[u8]) -> Self {
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend(padded(content));
        self
    }
    fn file(self, name: &str, content: &[u8]) -> Self {
        let header = header(EntryType::Regular, name.as_bytes(), b"", content.len() as u64);
        self.raw(&header, content)
    }
    fn of(self, kind: EntryType, name: &str, link: &str) -> Self {
        self.raw(&header(kind, name.as_bytes(), link.as_bytes(), 0), b"")
    }
    fn dir(self, name: &str) -> Self {
        self.of(EntryType::Directory, name, "")
    }
    fn symlink(self, name: &str, target: &str) -> Self {
        self.of(EntryType::Symlink, name, target)
    }
    fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// A directory with a source's directory in it, and things around it that must stay.
struct Place {
    dir: tempfile::TempDir,
    before: BTreeMap<String, String>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("source")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/victim"), "untouched").unwrap();
        fs::write(dir.path().join("secret"), "untouched").unwrap();
        let before = survey(dir.path(), "source");
        Self { dir, before }
    }
    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("source")
    }
    fn unpack_with(&self, archive: &[u8], limits: SourceLimits) -> Result<(), SourceError> {
        let result = unpack(archive, &self.root(), limits, &|| false);
        assert_eq!(survey(self.dir.path(), "source"), self.before, "the surroundings changed");
        result
    }
    fn unpack(&self, archive: &[u8]) -> Result<(), SourceError> {
        self.unpack_with(archive, ROOMY)
    }
    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.root().join(name)).unwrap()
    }
    fn stat(&self, name: &str) -> fs::Metadata {
        fs::symlink_metadata(self.root().join(name)).unwrap()
    }
    fn is_there(&self, name: &str) -> bool {
        fs::symlink_metadata(self.root().join(name)).is_ok()
    }
}

/// Every path with what it is and holds, but for one directory.
fn survey(root: &Path, except: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            if name == except {
                continue;
            }
            let content =
                if meta.is_file() { fs::read_to_string(&path).unwrap() } else { String::new() };
            found.insert(
                name,
                format!("{:o} {} {} {content}", meta.mode(), meta.nlink(), meta.uid()),
            );
            if meta.is_dir() {
                todo.push(path);
            }
        }
    }
    found
}

/// The problem that an archive's only bad entry has.
fn problem(archive: &[u8]) -> (String, Problem) {
    let error = Place::new().unpack(archive).unwrap_err();
    assert_eq!(error.kind(), FailureKind::SourceInvalid);
    match error {
        SourceError::Entry { name, problem } => (name, problem),
        other => panic!("{other}"),
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn an_ordinary_archive_is_unpacked_in_every_packing() {
    let tar = Tar::default()
        .dir("./")
        .file("./Dockerfile", b"FROM scratch\n")
        .dir("src/")
        .file("src/main.c", b"int main() {}\n")
        .file("deep/er/file", b"made its parents")
        .symlink("link", "src/main.c")
        .end();
    let (first, second) = tar.split_at(700);
    let members = [gzip(first), gzip(second)].concat();
    let skippable = [
        &[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..],
        &zstd::encode_all(&tar[..], 3).unwrap(),
    ]
    .concat();
    for archive in
        [tar.clone(), gzip(&tar), members, zstd::encode_all(&tar[..], 3).unwrap(), skippable]
    {
        let place = Place::new();
        place.unpack(&archive).unwrap();
        assert_eq!(place.read("Dockerfile"), "FROM scratch\n");
        assert_eq!(place.read("src/main.c"), "int main() {}\n");
        assert_eq!(place.read("deep/er/file"), "made its parents");
        assert_eq!(place.read("link"), "int main() {}\n");
        assert_eq!(place.stat("deep").mode() & 0o7777, 0o755);
        let file = place.stat("src/main.c");
        assert_eq!((file.mode() & 0o7777, file.mtime(), file.uid()), (0o644, 1_000_000_000, 0));
    }
}

#[test]
fn modes_are_kept_without_the_bits_that_raise_rights() {
    let mut setuid = header(EntryType::Regular, b"tool", b"", 0);
    setuid.set_mode(0o6755);
    setuid.set_cksum();
    let mut sticky = header(EntryType::Directory, b"tmp/", b"", 0);
    sticky.set_mode(0o3777);
    sticky.set_uid(1000);
    sticky.set_cksum();
    let place = Place::new();
    place
        .unpack(&Tar::default().raw(&setuid, b"").raw(&sticky, b"").file("tmp/x", b"").end())
        .unwrap();
    assert_eq!(place.stat("tool").mode() & 0o7777, 0o755);
    assert_eq!(place.stat("tmp").mode() & 0o7777, 0o1777);
    assert_eq!(place.stat("tmp").uid(), 0);
}

#[test]
fn names_that_leave_the_source_are_refused_by_name() {
    for (name, expected) in [
        ("/etc/evil", Problem::Absolute),
        ("../secret", Problem::ParentDir),
        ("a/../../secret", Problem::ParentDir),
        ("..", Problem::ParentDir),
    ] {
        assert_eq!(problem(&Tar::default().file(name, b"evil").end()), (name.to_owned(), expected));
    }
    let nameless = Tar::default().raw(&header(EntryType::Regular, b"", b"", 0), b"").end();
    assert_eq!(problem(&nameless).1, Problem::NoName);
}

#[test]
fn entries_through_links_that_leave_the_source_are_refused() {
    for target in ["../outside", "..", "/etc", "/", "self/../../outside"] {
        let with_link = || Tar::default().symlink("self", ".").symlink("link", target);
        for archive in [
            with_link().file("link/victim", b"evil"),
            with_link().dir("link/made/"),
            with_link().symlink("link/made", "x"),
            with_link().file("link/a/b/c", b"evil"),
            with_link().symlink("indirect", "self/link").file("indirect/victim", b"evil"),
            with_link().dir("d/").symlink("d/up", "../link").file("d/up/victim", b"evil"),
        ] {
            let place = Place::new();
            let error = place.unpack(&archive.end()).unwrap_err();
            assert_eq!(error.kind(), FailureKind::SourceInvalid, "{target}: {error}");
        }
    }
    let archive = Tar::default().symlink("loop", "loop").file("loop/x", b"").end();
    assert_eq!(problem(&archive), ("loop/x".into(), Problem::Escapes));
    let archive = Tar::default().symlink("nowhere", "missing").file("nowhere/x", b"").end();
    assert_eq!(problem(&archive), ("nowhere/x".into(), Problem::NoParent));
    let archive = Tar::default().file("file", b"").file("file/x", b"").end();
    assert_eq!(problem(&archive), ("file/x".into(), Problem::NoParent));
}

#[test]
fn links_inside_the_source_may_be_gone_through() {
    let place = Place::new();
    let archive = Tar::default().dir("real/").symlink("alias", "real").file("alias/x", b"here");
    place.unpack(&archive.end()).unwrap();
    assert_eq!(place.read("real/x"), "here");
}

#[test]
fn a_file_of_a_links_name_replaces_the_link_and_leaves_its_target() {
    let place = Place::new();
    symlink("../secret", place.root().join("was-there")).unwrap();
    let archive = Tar::default()
        .symlink("link", "../secret")
        .file("link", b"new")
        .file("was-there", b"new")
        .symlink("dir", "../outside")
        .dir("dir/")
        .file("dir/victim", b"new")
        .end();
    place.unpack(&archive).unwrap();
    assert_eq!(place.read("link"), "new");
    assert_eq!(place.read("was-there"), "new");
    assert!(place.stat("dir").is_dir());
    assert_eq!(place.read("dir/victim"), "new");
}

#[test]
fn the_root_is_a_directory_or_nothing() {
    for name in [".", "./", "./."] {
        assert_eq!(problem(&Tar::default().symlink(name, "../outside").end()).1, Problem::Root);
        assert_eq!(problem(&Tar::default().of(EntryType::Link, name, "x").end()).1, Problem::Root);
    }
    assert_eq!(problem(&Tar::default().file(".", b"x").end()).1, Problem::Root);
    Place::new().unpack(&Tar::default().dir(".").end()).unwrap();
}

#[test]
fn later_entries_replace_earlier_ones() {
    let place = Place::new();
    let archive = Tar::default()
        .file("a", b"first, and longer")
        .file("a", b"second")
        .dir("empty/")
        .file("empty", b"now a file")
        .file("was-file", b"x")
        .dir("was-file/")
        .file("was-file/in", b"x")
        .symlink("l", "one")
        .symlink("l", "two")
        .end();
    place.unpack(&archive).unwrap();
    assert_eq!(place.read("a"), "second");
    assert_eq!(place.read("empty"), "now a file");
    assert_eq!(place.read("was-file/in"), "x");
    assert_eq!(fs::read_link(place.root().join("l")).unwrap(), Path::new("two"));

    let archive = Tar::default().file("d/x", b"").file("d", b"").end();
    assert_eq!(problem(&archive), ("d".into(), Problem::ReplacesDirectory));
}

#[test]
fn hard_links_join_files_of_the_source_only() {
    let place = Place::new();
    let link = EntryType::Link;
    let archive = Tar::default()
        .file("d/a", b"content")
        .of(link, "b", "./d/a")
        .of(link, "b", "d/a")
        .of(link, "d/a", "d/a")
        .end();
    place.unpack(&archive).unwrap();
    assert_eq!(place.read("b"), "content");
    assert_eq!(place.stat("b").ino(), place.stat("d/a").ino());

    for target in ["../secret", "/etc/passwd", "missing", "", ".", "d", "out/victim", "d/missing"] {
        let archive =
            Tar::default().dir("d/").symlink("out", "../outside").of(link, "h", target).end();
        let (name, problem) = problem(&archive);
        assert_eq!((name.as_str(), problem), ("h", Problem::BadHardLink(target.into())));
    }
    // To a link, not to what it leads to; writing to the new name replaces it.
    let place = Place::new();
    let archive =
        Tar::default().symlink("s", "../secret").of(link, "h", "s").file("h", b"new").end();
    place.unpack(&archive).unwrap();
    assert_eq!(place.read("h"), "new");
}

#[test]
fn dangling_and_outside_links_are_made_as_they_are() {
    let place = Place::new();
    let archive = Tar::default().symlink("abs", "/etc/passwd").symlink("up", "../../x").end();
    place.unpack(&archive).unwrap();
    assert_eq!(fs::read_link(place.root().join("abs")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(problem(&Tar::default().symlink("s", "").end()).1, Problem::BadSymlink);
}

#[test]
fn devices_fifos_and_unknown_kinds_are_refused() {
    for (kind, expected) in [
        (EntryType::Char, Problem::Device),
        (EntryType::Block, Problem::Device),
        (EntryType::Fifo, Problem::Fifo),
        (EntryType::new(b'M'), Problem::UnknownKind('M')),
        (EntryType::new(1), Problem::UnknownKind('?')),
    ] {
        assert_eq!(problem(&Tar::default().of(kind, "x", "").end()), ("x".into(), expected));
    }
}

#[test]
fn names_need_not_be_text_and_are_shown_safely() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let odd = b"caf\xe9\x1b[31m";
    place.unpack(&Tar::default().raw(&header(EntryType::Regular, odd, b"", 0), b"").end()).unwrap();
    assert!(place.root().join(std::ffi::OsStr::from_bytes(odd)).exists());
    let archive = Tar::default().raw(&header(EntryType::Fifo, b"\x1b[2J\x07", b"", 0), b"").end();
    assert_eq!(problem(&archive).0, "\\u{1b}[2J\\u{7}");
    assert!(shown(&[b'x'; 4000]).len() < 300);
}

#[test]
fn an_archive_that_is_cut_anywhere_is_refused() {
    let whole = Tar::default().file("a", &[b'x'; 600]).file("b", b"y").end();
    let content_ends = whole.len() - 1024;
    for cut in [0, 1, 511, 512, 513, 1000, 1535, 1536, 1600, content_ends - 1, content_ends] {
        let error = Place::new().unpack(&whole[..cut]).unwrap_err();
        assert_eq!(error.kind(), FailureKind::SourceInvalid);
        let is_cut = matches!(error, SourceError::Truncated { .. });
        // Within the first header nothing shows that it is a tar at all.
        assert!(
            is_cut || (cut < 512 && matches!(error, SourceError::NotAnArchive)),
            "{cut}: {error}"
        );
    }
    for packed in [gzip(&whole), zstd::encode_all(&whole[..], 3).unwrap()] {
        for cut in 1..packed.len() {
            assert!(Place::new().unpack(&packed[..cut]).is_err(), "cut at {cut}");
        }
    }
}

#[test]
fn damaged_compression_and_other_files_are_refused() {
    let mut packed = gzip(&Tar::default().file("a", b"x").end());
    let crc = packed.len() - 6;
    packed[crc] ^= 1;
    assert!(matches!(
        Place::new().unpack(&packed).unwrap_err(),
        SourceError::Damaged { format: "gzip", .. }
    ));
    let text = b"this is no archive ".repeat(100);
    assert!(matches!(Place::new().unpack(&text).unwrap_err(), SourceError::NotAnArchive));
    let xz = [&[0xfd, b'7', b'z', b'X', b'Z', 0][..], &text].concat();
    assert!(matches!(Place::new().unpack(&xz).unwrap_err(), SourceError::Unsupported("xz")));
    assert!(Place::new().unpack(&[gzip(&text), text].concat()).is_err());
}

#[test]
fn what_the_reader_quotes_of_the_archive_is_shown_safely() {
    let mut bad = header(EntryType::Regular, b"x", b"", 0);
    bad.as_old_mut().cksum = *b"\x1b[2J\x07\x7f\x9b ";
    let error =
        Place::new().unpack(&Tar::default().file("a", b"").raw(&bad, b"").end()).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, SourceError::Damaged { .. }), "{message}");
    assert!(
        message.contains("\\u{1b}[2J\\u{7}") && !message.contains(char::is_control),
        "{message:?}"
    );
}

/// What the fuzzer does (`agent/fuzz`), with what it begins with and some changes of that.
#[path = "../../fuzz/attempt.rs"]
mod attempt;

#[test]
fn what_the_fuzzer_begins_with_changes_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    let place = attempt::Place::new(dir.path()).unwrap();
    let results: Vec<_> =
        attempt::seeds().iter().map(|seed| place.attempt(seed).unwrap().is_ok()).collect();
    assert!(results.contains(&true) && results.contains(&false));
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 64, ..Default::default() })]
    #[test]
    fn what_is_like_an_archive_changes_nothing_outside(
        seed: proptest::sample::Index,
        changes: Vec<(proptest::sample::Index, u8)>,
    ) {
        let mut seed = seed.get(&attempt::seeds()).clone();
        for (at, byte) in &changes[..changes.len().min(8)] {
            *at.get_mut(&mut seed) = *byte;
        }
        seed[0] |= 1;
        let dir = tempfile::tempdir().unwrap();
        attempt::Place::new(dir.path()).unwrap().attempt(&seed);
    }
}

#[test]
fn lies_about_sizes_are_refused() {
    // Longer than what follows: the end is missing.
    let long = Tar::default().raw(&header(EntryType::Regular, b"a", b"", 1 << 20), b"short").end();
    assert!(matches!(Place::new().unpack(&long).unwrap_err(), SourceError::Truncated { .. }));
    // Shorter: its content stands where the next header should.
    let short = Tar::default().raw(&header(EntryType::Regular, b"a", b"", 1), &[b'x'; 2000]).end();
    assert!(matches!(Place::new().unpack(&short).unwrap_err(), SourceError::Damaged { .. }));
    // An extended header that gives a file another size than its header: the reader follows the
    // extended one, as tar programs do, and does not take content for entries.
    let hidden = Tar::default().file("smuggled", b"").end();
    let pax = b"13 size=2048\n";
    let archive = Tar::default()
        .raw(&header(EntryType::XHeader, b"pax", b"", pax.len() as u64), pax)
        .raw(&header(EntryType::Regular, b"a", b"", 0), &[&hidden[..], &[0; 512]].concat())
        .end();
    let place = Place::new();
    place.unpack(&archive).unwrap();
    assert_eq!(place.stat("a").len(), 2048);
    assert!(!place.is_there("smuggled"));
    // One so long that the sum overflows.
    let pax = b"29 size=18446744073709551615\n";
    let archive = Tar::default()
        .raw(&header(EntryType::XHeader, b"pax", b"", pax.len() as u64), pax)
        .file("a", b"x")
        .end();
    assert!(Place::new().unpack(&archive).is_err());
}

#[test]
fn the_bytes_limit_holds_at_and_breaks_above_before_anything_is_written() {
    let archive = Tar::default().file("a", &[1; 600]).file("b", &[2; 400]).end();
    let with = |bytes| SourceLimits { bytes, ..ROOMY };
    Place::new().unpack_with(&archive, with(1000)).unwrap();
    let place = Place::new();
    let error = place.unpack_with(&archive, with(999)).unwrap_err();
    assert!(matches!(&error, SourceError::TooLarge { limit: 999, name } if name == "b"), "{error}");
    assert!(!place.is_there("b"));
    let bomb = Tar::default().raw(&header(EntryType::Regular, b"bomb", b"", 1 << 40), b"").end();
    assert!(matches!(Place::new().unpack(&bomb).unwrap_err(), SourceError::TooLarge { .. }));
}

#[test]
fn the_entries_limit_counts_everything_and_made_parents_too() {
    let archive = Tar::default()
        .file("a/b/c", b"")
        .dir("d/")
        .symlink("e", "x")
        .of(EntryType::Link, "f", "a/b/c")
        .end();
    let with = |entries| SourceLimits { entries, ..ROOMY };
    Place::new().unpack_with(&archive, with(6)).unwrap();
    let error = Place::new().unpack_with(&archive, with(5)).unwrap_err();
    assert!(matches!(&error, SourceError::TooMany { limit: 5, name } if name == "f"), "{error}");
}

#[test]
fn sparse_files_count_with_their_whole_size() {
    let mut sparse = header(EntryType::GNUSparse, b"sparse", b"", 512);
    {
        let gnu = sparse.as_gnu_mut().unwrap();
        gnu.sparse[0].offset.copy_from_slice(b"00000100000\0");
        gnu.sparse[0].numbytes.copy_from_slice(b"00000001000\0");
        gnu.realsize.copy_from_slice(b"00000101000\0");
    }
    sparse.set_cksum();
    let archive = Tar::default().raw(&sparse, &[7; 512]).end();
    let place = Place::new();
    place.unpack(&archive).unwrap();
    let content = fs::read(place.root().join("sparse")).unwrap();
    assert_eq!((content.len(), content[0], content[0o100_000]), (0o101_000, 0, 7));
    let small = SourceLimits { bytes: 0o101_000 - 1, ..ROOMY };
    assert!(matches!(
        Place::new().unpack_with(&archive, small).unwrap_err(),
        SourceError::TooLarge { .. }
    ));

    let pax = b"22 GNU.sparse.major=1\n";
    let archive = Tar::default()
        .raw(&header(EntryType::XHeader, b"pax", b"", pax.len() as u64), pax)
        .file("a", b"x")
        .end();
    assert_eq!(problem(&archive), ("a".into(), Problem::Sparse));
}

#[test]
fn headers_are_bounded() {
    let name = vec![b'n'; 4000];
    let with = |size: usize| {
        let long = header(EntryType::GNULongName, b"././@LongLink", b"", size as u64);
        Tar::default().raw(&long, &vec![b'n'; size]).file("a", b"").end()
    };
    // A long name that Linux takes, by its parts.
    let fits = "d/".repeat(200) + "leaf";
    let long = header(EntryType::GNULongName, b"././@LongLink", b"", fits.len() as u64);
    Place::new().unpack(&Tar::default().raw(&long, fits.as_bytes()).file("a", b"").end()).unwrap();

    assert_eq!(problem(&with(name.len())).1, Problem::LongName(255));
    let error = Place::new().unpack(&with(2 << 20)).unwrap_err();
    assert!(matches!(error, SourceError::Headers { .. }), "{error}");
    let deep = "d/".repeat(kiln_archive::MAX_DEPTH + 1) + "leaf";
    let long = header(EntryType::GNULongName, b"././@LongLink", b"", deep.len() as u64);
    let archive = Tar::default().raw(&long, deep.as_bytes()).file("a", b"").end();
    assert_eq!(problem(&archive).1, Problem::TooDeep(kiln_archive::MAX_DEPTH));
    // An extended header in the oldest form, which tar's reader gives out as an entry.
    let mut old = Header::new_old();
    old.set_entry_type(EntryType::XHeader);
    old.set_path("x").unwrap();
    old.set_size(1 << 40);
    old.set_mode(0o644);
    old.set_cksum();
    assert_eq!(problem(&Tar::default().raw(&old, b"").end()).1, Problem::BadHeaders);
}

#[test]
fn what_follows_the_end_is_padding_or_refused() {
    let end = Tar::default().file("a", b"x").end();
    let padded = [&end[..], &vec![0; 1 << 20][..]].concat();
    Place::new().unpack(&padded[..padded.len() - 1024]).unwrap();
    let second = [&end[..], &end[..]].concat();
    assert!(matches!(Place::new().unpack(&second).unwrap_err(), SourceError::TrailingData));
    let endless = [&end[..], &vec![0; (1 << 20) + 1]].concat();
    assert!(matches!(Place::new().unpack(&endless).unwrap_err(), SourceError::TrailingData));
}

#[test]
fn comments_of_the_archive_are_passed_over() {
    let comment = b"52 comment=0123456789012345678901234567890123456789\n";
    let global = header(EntryType::XGlobalHeader, b"pax_global_header", b"", comment.len() as u64);
    let place = Place::new();
    place.unpack(&Tar::default().raw(&global, comment).file("a", b"x").end()).unwrap();
    assert!(place.is_there("a") && !place.is_there("pax_global_header"));
}

#[test]
fn it_stops_when_asked() {
    let place = Place::new();
    let asked = std::cell::Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() > 10
    };
    let archive = Tar::default().file("big", &vec![1; 4 << 20]).end();
    let error = unpack(&archive[..], &place.root(), ROOMY, &stop).unwrap_err();
    assert!(matches!(error, SourceError::Stopped));
    assert!(place.stat("big").len() < 4 << 20);
}

#[test]
fn a_full_disk_is_not_the_sources_fault() {
    let full = SourceError::Disk {
        name: "a".into(),
        cause: std::io::Error::from_raw_os_error(nix::libc::ENOSPC),
    };
    assert_eq!(full.kind(), FailureKind::DiskFull);
}
