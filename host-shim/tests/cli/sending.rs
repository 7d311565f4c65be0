//! What `kiln build` sends as the source.

use std::io::Read;
use std::os::unix::fs::symlink;
use std::process::Stdio;

use axum::http::StatusCode;
use tokio::io::AsyncWriteExt;

use super::server::{Script, Server, problem};
use super::*;

/// Paths of an archive, with the content of files and the target of links.
fn entries(archive: &[u8]) -> Vec<(String, String)> {
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let link = entry.link_name().unwrap().map(|target| format!("-> {}", target.display()));
        let mut content = String::new();
        entry.read_to_string(&mut content).unwrap();
        (path, link.unwrap_or(content))
    });
    entries.collect()
}

async fn sent(dir: &std::path::Path, args: &[&str]) -> (Vec<(String, String)>, Server, Output) {
    let server = Server::start(script(&[], ready())).await;
    let output = output(kiln(&server, &[&["build", text(dir), "--detach"], args].concat())).await;
    assert!(output.status.success(), "{}", stderr(&output));
    let entries = entries(&server.script().parts["source"]);
    (entries, server, output)
}

fn write(dir: &tempfile::TempDir, files: &[(&str, &str)]) {
    for (path, content) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

fn pair(path: &str, content: &str) -> (String, String) {
    (path.to_owned(), content.to_owned())
}

#[tokio::test]
async fn the_source_is_what_the_ignore_file_leaves_of_it() {
    let dir = source();
    let ignore = "# comment\n*.log\n/target\n**/secret\nDockerfile\n.dockerignore\n!keep.log\n";
    write(
        &dir,
        &[
            (".dockerignore", ignore),
            (".hidden", "h"),
            ("a.log", ""),
            ("keep.log", "k"),
            ("src/a.log", "anchored"),
            ("src/deep/secret", ""),
            ("src/target", "anchored"),
            ("target/x", ""),
        ],
    );
    symlink("/etc/passwd", dir.path().join("link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("sock")).unwrap();
    let (entries, server, output) = sent(dir.path(), &[]).await;
    let expected = [
        pair(".dockerignore", ignore),
        pair(".hidden", "h"),
        pair("Dockerfile", "FROM scratch\n"),
        pair("keep.log", "k"),
        pair("link", "-> /etc/passwd"),
        pair("src/", ""),
        pair("src/a.log", "anchored"),
        pair("src/deep/", ""),
        pair("src/target", "anchored"),
    ];
    let trimmed = |entries: &[(String, String)]| -> Vec<_> {
        entries.iter().map(|(path, c)| (path.trim_end_matches('/').to_owned(), c.clone())).collect()
    };
    assert_eq!(trimmed(&entries), trimmed(&expected));
    ended(&output, 0, "b1\n", &["warning: not sent: sock (a socket)"]);
    assert!(!server.script().parts.contains_key("dockerfile"));
}

#[tokio::test]
async fn a_dockerfile_of_f_is_sent_apart_with_its_own_ignore_file() {
    let dir = source();
    let elsewhere = tempfile::tempdir().unwrap();
    write(&elsewhere, &[("Other", "FROM other\n"), ("Other.dockerignore", "b\n")]);
    write(&dir, &[("a", ""), ("b", ""), (".dockerignore", "a\n")]);
    let other = elsewhere.path().join("Other");
    let (entries, server, _) = sent(dir.path(), &["-f", text(&other)]).await;
    let expected = [
        pair(".dockerignore", "b\n\n.dockerignore\n"),
        pair("Dockerfile", "FROM scratch\n"),
        pair("a", ""),
    ];
    assert_eq!(entries, expected);
    assert_eq!(server.script().parts["dockerfile"], b"FROM other\n");
}

#[tokio::test]
async fn a_missing_dockerfile_is_found_by_the_build() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir, &[("a", "")]);
    let (entries, ..) = sent(dir.path(), &[]).await;
    assert_eq!(entries, [pair("a", "")]);
}

#[tokio::test]
async fn a_missing_dockerfile_of_f_is_found_by_the_build_and_no_other_is_taken() {
    let dir = source();
    write(&dir, &[("a", "")]);
    let (entries, server, detached) = sent(dir.path(), &["-f", "/none/such"]).await;
    assert_eq!(entries, [pair("a", "")], "the source's own Dockerfile was not asked for");
    assert!(!server.script().parts.contains_key("dockerfile"));
    ended(&detached, 0, "b1\n", &["warning: the Dockerfile /none/such does not exist"]);

    let message = "the Dockerfile `Dockerfile` is not in the source; name another with -f";
    let failure = json!({"type": "failure", "kind": "dockerfile_missing", "message": message});
    let build = failed("dockerfile_missing", message);
    let server = Server::start(script(&[failure], build)).await;
    let args = ["build", text(dir.path()), "-f", "/none/such"];
    let named = "the Dockerfile /none/such does not exist; -f is relative to the current directory";
    let said = [
        format!("kiln | warning: {named}"),
        format!("kiln | failed (dockerfile_missing): {named}"),
        format!("kiln: build b1 failed: {named}"),
    ];
    let output = output(kiln(&server, &args)).await;
    ended(&output, 1, "", &said.each_ref().map(String::as_str));
    assert!(!stderr(&output).contains("`Dockerfile`"), "{}", stderr(&output));
}

#[tokio::test]
async fn a_missing_dockerfile_beside_an_archive_is_told_at_once() {
    let server = Server::start(Script::default()).await;
    let output = output(kiln(&server, &["build", "-", "-f", "/none/such"])).await;
    ended(&output, 1, "", &["kiln: the Dockerfile /none/such does not exist"]);
    assert!(server.script().parts.is_empty());
}

#[tokio::test]
async fn f_is_relative_to_the_current_directory_wherever_the_source_is() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir, &[("here/Dockerfile", "FROM source\n"), ("other", "FROM other\n"), ("empty", "")]);
    for (file, content) in
        [("other", "FROM other\n"), ("here/Dockerfile", "FROM source\n"), ("empty", "\n")]
    {
        let server = Server::start(script(&[], ready())).await;
        let mut command = kiln(&server, &["build", "here", "-f", file, "--detach"]);
        command.current_dir(dir.path());
        ended(&output(command).await, 0, "b1\n", &[]);
        assert_eq!(server.script().parts["dockerfile"], content.as_bytes(), "{file}");
    }
}

