//! Images that mean harm, or are damaged: refused with words that name layer and entry, and nothing is left.
// Each test uses a part of what they share.
#![allow(clippy::unwrap_used, clippy::pedantic, missing_docs, dead_code)]

#[path = "support/ext4.rs"]
mod ext4;
#[path = "support/image.rs"]
mod image;

use std::fs;
use std::path::Path;

use image::{Compression, Layer, Spec, compress, header, layout, linking, pax_records};
use kiln_image::disk::{self, DiskError, Limits, Options, Source};
use serde_json::json;
use tar::EntryType;
use tokio_util::sync::CancellationToken;

fn make(source: &Path, out: &Path, options: &Options) -> Result<(), String> {
    let made = disk::make(&Source::of(source), out, options, &CancellationToken::new());
    made.map(drop).map_err(|error| chain(&error))
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn small() -> Options {
    Options { free_bytes: 1024 * 1024, ..Options::default() }
}

/// The refusal; afterwards an older disk is as it was and nothing else is there.
fn refused_with(spec: Spec, options: &Options) -> String {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("layout");
    fs::create_dir(&source).unwrap();
    spec.write(&source);
    let place = dir.path().join("place");
    fs::create_dir(&place).unwrap();
    fs::write(place.join("disk"), "older").unwrap();
    let error = make(&source, &place.join("disk"), options).unwrap_err();
    assert_eq!(fs::read_to_string(place.join("disk")).unwrap(), "older");
    assert_eq!(fs::read_dir(&place).unwrap().count(), 1, "something was left");
    error
}

fn refused(layer: Vec<u8>) -> String {
    refused_with(Spec::new(vec![Layer::default().dir("good").end(), layer]), &small())
}

/// One entry by its header.
fn entry(header: tar::Header) -> Vec<u8> {
    Layer::default().raw(&header, b"").end()
}

#[track_caller]
fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

#[test]
fn names_that_lead_out_of_the_image_are_refused_by_name() {
    for name in ["../x", "a/../../x", "/../x", "a/.."] {
        let error = refused(Layer::default().file(name, b"x").end());
        says(
            &error,
            &["layer 2 (sha256:", "is refused", &format!("entry \"{name}\""), "\"..\" in it"],
        );
        says(&refused(Layer::default().file("t", b"").link("x", name).end()), &["\"x\"", "target"]);
    }
    says(
        &refused(entry(header(".", EntryType::Symlink, 0))),
        &["names the root and is no directory"],
    );
    says(&refused(Layer::default().symlink("./", "/etc").end()), &["names the root"]);
    says(&refused(Layer::default().file("", b"x").end()), &["it is empty"]);
    says(&refused(Layer::default().file("f/", b"x").end()), &["ends in a slash"]);
    let nul = Layer::default().pax(&[("path", b"a\0b")]).file("x", b"").end();
    says(&refused(nul), &["extended header path"]);
    let latin = Layer::default().pax(&[("path", b"caf\xe9")]).file("x", b"").end();
    says(&refused(latin), &["it is not UTF-8"]);
    let long = Layer::default().pax(&[("path", &[b'x'; 256])]).file("x", b"").end();
    says(&refused(long), &["longer than 255"]);
    let deep = "d/".repeat(2048);
    let long = Layer::default().pax(&[("path", deep.as_bytes())]).file("x", b"").end();
    says(&refused(long), &["longer than 4095", "…"]);
}

#[test]
fn whiteouts_of_nothing_are_refused() {
    for name in [".wh.", "a/.wh..", "a/.wh..."] {
        says(&refused(Layer::default().file(name, b"").end()), &["whiteout that names nothing"]);
    }
}

#[test]
fn hard_links_name_files_of_the_image() {
    let missing = refused(Layer::default().link("x", "etc/shadow").end());
    says(&missing, &["layer 2", "entry \"x\"", "etc/shadow", "neither this layer"]);
    says(&refused(Layer::default().link("x", "good").end()), &["\"good\", a directory"]);
    let later = refused(Layer::default().link("x", "later").file("later", b"").end());
    says(&later, &["\"later\""]);
    says(&refused(Layer::default().link("x", "x").end()), &["\"x\""]);
    let through =
        Layer::default().dir("real").file("real/f", b"").symlink("l", "real").link("x", "l/f");
    says(&refused(through.end()), &["\"l/f\""]);
}

#[test]
fn lies_about_sizes_are_refused() {
    // More than is there.
    let mut cut = Layer::default().raw(&header("f", EntryType::Regular, 4096), b"only this").0;
    says(&refused(cut.clone()), &["\"f\"", "it ends in the middle"]);
    cut.truncate(700);
    says(&refused(cut), &["it ends in the middle"]);
    let huge = header("f", EntryType::Regular, 1 << 60);
    says(&refused(Layer::default().raw(&huge, b"x").end()), &["it ends in the middle"]);
    let max = Layer::default().pax(&[("size", b"18446744073709551615")]).file("f", b"x").end();
    says(&refused(max), &["it ends in the middle"]);
    // Data where a reader might or might not skip it: CVE-2025-62518.
    for kind in [
        EntryType::Link,
        EntryType::Symlink,
        EntryType::Directory,
        EntryType::Char,
        EntryType::Fifo,
    ] {
        let mut lying = linking("l", kind, "t");
        lying.set_size(512);
        lying.set_cksum();
        says(&refused(Layer::default().raw(&lying, &[0; 512]).end()), &["states a size of 512"]);
    }
    let pax = Layer::default().pax(&[("size", b"1024")]).dir("d").end();
    says(&refused(pax), &["states a size of 1024"]);
    let mut negative = header("f", EntryType::Regular, 0);
    negative.as_mut_bytes()[124..136].fill(0xff);
    negative.set_cksum();
    says(&refused(entry(negative)), &["\"size\" is not a number in range"]);
}

/// The size of the extended header counts, for the data and for where the next header is.
#[test]
fn a_pax_size_moves_the_next_header() {
    let inner = Layer::default().file("smuggled", b"").0;
    let layer = Layer::default()
        .pax(&[("size", inner.len().to_string().as_bytes())])
        .raw(&header("outer", EntryType::Regular, 0), &inner)
        .file("next", b"")
        .end();
    let (dir, layout) = layout(vec![layer]);
    let out = dir.path().join("disk");
    make(&layout, &out, &small()).unwrap();
    let disk = ext4::read(&out);
    assert_eq!(disk.keys().map(String::as_str).collect::<Vec<_>>(), ["", "next", "outer"]);
    assert_eq!(disk["outer"].data, inner);
}

#[test]
fn extended_headers_that_readers_disagree_on_are_refused() {
    let mut long_name = header("././@LongLink", EntryType::GNULongName, 4);
    long_name.set_cksum();
    let both = Layer::default().raw(&long_name, b"gnu\0").pax(&[("path", b"pax")]).file("x", b"");
    says(&refused(both.end()), &["contradict each other"]);
    let twice = Layer::default().pax(&[("path", b"a")]).pax(&[("path", b"b")]).file("x", b"");
    says(&refused(twice.end()), &["contradict"]);
    says(&refused(Layer::default().pax(&[("path", b"a")]).end()), &["belong to no entry"]);
    let global = pax_records(&[("path", b"everything")]);
    let global = Layer::default()
        .raw(&header("g", EntryType::XGlobalHeader, global.len() as u64), &global)
        .file("x", b"");
    says(&refused(global.end()), &["global extended header sets path"]);
    for (records, part) in [
        (&[("GNU.sparse.major", &b"1"[..])][..], "sparse"),
        (&[("SCHILY.xattr.user.x", &[0; 5000][..])], "extended attributes take"),
        (&[("SCHILY.xattr.user.", b"")], "extended attribute whose name"),
        (&[("SCHILY.xattr.system.posix_acl_access", b"?")], "access control list"),
        (&[("uid", b"4294967295")], "owner 4294967295"),
        (&[("gid", b"99999999999")], "owner 99999999999"),
    ] {
        says(&refused(Layer::default().pax(records).file("x", b"").end()), &[part]);
    }
    says(&refused(entry(header("x", EntryType::GNUSparse, 0))), &["sparse"]);
    let large = header("pax", EntryType::XHeader, 1 << 40);
    says(&refused(Layer::default().raw(&large, b"").end()), &["1099511627776 bytes"]);
    let damaged =
        Layer::default().raw(&header("pax", EntryType::XHeader, 5), b"xyzzy").file("x", b"");
    says(&refused(damaged.end()), &["malformed"]);
}

#[test]
fn what_is_no_layer_is_refused() {
    says(&refused(vec![b'x'; 2048]), &["no tar header"]);
    says(&refused(entry(header("x", EntryType::new(b'V'), 0))), &["type 'V'"]);
    let mut lone = Layer::default().file("a", b"").0;
    lone.resize(lone.len() + 512, 0);
    let lone = Layer(lone).file("b", b"").end();
    says(&refused(lone), &["zeros stands between"]);
    let mut device = header("d", EntryType::Char, 0);
    device.set_device_major(4096).unwrap();
    device.set_cksum();
    says(&refused(entry(device)), &["device number 4096:0"]);
    let target = vec![b't'; 4096];
    let link = Layer::default().pax(&[("linkpath", &target)]).symlink("s", "x").end();
    says(&refused(link), &["target", "longer than 4095"]);
    says(&refused(entry(header("s", EntryType::Symlink, 0))), &["target", "empty"]);
    says(&refused(Layer::default().file("lost+found/x", b"").end()), &["/lost+found"]);
    // What follows the end is no entry, as for every other reader, but it is hashed.
    let mut behind = Layer::default().file("a", b"").end();
    behind.extend_from_slice(&Layer::default().file("b", b"").end());
    let (dir, layout) = layout(vec![behind]);
    make(&layout, &dir.path().join("disk"), &small()).unwrap();
    assert!(!ext4::read(&dir.path().join("disk")).contains_key("b"));
}

fn limited(limits: Limits) -> Options {
    Options { limits, ..small() }
}

#[test]
fn bombs_end_at_the_limits() {
    let zeros = vec![0; 2_000_000];
    let bomb = || Layer::default().file("zeros", &zeros).end();
    for compression in [Compression::Gzip, Compression::Zstd] {
        assert!(compress(&bomb(), compression).0.len() < 50_000);
        let mut spec = Spec::new(vec![]);
        spec.layers = vec![(bomb(), compression)];
        let limits = Limits { layer_bytes: 1_000_000, ..Limits::default() };
        let error = refused_with(spec, &limited(limits));
        says(&error, &["layer 1", "larger than allowed", "1000000 bytes in a layer"]);
    }
    // Behind the archive's end, where no entry is.
    let mut behind = Layer::default().end();
    behind.extend_from_slice(&zeros);
    let limits = Limits { layer_bytes: 1_000_000, ..Limits::default() };
    says(&refused_with(Spec::new(vec![behind]), &limited(limits)), &["larger than allowed"]);
    // Together.
    let limits = Limits { total_bytes: 3_000_000, ..Limits::default() };
    says(&refused_with(Spec::new(vec![bomb(), bomb()]), &limited(limits)), &["layer 2", "larger"]);
    let limits = Limits { compressed_bytes: 1000, ..Limits::default() };
    says(&refused_with(Spec::new(vec![bomb()]), &limited(limits)), &["as they are stored"]);
    let limits = Limits { layers: 1, ..Limits::default() };
    let two = vec![Layer::default().end(), Layer::default().end()];
    says(&refused_with(Spec::new(two), &limited(limits)), &["more than 1 layers"]);
}

#[test]
fn entries_and_memory_have_limits() {
    let many = |n| (0..n).fold(Layer::default(), |layer, i| layer.file(&format!("f{i}"), b""));
    let limits = Limits { entries: 100, ..Limits::default() };
    let error = refused_with(Spec::new(vec![many(101).end()]), &limited(limits));
    says(&error, &["entry \"f100\"", "100 entries"]);
    let (dir, layout) = layout(vec![many(100).end()]);
    make(&layout, &dir.path().join("disk"), &limited(limits)).unwrap();

    let limits = Limits { metadata_bytes: 1_000_000, ..Limits::default() };
    let deep = "d/".repeat(1000) + "f";
    let deep = Layer::default().pax(&[("path", deep.as_bytes())]).file("x", b"").end();
    says(&refused_with(Spec::new(vec![deep]), &limited(limits)), &["in memory"]);
    let value = vec![1; 3900];
    let fat = (0..200).fold(Layer::default(), |layer, i| {
        layer.pax(&[("SCHILY.xattr.user.x", &value)]).file(&format!("f{i}"), b"")
    });
    says(&refused_with(Spec::new(vec![fat.end()]), &limited(limits)), &["in memory"]);
}

#[test]
fn changed_and_cut_blobs_are_refused() {
    let tar = Layer::default().file("f", &[b'f'; 100_000]).end();
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        for damage in ["change", "cut", "longer", "swap"] {
            let dir = tempfile::tempdir().unwrap();
            let mut spec = Spec::new(vec![]);
            spec.layers = vec![(tar.clone(), compression)];
            spec.write(dir.path());
            let (bytes, _) = compress(&tar, compression);
            let name = kiln_image::digest::Digest::of(&bytes);
            let path = dir.path().join("blobs/sha256").join(name.hex());
            let mut bytes = bytes;
            let middle = bytes.len() / 2;
            match damage {
                "change" => bytes[middle] ^= 1,
                "cut" => bytes.truncate(middle),
                "longer" => bytes.push(0),
                // Another archive of the same length.
                _ => {
                    let other = Layer::default().file("g", &[b'f'; 100_000]).end();
                    let (other, _) = compress(&other, compression);
                    bytes = other;
                }
            }
            fs::write(&path, bytes).unwrap();
            let out = dir.path().join("disk");
            let error = make(dir.path(), &out, &small()).unwrap_err();
            assert!(!out.exists(), "{compression:?} {damage}: {error}");
        }
    }
}

