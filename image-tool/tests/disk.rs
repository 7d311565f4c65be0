//! Ordinary images become disks: what is in the layers is on the disk, and the disk is sound.
// Each test uses a part of what they share.
#![allow(clippy::unwrap_used, clippy::pedantic, missing_docs, dead_code)]

#[path = "support/erofs.rs"]
mod erofs;
#[path = "support/ext4.rs"]
mod ext4;
#[path = "support/image.rs"]
mod image;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use ext4::{Node, debugfs};
use image::{Compression, Layer, Spec, TIME, header, layout, linking};
use kiln_image::disk::{self, Config, DiskError, Made, Options, Source};
use serde_json::json;
use tar::EntryType;
use tokio_util::sync::CancellationToken;

fn make(source: &Path, out: &Path) -> Result<Made, DiskError> {
    disk::make(&Source::of(source), out, &small(), &CancellationToken::new())
}

/// Tests read whole disks.
fn small() -> Options {
    Options { free_bytes: 1024 * 1024, ..Options::default() }
}

fn disk_of(layers: Vec<Vec<u8>>) -> BTreeMap<String, Node> {
    let (dir, layout) = layout(layers);
    let out = dir.path().join("disk");
    make(&layout, &out).unwrap();
    ext4::read(&out)
}

/// The other format has the same in it, by fsck.erofs and what it extracts (as root, owners too).
#[track_caller]
fn same_as_erofs(layers: Vec<Vec<u8>>, expected: &BTreeMap<String, Node>) {
    let (dir, layout) = layout(layers);
    let (out, again) = (dir.path().join("disk"), dir.path().join("again"));
    let options = Options { format: disk::Format::Erofs, ..small() };
    for out in [&out, &again] {
        disk::make(&Source::of(&layout), out, &options, &CancellationToken::new()).unwrap();
    }
    assert!(fs::read(&out).unwrap() == fs::read(&again).unwrap());
    let root = dir.path().join("root");
    let mut fsck = Command::new("fsck.erofs");
    let fsck = fsck.arg(format!("--extract={}", root.display())).arg(&out).output();
    let fsck = fsck.expect("fsck.erofs is needed: apt-get install erofs-utils");
    let said = String::from_utf8_lossy(&fsck.stderr);
    assert!(fsck.status.success(), "{said}");
    assert!(said.is_empty(), "{said}");
    let is_root = fs::metadata(&root).unwrap().uid() == 0;
    let (mut found, mut inodes) = (0, BTreeMap::new());
    for (path, node) in expected {
        let host = root.join(path);
        let metadata = host.symlink_metadata().unwrap_or_else(|e| panic!("{path}: {e}"));
        let is_link = metadata.is_symlink();
        assert_eq!(metadata.mode() >> 12, u32::from(node.mode >> 12), "{path}");
        if is_root {
            assert!(is_link || metadata.mode() & 0o7777 == u32::from(node.mode & 0o7777), "{path}");
            assert_eq!((metadata.uid(), metadata.gid()), node.owner, "{path}");
        }
        // Others name devices only by what they are.
        if metadata.is_file() {
            assert!(fs::read(&host).unwrap() == node.data, "{path}");
            assert_eq!((metadata.mtime(), metadata.mtime_nsec() as u32), node.mtime, "{path}");
            // Extracting may copy hard links; the disk's own count is right.
            inodes.entry(node.inode).or_insert(node.links);
        } else if is_link {
            assert_eq!(fs::read_link(&host).unwrap().to_str().unwrap(), node.text(), "{path}");
        }
        found += 1;
    }
    let walked = walkdir::WalkDir::new(&root).into_iter().count();
    assert_eq!(walked, found, "something else is in the other format");
    let dump = Command::new("dump.erofs").arg("-s").arg(&out).output().unwrap();
    let dump = String::from_utf8_lossy(&dump.stdout);
    let different: std::collections::BTreeSet<u32> = expected.values().map(|n| n.inode).collect();
    let inodes: usize = dump
        .lines()
        .find_map(|line| line.strip_prefix("Filesystem inode count:")?.trim().parse().ok())
        .unwrap_or_else(|| panic!("{dump}"));
    assert_eq!(inodes, different.len());
    same_inodes(&out, expected);
}