#[tokio::test]
async fn a_source_that_is_no_directory_is_told() {
    let server = Server::start(Script::default()).await;
    let dir = source();
    for path in [dir.path().join("none"), dir.path().join("Dockerfile")] {
        let output = output(kiln(&server, &["build", text(&path)])).await;
        ended(&output, 1, "", &["kiln: the source /"]);
    }
}

#[tokio::test]
async fn a_file_that_changes_meanwhile_names_itself() {
    let dir = large_source();
    let large = dir.path().join("large");
    let script =
        Script { meddle: Some(large), watch: Some(std::process::id()), ..Script::default() };
    let server = Server::start(script).await;
    let output = output(kiln(&server, &["build", text(dir.path())])).await;
    let said = format!("{}/large: it changed while it was read", text(dir.path()));
    ended(&output, 1, "", &["kiln: cannot send the source: ", &said]);
}

#[tokio::test]
async fn an_archive_on_standard_input_is_passed_on_as_it_is() {
    let server = Server::start(script(&[], ready())).await;
    let mut command = kiln(&server, &["build", "-", "--detach"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let archive: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&archive).await.unwrap();
    drop(stdin);
    ended(&child.wait_with_output().await.unwrap(), 0, "b1\n", &[]);
    assert!(server.script().parts["source"] == archive);
}

/// Larger than what may be in memory by far.
const LARGE: u64 = 96 << 20;

/// Peak memory while it is sent, the program itself included.
const MOST_KB: u64 = 48 * 1024;

fn large_source() -> tempfile::TempDir {
    let dir = source();
    std::fs::File::create(dir.path().join("large")).unwrap().set_len(LARGE).unwrap();
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_source_takes_little_memory() {
    let server = Server::start(script(&[], ready())).await;
    let dir = large_source();
    let mut command = kiln(&server, &["build", text(dir.path()), "--detach"]);
    let child = {
        // Held, so that the server knows whom to watch before it takes the first byte.
        let mut script = server.script();
        let child = command.spawn().unwrap();
        script.watch = child.id();
        child
    };
    ended(&child.wait_with_output().await.unwrap(), 0, "b1\n", &["source sent: 96.0 MiB"]);
    let script = server.script();
    assert!(script.source_bytes > LARGE);
    let peak = script.peak_kb.unwrap();
    assert!(peak < MOST_KB, "{peak} kB");
}

#[tokio::test]
async fn a_refusal_in_the_middle_of_a_large_source_is_heard() {
    let refuse_post = Some(problem(StatusCode::UNAUTHORIZED, "the token is not valid"));
    let server = Server::start(Script { refuse_post, ..Script::default() }).await;
    let dir = large_source();
    let output = output(kiln(&server, &["build", text(dir.path())])).await;
    ended(&output, 3, "", &["kiln: the token is not valid"]);
}