#[test]
fn a_wrong_diff_id_or_layer_count_is_refused() {
    let other = kiln_image::digest::Digest::of(b"other");
    let mut spec = Spec::new(vec![Layer::default().file("f", b"").end()]);
    spec.edit = |config, _| {
        config["rootfs"]["diff_ids"] = json!([kiln_image::digest::Digest::of(b"other")]);
    };
    says(&refused_with(spec, &small()), &["layer 1 has the diff_id sha256:", other.as_str()]);
    let mut spec = Spec::new(vec![Layer::default().end()]);
    spec.edit = |config, _| config["rootfs"]["diff_ids"] = json!([]);
    says(&refused_with(spec, &small()), &["has 1 layers, its configuration has 0"]);
}

#[test]
fn other_images_are_refused_by_what_they_are() {
    type Edit = fn(&mut serde_json::Value, &mut serde_json::Value);
    let edits: [(Edit, &str); 4] = [
        (|config, _| config["os"] = json!("windows"), "is an image for windows/"),
        (|config, _| config["architecture"] = json!("s390x"), "linux/s390x"),
        (
            |_, manifest| manifest["layers"][0]["mediaType"] = json!("text/plain"),
            "no layer of files",
        ),
        (|config, _| *config = json!({"a": 1}), "is not one of a container image"),
    ];
    for (edit, part) in edits {
        let mut spec = Spec::new(vec![Layer::default().end()]);
        spec.edit = edit;
        says(&refused_with(spec, &small()), &[part]);
    }
}