/// Modes, owners, times, links and attributes, whoever runs the tests. The sizes of attributes by dump.erofs too.
/// Access control lists have another form on ext4: not for these.
#[track_caller]
fn same_inodes(erofs: &Path, expected: &BTreeMap<String, Node>) {
    let found = erofs::read(erofs);
    assert!(found.keys().eq(expected.keys()));
    for (path, node) in expected {
        let inode = &found[path];
        assert_eq!((inode.mode, inode.owner), (node.mode, node.owner), "{path}");
        assert_eq!(inode.mtime, node.mtime, "{path}");
        // A directory of ext4 has `lost+found` too.
        assert!(node.mode >> 12 == 0o4 || inode.links == u32::from(node.links), "{path}");
        let mut xattrs = node.xattrs.clone();
        xattrs.sort();
        assert_eq!(inode.xattrs, xattrs, "{path}");
        if xattrs.is_empty() {
            continue;
        }
        let padded = |(_, name, value): &(u8, Vec<u8>, Vec<u8>)| {
            (4 + name.len() + value.len()).next_multiple_of(4)
        };
        let size = 12 + xattrs.iter().map(padded).sum::<usize>();
        let dump = Command::new("dump.erofs").arg(format!("--path=/{path}")).arg(erofs).output();
        let dump = String::from_utf8_lossy(&dump.unwrap().stdout).into_owned();
        assert!(dump.contains(&format!("Xattr size: {size}\n")), "{path}: {dump}");
    }
}

fn names(disk: &BTreeMap<String, Node>) -> Vec<&str> {
    disk.keys().map(String::as_str).filter(|name| !name.is_empty()).collect()
}

