//! `kiln cp` against the real API, with agents that are real peers.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Output, Stdio};

use kiln::build::BuildId;
use kiln::exec::Opened;
use kiln::store::Role;
use kiln_protocol::exec::{Cause, Copy, Open, Place, SessionToHost, Stream};
use tar::{EntryType, Header};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::agent::{Agent, Vm};
use crate::support::{Client, Server, form, id_of, server};

struct Host {
    vm: Vm,
    id: BuildId,
    url: String,
    token: String,
    dir: tempfile::TempDir,
    _opened: Opened,
}

impl Host {
    async fn new(server: &Server, client: &Client<'_>) -> Self {
        let build = client.submit(form()).await;
        server.scheduler.claim().await;
        let (vm, id) = (Vm::new(), id_of(&build));
        let opened = server.scheduler.door(&id).open(vm.entrance());
        let token = client.token.clone();
        let dir = tempfile::tempdir().unwrap();
        Self { vm, id, url: client.url(""), token, dir, _opened: opened }
    }

    /// `kiln cp ARGS`, where `ID` is the build's, in an own directory.
    fn cp(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.arg("cp").args(args.iter().map(|arg| arg.replace("ID", self.id.as_str())));
        command
            .current_dir(self.dir.path())
            .env("KILN_URL", &self.url)
            .env("KILN_TOKEN", &self.token)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Copies out what an agent sends.
    async fn out(&self, args: &[&str], archive: &[u8]) -> (Output, Open) {
        let child = self.cp(args).spawn().unwrap();
        let (mut agent, open) = self.start().await;
        for piece in archive.chunks(50_000) {
            agent.print(Stream::Out, piece).await;
        }
        agent.exit(0).await;
        (child.wait_with_output().await.unwrap(), open)
    }

    /// Copies in, and gives what an agent got.
    async fn inward(&self, args: &[&str]) -> (Output, Open, Vec<u8>) {
        let child = self.cp(args).spawn().unwrap();
        let (mut agent, open) = self.start().await;
        let got = take(&mut agent).await;
        agent.exit(0).await;
        (child.wait_with_output().await.unwrap(), open, got)
    }

    async fn start(&self) -> (Agent, Open) {
        let (mut agent, open) = self.vm.opened().await;
        agent.say(SessionToHost::Started).await;
        (agent, open)
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

async fn take(agent: &mut Agent) -> Vec<u8> {
    let mut got = vec![];
    while let Some(bytes) = agent.input().await {
        got.extend(bytes);
    }
    got
}

#[track_caller]
fn ended(output: &Output, code: i32, stderr: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(stderr), "{said}");
    assert!(!stderr.is_empty() || said.is_empty(), "{said}");
}

/// An archive of entries that the crate would not write itself.
fn archive(entries: &[(EntryType, &str, &str, u32)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(vec![]);
    for (kind, name, value, mode) in entries {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(*mode);
        header.set_mtime(1_000_000_000);
        let content = if *kind == EntryType::Regular { value.as_bytes() } else { b"" };
        if *kind != EntryType::Regular {
            header.as_old_mut().linkname[..value.len()].copy_from_slice(value.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, content).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Names, kinds and contents or targets of an archive.
fn listed(archive: &[u8]) -> BTreeMap<String, (EntryType, u32, String)> {
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        let kind = entry.header().entry_type();
        let mode = entry.header().mode().unwrap();
        let value = match entry.link_name_bytes() {
            Some(target) => String::from_utf8(target.into_owned()).unwrap(),
            None => std::io::read_to_string(&mut entry).unwrap(),
        };
        (name, (kind, mode, value))
    });
    entries.collect()
}

const JOB: Place = Place::Job { secrets: false };

fn at(place: Place, path: &str) -> Copy {
    Copy { place, path: path.into() }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn files_come_out_as_they_are() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let some = archive(&[
        (EntryType::Directory, "app", "", 0o555),
        (EntryType::Regular, "app/run", "#!", 0o4755),
        (EntryType::Symlink, "app/link", "/etc/passwd", 0o777),
        (EntryType::Link, "app/again", "app/run", 0o755),
    ]);
    // Into a directory, and under a new name.
    for (to, top) in [(".", "app"), ("new", "new"), ("./new", "new/app")] {
        let (output, open) = host.out(&["--with-secrets", "ID:/srv/app", to], &some).await;
        ended(&output, 0, "");
        assert_eq!(open, Open::CopyOut(at(Place::Job { secrets: true }, "/srv/app")));
        let top = host.at(top);
        if mode(&top) != 0o755 {
            assert_eq!(mode(&top), 0o555);
            fs::set_permissions(&top, fs::Permissions::from_mode(0o755)).unwrap();
        }
        assert_eq!(mode(&top.join("run")), 0o755, "set-user-id is dropped");
        assert_eq!(fs::read_link(top.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::read_to_string(top.join("again")).unwrap(), "#!");
    }
    let (output, _) = host.out(&["ID:/srv/app", "-"], &some).await;
    ended(&output, 0, "");
    assert!(output.stdout == some);
}

#[tokio::test]
async fn an_archive_from_there_is_not_trusted() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    fs::create_dir_all(host.at("outside")).unwrap();
    fs::create_dir_all(host.at("in/deep")).unwrap();
    symlink("../outside", host.at("in/old")).unwrap();
    let file = |name: &'static str| (EntryType::Regular, name, "evil", 0o644);
    let link = |target: &'static str| (EntryType::Symlink, "x", target, 0o777);
    let outside = host.at("outside").to_str().unwrap().to_owned();
    for (entries, why) in [
        (vec![file("../outside/x")], "`..`"),
        (vec![file("/tmp/kiln-evil")], "absolute"),
        (vec![link("../outside"), file("x/evil")], "leaves the directory"),
        (vec![(EntryType::Symlink, "x", &outside, 0o777), file("x/evil")], "leaves the directory"),
        // A link that was there before.
        (vec![file("old/evil")], "leaves the directory"),
        (vec![(EntryType::Directory, "old", "", 0o755)], "has its name already"),
        (vec![file("deep")], "would replace a directory"),
        (vec![(EntryType::Link, "hard", "../outside", 0o644)], "hard link"),
        (vec![(EntryType::Char, "null", "", 0o666)], "is a device"),
        (vec![(EntryType::Fifo, "fifo", "", 0o666)], "is a FIFO"),
    ] {
        let (output, _) = host.out(&["ID:x", "in"], &archive(&entries)).await;
        ended(&output, 1, why);
        assert_eq!(fs::read_dir(host.at("outside")).unwrap().count(), 0, "{why}");
    }
    assert!(!Path::new("/tmp/kiln-evil").exists());
    assert!(fs::symlink_metadata(host.at("in/old")).unwrap().is_symlink());
    // A name that is given is given to one.
    let two = archive(&[file("a"), file("b")]);
    ended(&host.out(&["ID:x", "one"], &two).await.0, 1, "second top-level entry");
    let (output, _) = host.out(&["ID:x", "in"], &two[..700]).await;
    ended(&output, 1, "cut off");
    ended(&host.out(&["ID:x", "in"], &[b'x'; 600]).await.0, 1, "not a tar archive");
}

#[tokio::test]
async fn files_go_in_as_they_are() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    fs::create_dir_all(host.at("app/sub")).unwrap();
    fs::write(host.at("app/sub/file"), "content").unwrap();
    fs::set_permissions(host.at("app/sub/file"), fs::Permissions::from_mode(0o640)).unwrap();
    let far = "../".repeat(60) + "x//y/";
    symlink(&far, host.at("app/link")).unwrap();
    symlink("app", host.at("alias")).unwrap();
    let (output, open, got) = host.inward(&["app", "ID:/srv"]).await;
    ended(&output, 0, "");
    assert_eq!(open, Open::CopyIn(at(JOB, "/srv")));
    let all = listed(&got);
    let names: Vec<_> = all.keys().map(|name| name.trim_end_matches('/')).collect();
    assert_eq!(names, ["app", "app/link", "app/sub", "app/sub/file"]);
    assert_eq!(all["app/sub/file"], (EntryType::Regular, 0o640, "content".into()));
    assert_eq!(all["app/link"], (EntryType::Symlink, 0o777, far));

    let names = async |from: &str| -> Vec<String> {
        let (output, _, got) = host.inward(&[from, "ID:x"]).await;
        ended(&output, 0, "");
        listed(&got).into_keys().map(|name| name.trim_end_matches('/').to_owned()).collect()
    };
    assert_eq!(names("app/.").await, [".", "link", "sub", "sub/file"]);
    assert_eq!(names("app/sub/file").await, ["file"]);
    assert_eq!(names("alias").await, ["alias"], "a link is one");
    assert_eq!(names("alias/").await, ["alias", "alias/link", "alias/sub", "alias/sub/file"]);

    let mut child = host.cp(&["-", "ID:x"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let (mut agent, _) = host.start().await;
    stdin.write_all(b"any bytes").await.unwrap();
    drop(stdin);
    assert_eq!(take(&mut agent).await, b"any bytes");
    agent.exit(0).await;
    ended(&child.wait_with_output().await.unwrap(), 0, "");
}

#[tokio::test]
async fn what_did_not_come_along_is_named() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    let some = archive(&[(EntryType::Regular, "a", "x", 0o644)]);
    for to in [".", "-"] {
        let child = host.cp(&["ID:/dev", to]).spawn().unwrap();
        let (mut agent, _) = host.start().await;
        agent.print(Stream::Out, &some).await;
        agent.print(Stream::Err, "2 devices, sockets and FIFOs: \u{e9}, x".as_bytes()).await;
        agent.exit(0).await;
        let output = child.wait_with_output().await.unwrap();
        ended(&output, 0, "kiln: left out 2 devices, sockets and FIFOs: \u{e9}, x\n");
        assert_eq!(output.stdout, if to == "-" { &some[..] } else { b"" });
    }
    // What is no line of text is nothing, and an endless one is cut.
    for (words, shown) in [(b"a\nb".to_vec(), 0), (vec![b'x'; 60_000], 2048)] {
        let child = host.cp(&["ID:/dev", "."]).spawn().unwrap();
        let (mut agent, _) = host.start().await;
        agent.print(Stream::Out, &some).await;
        agent.print(Stream::Err, &words).await;
        agent.exit(0).await;
        let output = child.wait_with_output().await.unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(String::from_utf8_lossy(&output.stderr).matches('x').count(), shown);
    }
    fs::create_dir(host.at("dir")).unwrap();
    nix::unistd::mkfifo(&host.at("dir/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (output, _, got) = host.inward(&["dir", "ID:x"]).await;
    ended(&output, 0, "kiln: left out 1 device, socket or FIFO: dir/fifo\n");
    assert_eq!(listed(&got).len(), 1);
}

#[tokio::test]
async fn codes_are_for_scripts() {
    let server = server().await;
    let client = server.client("a", Role::Tenant).await;
    let host = Host::new(&server, &client).await;
    fs::write(host.at("file"), "x").unwrap();
    nix::unistd::mkfifo(&host.at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (args, code, why) in [
        (&["file", "other"][..], 2, "ID:PATH"),
        (&["ID:a", "ID:b"], 2, "only one"),
        (&["--vm", "--with-secrets", "ID:a", "b"], 2, "cannot be used with"),
        (&["ID:a", "missing/b"], 1, "there is no directory"),
        (&["ID:a", "file/"], 1, "there is no directory"),
        (&["missing", "ID:a"], 1, "there is nothing at"),
        (&["fifo", "ID:a"], 1, "it is a FIFO"),
        (&["nobody:a", "b"], 1, "no build or instance nobody"),
        (&["--url", "http://127.0.0.1:1", "ID:a", "b"], 3, "cannot reach"),
        (&["--vm", "ID:a", "b"], 3, "needs the role admin"),
    ] {
        ended(&host.cp(args).output().await.unwrap(), code, why);
    }
    for (cause, code) in
        [(Cause::NotFound, 1), (Cause::NoStep, 1), (Cause::Invalid, 1), (Cause::Internal, 1)]
    {
        for args in [["ID:a", "b"], ["file", "ID:a"]] {
            let child = host.cp(&args).spawn().unwrap();
            host.vm.opened().await.0.fail(cause, "why\x1b[2J").await;
            ended(&child.wait_with_output().await.unwrap(), code, "kiln: why\\x1b[2J\n");
        }
    }
    // It breaks off.
    let child = host.cp(&["ID:a", "b"]).spawn().unwrap();
    let (mut agent, _) = host.start().await;
    agent.print(Stream::Out, &archive(&[(EntryType::Regular, "a", "half", 0o644)])[..600]).await;
    agent.fail(Cause::Internal, "gone").await;
    ended(&child.wait_with_output().await.unwrap(), 1, "broke off");
}