#[test]
fn the_room_that_must_stay_is_left_and_nothing_is_made() {
    let (dir, layout) = layout(vec![Layer::default().file("f", b"content").end()]);
    let out = dir.path().join("disk");
    for format in [disk::Format::Ext4, disk::Format::Erofs] {
        // More than any file system has.
        let options = Options { keep_free: u64::MAX, format, ..small() };
        let never = CancellationToken::new();
        let error =
            disk::make(&Source::Layout(layout.clone()), &out, &options, &never).unwrap_err();
        let text = chain(&error);
        assert!(text.contains("must stay") && text.contains("make room"), "{text}");
        assert!(!out.exists());
        let options = Options { keep_free: 1, ..options };
        disk::make(&Source::Layout(layout.clone()), &out, &options, &never).unwrap();
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn a_cancelled_call_makes_nothing() {
    let (dir, layout) = layout(vec![Layer::default().file("f", b"").end()]);
    let cancel = CancellationToken::new();
    cancel.cancel();
    let out = dir.path().join("disk");
    let error = disk::make(&Source::Layout(layout), &out, &small(), &cancel).unwrap_err();
    assert!(matches!(error, DiskError::Cancelled), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn errors_do_not_steer_the_terminal() {
    let error = refused(Layer::default().file("\u{1b}[31m\n/..", b"").end());
    assert!(!error.contains(['\u{1b}', '\n']), "{error:?}");
    let error = refused(Layer::default().link("\u{1b}x", "\u{1b}y").end());
    assert!(!error.contains('\u{1b}'), "{error:?}");
}