#[test]
fn a_layer_is_on_the_disk_as_it_was_packed() {
    let mut setuid = header("bin/su", EntryType::Regular, 3);
    setuid.set_mode(0o4755);
    setuid.set_uid(1000);
    setuid.set_gid(70_000);
    setuid.set_cksum();
    let mut null = header("dev/null", EntryType::Char, 0);
    null.set_mode(0o666);
    null.set_device_major(1).unwrap();
    null.set_device_minor(3).unwrap();
    null.set_cksum();
    let mut block = header("dev/loop", EntryType::Block, 0);
    block.set_device_major(259).unwrap();
    block.set_device_minor(70_000).unwrap();
    block.set_cksum();
    let mut root = header("./", EntryType::Directory, 0);
    root.set_mode(0o1711);
    root.set_uid(5);
    root.set_cksum();
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let long = "d/".repeat(90) + "file";
    let far = "/far/".to_owned() + &"x".repeat(200);
    let layer = Layer::default()
        .raw(&root, b"")
        .dir("bin/")
        .raw(&setuid, b"su!")
        .link("bin/sudo", "bin/su")
        .symlink("bin/sh", "dash")
        .raw(&null, b"")
        .raw(&block, b"")
        .raw(&header("dev/pipe", EntryType::Fifo, 0), b"")
        .pax(&[
            ("mtime", b"1234.000000567"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.note", b"a\nb=\0c"),
            ("SCHILY.xattr.com.apple.x", b"-"),
        ])
        .file("bin/ping", b"ping")
        .pax(&[("path", long.as_bytes())])
        .file("short", b"deep")
        .pax(&[("linkpath", far.as_bytes())])
        .symlink("far", "near")
        .file("empty", b"")
        .file("großer Name ☃", &vec![7; 300_000])
        .end();
    let disk = disk_of(vec![layer.clone()]);
    same_as_erofs(vec![layer], &disk);
    let node = |path: &str| disk.get(path).unwrap_or_else(|| panic!("{path} is missing"));

    assert_eq!((node("").mode, node("").owner), (0o041711, (5, 0)));
    let su = node("bin/su");
    assert_eq!((su.mode, su.owner, su.links, su.text()), (0o104755, (1000, 70_000), 2, "su!"));
    assert_eq!(su.inode, node("bin/sudo").inode);
    assert_eq!(su.mtime, (TIME as i64, 0));
    assert_eq!((node("bin/sh").mode, node("bin/sh").text()), (0o120777, "dash"));
    assert_eq!(node("far").text(), far);
    assert_eq!(node("dev/null").mode, 0o020666);
    assert_eq!(node("dev/pipe").mode >> 12, 0o1);
    let ping = node("bin/ping");
    assert_eq!((ping.mtime, ping.text()), ((1234, 567), "ping"));
    let expected = [
        (1, b"note".to_vec(), b"a\nb=\0c".to_vec()),
        (6, b"capability".to_vec(), capability.to_vec()),
    ];
    assert_eq!(ping.xattrs, expected);
    assert_eq!(node(&long).text(), "deep");
    assert_eq!(node("empty").data, b"");
    assert_eq!(node("großer Name ☃").data, vec![7; 300_000]);
    // No entry: root's, and always the same.
    assert_eq!((node("dev").mode, node("dev").mtime), (0o040755, (1_735_689_600, 0)));
}

/// The same by a program that is nobody's of ours.
#[test]
fn debugfs_reads_what_was_packed() {
    let mut device = header("dev/tty", EntryType::Char, 0);
    device.set_device_major(5).unwrap();
    device.set_device_minor(0).unwrap();
    device.set_cksum();
    let mut tool = header("usr/bin/tool", EntryType::Regular, 5);
    tool.set_mode(0o6711);
    tool.set_uid(33);
    tool.set_gid(44);
    tool.set_cksum();
    let layer = Layer::default()
        .pax(&[("SCHILY.xattr.user.k", b"value")])
        .raw(&tool, b"12345")
        .raw(&device, b"")
        .end();
    let (dir, layout) = layout(vec![layer]);
    let out = dir.path().join("disk");
    make(&layout, &out).unwrap();
    ext4::check(&out);
    let stat = debugfs(&out, "stat /usr/bin/tool");
    for part in ["Mode:  06711", "User:    33", "Group:    44", "Size: 5", "user.k (5) = \"value\""]
    {
        assert!(stat.contains(part), "{part}: {stat}");
    }
    assert_eq!(debugfs(&out, "cat /usr/bin/tool"), "12345");
    let stat = debugfs(&out, "stat /dev/tty");
    assert!(stat.contains("Type: character special") && stat.contains("05:00"), "{stat}");
}

#[test]
fn whiteouts_hide_lower_layers_only_and_order_does_not_matter() {
    let lower = Layer::default()
        .file("gone", b"1")
        .file("dir/a", b"1")
        .file("dir/b", b"1")
        .file("opaque/old", b"1")
        .file("again", b"old")
        .file("tree/x/y", b"1")
        .end();
    let entries = |layer: Layer| {
        layer
            .file("dir/c", b"2")
            .file("opaque/new", b"2")
            .file("again", b"new")
            .file("tree/z", b"2")
    };
    let whiteouts = |layer: Layer| {
        layer
            .file(".wh.gone", b"")
            .file("dir/.wh.a", b"")
            .file("opaque/.wh..wh..opq", b"")
            .file(".wh.again", b"")
            .file(".wh.tree", b"")
            .file(".wh.never", b"")
            .file("never/.wh.there", b"")
            .file(".wh..wh.plnk", b"")
    };
    let before = disk_of(vec![lower.clone(), entries(whiteouts(Layer::default())).end()]);
    let layers = vec![lower, whiteouts(entries(Layer::default())).end()];
    let after = disk_of(layers.clone());
    same_as_erofs(layers, &after);
    let expected = ["again", "dir", "dir/b", "dir/c", "opaque", "opaque/new", "tree", "tree/z"];
    assert_eq!(names(&before), expected);
    assert_eq!(before, after);
    assert_eq!(before["again"].text(), "new");
}

#[test]
fn directories_merge_and_everything_else_replaces() {
    let mut moved = header("kept/", EntryType::Directory, 0);
    moved.set_mode(0o700);
    moved.set_uid(9);
    moved.set_cksum();
    let lower = Layer::default()
        .pax(&[("SCHILY.xattr.user.old", b"1")])
        .dir("kept/")
        .file("kept/file", b"1")
        .file("becomes-file/below", b"1")
        .file("becomes-dir", b"1")
        .symlink("link", "kept")
        .symlink("loop", "loop")
        .end();
    let upper = Layer::default()
        .raw(&moved, b"")
        .file("kept/new", b"2")
        .file("becomes-file", b"2")
        .file("becomes-dir/below", b"2")
        // Never through a link: it is replaced, as overlay storage does.
        .file("link/file", b"2")
        .file("loop/x", b"2")
        .end();
    let disk = disk_of(vec![lower, upper]);
    let expected = [
        "becomes-dir",
        "becomes-dir/below",
        "becomes-file",
        "kept",
        "kept/file",
        "kept/new",
        "link",
        "link/file",
        "loop",
        "loop/x",
    ];
    assert_eq!(names(&disk), expected);
    let kept = &disk["kept"];
    assert_eq!((kept.mode, kept.owner, kept.xattrs.len()), (0o040700, (9, 0), 0));
    assert_eq!(disk["kept/file"].text(), "1");
    assert_eq!(disk["link"].mode, 0o040755);
}

#[test]
fn a_hard_link_keeps_the_file_that_it_named() {
    let lower = Layer::default().file("a", b"old").link("b", "a").end();
    let middle = Layer::default().link("c", "b").file("a", b"new").link("d", "a").end();
    let upper = Layer::default().file(".wh.b", b"").end();
    let layers = vec![lower, middle, upper];
    let disk = disk_of(layers.clone());
    same_as_erofs(layers, &disk);
    assert_eq!(names(&disk), ["a", "c", "d"]);
    assert_eq!((disk["a"].text(), disk["c"].text(), disk["d"].text()), ("new", "old", "new"));
    assert_eq!((disk["a"].links, disk["c"].links), (2, 1));
    assert_eq!(disk["a"].inode, disk["d"].inode);
}

#[test]
fn the_last_of_a_name_counts_and_links_of_links_work() {
    let layer = Layer::default()
        .file("f", b"1")
        .link("keeps", "f")
        .file("./f", b"2")
        .symlink("s", "f")
        .link("t", "s")
        .end();
    let disk = disk_of(vec![layer]);
    assert_eq!((disk["f"].text(), disk["keeps"].text()), ("2", "1"));
    assert_eq!((disk["s"].inode, disk["s"].links, disk["t"].text()), (disk["t"].inode, 2, "f"));
}

#[test]
fn every_compression_gives_the_same_files_and_every_run_the_same_bytes() {
    let layer = |text: &[u8]| Layer::default().file("etc/x", text).dir("empty/").end();
    let dir = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let source = dir.path().join(format!("{compression:?}"));
        fs::create_dir(&source).unwrap();
        let mut spec = Spec::new(vec![]);
        spec.layers = vec![(layer(b"one"), compression), (layer(b"two"), compression)];
        let digest = spec.write(&source);
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let made = make(&source, &first).unwrap();
        assert_eq!((made.digest, made.layers, made.nodes), (digest, 2, 4));
        assert_eq!(made.size, fs::metadata(&first).unwrap().len());
        assert_eq!(make(&source, &second).unwrap().nodes, 4);
        assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap());
        seen.push(ext4::read(&first));
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
}

/// eStargz and parallel compressors write many gzip members, zstd:chunked many frames.
#[test]
fn layers_in_several_members_are_read_whole() {
    let tar = Layer::default().file("a", &[b'a'; 5000]).file("b", b"b").end();
    for compression in [Compression::Gzip, Compression::Zstd] {
        let dir = tempfile::tempdir().unwrap();
        let parts: Vec<u8> =
            tar.chunks(700).flat_map(|part| image::compress(part, compression).0).collect();
        let digest = kiln_image::digest::Digest::of(&tar);
        let mut spec = Spec::new(vec![]);
        spec.layers = vec![(parts, Compression::None)];
        spec.write(dir.path());
        // The configuration states what the layer is when it is unpacked.
        rewrite(dir.path(), |config| config["rootfs"]["diff_ids"] = json!([digest]));
        let out = dir.path().join("disk");
        make(dir.path(), &out).unwrap();
        assert_eq!(names(&ext4::read(&out)), ["a", "b"]);
    }
}

/// Edits the configuration of a layout and makes its manifest fit.
fn rewrite(layout: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(layout.join(name)).unwrap()).unwrap()
    };
    let blob = |json: &serde_json::Value| {
        format!("blobs/sha256/{}", &json["digest"].as_str().unwrap()["sha256:".len()..])
    };
    let index = read("index.json");
    let mut manifest = read(&blob(&index["manifests"][0]));
    let mut config = read(&blob(&manifest["config"]));
    edit(&mut config);
    fs::remove_file(layout.join("index.json")).unwrap();
    fs::remove_file(layout.join("oci-layout")).unwrap();
    let writer = kiln_image::layout::Writer::create(layout).unwrap();
    let bytes = kiln_image::layout::canonical(&config);
    let config = writer.add_bytes("application/vnd.oci.image.config.v1+json", &bytes).unwrap();
    manifest["config"] = config.to_json();
    let bytes = kiln_image::layout::canonical(&manifest);
    let manifest = writer.add_bytes("application/vnd.oci.image.manifest.v1+json", &bytes).unwrap();
    writer.finish(&manifest, &json!({})).unwrap();
}

#[test]
fn the_configuration_comes_with_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = Spec::new(vec![Layer::default().end()]);
    spec.config = json!({
        "Entrypoint": ["/bin/app"], "Cmd": ["--serve"], "Env": ["PATH=/bin"], "User": "app:app",
        "WorkingDir": "/srv", "StopSignal": "SIGQUIT", "Labels": null,
    });
    spec.write(dir.path());
    let config = make(dir.path(), &dir.path().join("disk")).unwrap().config;
    let expected = Config {
        entrypoint: vec!["/bin/app".into()],
        cmd: vec!["--serve".into()],
        env: vec!["PATH=/bin".into()],
        user: "app:app".into(),
        working_dir: "/srv".into(),
        stop_signal: Some("SIGQUIT".into()),
    };
    assert_eq!(config, expected);
}

#[test]
fn large_directories_and_files_and_an_empty_image_are_sound() {
    let mut layer = Layer::default();
    for i in 0..6000 {
        layer =
            layer.file(&format!("many/a-file-with-a-long-name-{i:05}-{}", "x".repeat(i % 50)), b"");
    }
    for i in 0..300 {
        layer = layer.dir(&format!("dirs/{i}")).symlink(&format!("s/{i}"), &"y".repeat(99));
    }
    layer = layer.file("big", &vec![1; 9_000_000]);
    let layer = layer.end();
    let disk = disk_of(vec![layer.clone()]);
    same_as_erofs(vec![layer], &disk);
    assert_eq!(disk.keys().filter(|name| name.starts_with("many/")).count(), 6000);
    assert_eq!(disk["big"].data.len(), 9_000_000);
    assert_eq!(names(&disk_of(vec![])), Vec::<&str>::new());
    assert_eq!(names(&disk_of(vec![Vec::new()])), Vec::<&str>::new());
    // Debian's images have one; ext4 has its own.
    assert_eq!(
        names(&disk_of(vec![Layer::default().dir("lost+found/").end()])),
        Vec::<&str>::new()
    );
}

#[test]
fn archives_of_a_layout_and_of_docker_are_read() {
    let tar = Layer::default().file("etc/x", b"content").end();
    let (dir, layout) = layout(vec![tar.clone()]);
    let pack = |name: &str, from: &Path| {
        let archive = dir.path().join(name);
        let packed =
            Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(from).arg(".").status();
        assert!(packed.unwrap().success());
        archive
    };
    let out = dir.path().join("disk");
    let archive = pack("oci.tar", &layout);
    let made = make(&archive, &out).unwrap();
    assert_eq!(ext4::read(&out)["etc/x"].text(), "content");
    let from_archive = fs::read(&out).unwrap();
    assert_eq!(make(&layout, &out).unwrap(), made);
    assert!(from_archive == fs::read(&out).unwrap());

    // The older form: a layer that is there twice is a link.
    let saved = dir.path().join("saved");
    fs::create_dir_all(saved.join("one")).unwrap();
    fs::create_dir_all(saved.join("two")).unwrap();
    fs::write(saved.join("one/layer.tar"), &tar).unwrap();
    std::os::unix::fs::symlink("../one/layer.tar", saved.join("two/layer.tar")).unwrap();
    let id = kiln_image::digest::Digest::of(&tar);
    let config = json!({
        "architecture": disk::host_architecture(), "os": "linux", "config": {"Cmd": ["x"]},
        "rootfs": {"type": "layers", "diff_ids": [id, id]},
    });
    fs::write(saved.join("c.json"), config.to_string()).unwrap();
    let manifest = json!([{"Config": "c.json", "Layers": ["one/layer.tar", "two/layer.tar"]}]);
    fs::write(saved.join("manifest.json"), manifest.to_string()).unwrap();
    let made = make(&pack("docker.tar", &saved), &out).unwrap();
    assert_eq!((made.layers, made.config.cmd), (2, vec!["x".to_owned()]));
    assert_eq!(made.digest, kiln_image::digest::Digest::of(config.to_string().as_bytes()));
    assert_eq!(names(&ext4::read(&out)), ["etc", "etc/x"]);
}

/// Owners, set-user-id, attributes, a device, whiteouts: what only root could unpack.
fn for_root_alone() -> Vec<Vec<u8>> {
    let mut su = header("bin/su", EntryType::Regular, 3);
    su.set_mode(0o6755);
    su.set_uid(1000);
    su.set_gid(70_000);
    su.set_cksum();
    let mut null = header("dev/null", EntryType::Char, 0);
    null.set_device_major(1).unwrap();
    null.set_device_minor(3).unwrap();
    null.set_cksum();
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let lower = Layer::default()
        .raw(&su, b"su!")
        .link("bin/sudo", "bin/su")
        .raw(&null, b"")
        .pax(&[
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.trusted.note", b"x"),
        ])
        .file("bin/ping", b"ping")
        .file("gone", b"1")
        .file("opaque/old", b"1")
        .end();
    let upper = Layer::default()
        .file(".wh.gone", b"")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/new", b"2")
        .end();
    vec![lower, upper]
}

/// Nothing of an image is unpacked on this machine, so that it takes no rights, and nothing of who makes it is in it.
#[test]
fn nobody_makes_the_same_disk_as_root() {
    const NOBODY: u32 = 65_534;
    // Places that the environment names, and the build's, may be below a directory that only root may enter.
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let layout = dir.path().join("layout");
    fs::create_dir(&layout).unwrap();
    Spec::new(for_root_alone()).write(&layout);
    let program = dir.path().join("kiln-image");
    // Not written by this process: a child of another test could hold it open ("text file busy").
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_kiln-image")).arg(&program).status();
    assert!(copied.unwrap().success());
    // Without root it is shown by running it at all.
    let other = nix::unistd::geteuid().is_root().then_some(NOBODY);
    if other.is_some() {
        for entry in walkdir::WalkDir::new(dir.path()) {
            std::os::unix::fs::chown(entry.unwrap().path(), other, other).unwrap();
        }
    }
    for format in ["ext4", "erofs"] {
        let made_by = |name: &str, user: Option<u32>| {
            let out = dir.path().join(format!("{name}.{format}"));
            let mut command = Command::new(&program);
            command.args(["disk", "--format", format, "--free-mb", "1"]).arg(&layout).arg(&out);
            command.current_dir(dir.path()).env("TMPDIR", dir.path());
            if let Some(id) = user {
                command.uid(id).gid(id);
            }
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            out
        };
        let (mine, others) = (made_by("mine", None), made_by("others", other));
        let owner = other.unwrap_or(nix::unistd::geteuid().as_raw());
        assert_eq!(fs::metadata(&others).unwrap().uid(), owner);
        assert!(fs::read(&mine).unwrap() == fs::read(&others).unwrap(), "{format}");
    }
}

/// What another tool unpacks, as root, from the same layout.
#[test]
fn the_disk_is_its_owners_alone_and_replaces_an_older_one() {
    let (dir, layout) = layout(vec![Layer::default().file("a", b"1").end()]);
    let out = dir.path().join("new/disk");
    make(&layout, &out).unwrap();
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o600);
    make(&layout, &out).unwrap();
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn links_of_an_image_are_no_links_of_the_host() {
    let (dir, layout) = layout(vec![
        Layer::default().symlink("etc", "/etc").end(),
        Layer::default()
            .file("etc/kiln-was-here", b"x")
            .raw(&linking("p", EntryType::Symlink, "/etc/passwd"), b"")
            .end(),
        Layer::default().file("p", b"mine").end(),
    ]);
    let out = dir.path().join("disk");
    make(&layout, &out).unwrap();
    assert_eq!(names(&ext4::read(&out)), ["etc", "etc/kiln-was-here", "p"]);
    assert!(!Path::new("/etc/kiln-was-here").exists());
}
