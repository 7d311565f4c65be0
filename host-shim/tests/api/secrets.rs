//! Secrets over the API, and by `kiln secret`: values go in, and come out for a build's VM alone.

use std::process::{Output, Stdio};

use kiln::build::{Build, Status, Tenant};
use kiln::secrets::{self, Sealed};
use kiln::store::Role;
use kiln_protocol::secret::{MAX_SECRET_VALUE, MAX_SECRETS, SecretAnswer, SecretId};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::support::{Client, Server, form, id_of, refusal, server};

const VALUE: &[u8] = b" hunter2\n\0\xff\n";

async fn put(client: &Client<'_>, id: &str, value: &[u8]) -> reqwest::Response {
    let path = format!("/secrets/{id}");
    client.request(Method::PUT, &path).body(value.to_vec()).send().await.unwrap()
}

/// What the build's VM is given.
async fn asked(server: &Server, build: &Build, id: &str) -> SecretAnswer {
    let id = SecretId::new(id).unwrap();
    secrets::answer(&*server.store, &server.vault, build, &id).await.unwrap()
}

fn value(answer: SecretAnswer) -> Vec<u8> {
    match answer {
        SecretAnswer::Value(value) => value.expose().to_vec(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_secret_is_set_listed_without_its_value_replaced_and_removed() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    assert_eq!(put(&acme, "npm.token", VALUE).await.status(), 204);
    assert_eq!(put(&acme, "npm.token", b"another").await.status(), 204);
    assert_eq!(put(&acme, "empty", b"").await.status(), 204);
    let listed = acme.json("/secrets").await;
    assert_eq!(listed[0]["id"], "empty");
    assert_eq!(listed[1]["id"], "npm.token");
    listed[1]["updated_at"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 2);
    assert!(!listed.to_string().contains("another"));
    // There is no way to read one.
    refusal(acme.get("/secrets/npm.token").await, 405, "method_not_allowed").await;

    // Another tenant's are its own, and a reader has none.
    let other = server.client("other", Role::Tenant).await;
    assert_eq!(other.json("/secrets").await, json!([]));
    refusal(other.delete("/secrets/npm.token").await, 404, "not_found").await;
    let reader = server.client("acme", Role::Reader).await;
    refusal(reader.get("/secrets").await, 403, "forbidden").await;
    refusal(put(&reader, "x", b"x").await, 403, "forbidden").await;

    assert_eq!(acme.delete("/secrets/npm.token").await.status(), 204);
    refusal(acme.delete("/secrets/npm.token").await, 404, "not_found").await;
}

#[tokio::test]
async fn what_cannot_be_a_secret_is_refused() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    for id in [".hidden", "a%2Fb", "a%20b", "%C3%A9", &"a".repeat(129)] {
        refusal(put(&acme, id, b"x").await, 422, "invalid_field").await;
    }
    assert_eq!(put(&acme, "most", &vec![7; MAX_SECRET_VALUE]).await.status(), 204);
    refusal(put(&acme, "more", &vec![7; MAX_SECRET_VALUE + 1]).await, 413, "too_large").await;
    refusal(put(&acme, "more", &vec![7; 4 << 20]).await, 413, "too_large").await;
}

#[tokio::test]
async fn a_build_gets_its_own_value_else_its_tenants_and_only_what_it_declared() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    for id in ["npm", "pip", "undeclared"] {
        put(&acme, id, format!("{id} of acme").as_bytes()).await;
    }
    let other = server.client("other", Role::Tenant).await;
    put(&other, "late", b"of another").await;
    let declared = r#"[{"id":"npm"},{"id":"pip","env_var":"PIP"},{"id":"late"}]"#;
    let parts = || {
        Form::new()
            .part("secret.npm", Part::bytes(VALUE.to_vec()))
            .text("secrets", declared)
            .part("source", crate::support::source())
    };
    let made = acme.submit(parts()).await;
    assert!(!made.to_string().contains("hunter2"));
    let build = server.store.build(&id_of(&made)).await.unwrap().unwrap();
    assert_eq!(value(asked(&server, &build, "npm").await), VALUE);
    assert_eq!(value(asked(&server, &build, "pip").await), b"pip of acme");
    assert_eq!(asked(&server, &build, "undeclared").await, SecretAnswer::Denied);
    assert_eq!(asked(&server, &build, "late").await, SecretAnswer::Missing);
    put(&acme, "late", b"just in time").await;
    assert_eq!(value(asked(&server, &build, "late").await), b"just in time");

    // On the disk there is none of them.
    let database = std::fs::read(server.data.join("kiln.db")).unwrap();
    let log = std::fs::read(server.data.join("kiln.db-wal")).unwrap();
    for secret in [&VALUE[..8], b"of acme", b"just in time"] {
        for file in [&database, &log] {
            assert!(!file.windows(secret.len()).any(|window| window == secret));
        }
    }

    // What was its own goes with it.
    let claimed = server.scheduler.claim().await;
    assert_eq!(value(asked(&server, &claimed.build, "npm").await), VALUE);
    server.scheduler.fail(&claimed).await;
    assert_eq!(value(asked(&server, &claimed.build, "npm").await), b"npm of acme");
    let made = acme.submit(parts()).await;
    let id = id_of(&made);
    assert_eq!(acme.delete(&format!("/builds/{id}")).await.status(), 204);
    let build = server.store.build(&id).await.unwrap().unwrap();
    assert_eq!(build.status, Status::Cancelled);
    assert_eq!(value(asked(&server, &build, "npm").await), b"npm of acme");
}

#[tokio::test]
async fn values_that_do_not_belong_are_refused() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    let with = |name: &'static str, value: Vec<u8>| form().part(name, Part::bytes(value));
    let answer = acme.post(with("secret.npm", b"x".to_vec())).await;
    let body = refusal(answer, 400, "undeclared_secret").await;
    assert!(body["message"].as_str().unwrap().contains("npm"));
    refusal(acme.post(with("secret..b", b"x".to_vec())).await, 422, "invalid_field").await;
    let large = with("secret.npm", vec![1; MAX_SECRET_VALUE + 1]);
    refusal(acme.post(large).await, 413, "too_large").await;
    let twice = with("secret.npm", b"x".to_vec()).part("secret.npm", Part::bytes(b"y".to_vec()));
    refusal(acme.post(twice).await, 422, "duplicate_field").await;
    assert_eq!(server.source_dirs(), 0);
}

#[tokio::test]
async fn another_value_is_another_request() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    let post = async |value: &'static str| {
        let form = Form::new()
            .text("secrets", r#"[{"id":"npm"}]"#)
            .text("secret.npm", value)
            .part("source", crate::support::source());
        let request = acme.request(Method::POST, "/builds").header("idempotency-key", "k");
        request.multipart(form).send().await.unwrap()
    };
    let first = post("one").await;
    assert_eq!(first.status(), 202);
    let first: serde_json::Value = first.json().await.unwrap();
    let again: serde_json::Value = post("one").await.json().await.unwrap();
    assert_eq!(first["id"], again["id"]);
    refusal(post("two").await, 422, "idempotency_key_reused").await;
}

#[tokio::test]
async fn a_build_has_at_most_so_many_values_of_its_own() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    let with = |number: usize| {
        let declared: Vec<_> =
            (0..number.min(MAX_SECRETS)).map(|n| json!({"id": format!("s{n}")})).collect();
        let form = Form::new().text("secrets", json!(declared).to_string());
        let form = (0..number).fold(form, |form, n| form.text(format!("secret.s{n}"), ""));
        form.part("source", crate::support::source())
    };
    refusal(acme.post(with(MAX_SECRETS + 1)).await, 413, "too_large").await;
    assert_eq!(server.source_dirs(), 0);
    assert_eq!(acme.post(with(MAX_SECRETS)).await.status(), 202);
}

/// However many are set at the same time.
#[tokio::test]
async fn a_tenant_has_at_most_so_many_secrets() {
    const MOST: usize = 1000;
    const MORE: usize = 20;
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    let (tenant, most) = (Tenant::new("acme").unwrap(), u32::try_from(MOST).unwrap());
    for n in 0..MOST - 1 {
        let id = SecretId::new(format!("s{n}")).unwrap();
        server.store.put_secret(&tenant, &id, &Sealed(vec![]), 0, most).await.unwrap();
    }
    let names: Vec<_> = (0..MORE).map(|n| format!("more{n}")).collect();
    let answers = names.iter().map(|name| put(&acme, name, b"x"));
    let answers = futures_util::future::join_all(answers).await;
    let taken = answers.iter().filter(|answer| answer.status() == 204).count();
    assert_eq!(taken, 1);
    for answer in answers.into_iter().filter(|answer| answer.status() != 204) {
        refusal(answer, 409, "too_many_secrets").await;
    }
    assert_eq!(acme.json("/secrets").await.as_array().unwrap().len(), MOST);
    // Older ones are replaced all the same, and other tenants have their own.
    assert_eq!(put(&acme, "s0", b"another").await.status(), 204);
    let other = server.client("other", Role::Tenant).await;
    assert_eq!(put(&other, "s0", b"x").await.status(), 204);
}

/// `kiln secret ARGS…` with these bytes on its standard input.
async fn kiln(client: &Client<'_>, args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .arg("secret")
        .args(args)
        .env("KILN_URL", client.url(""))
        .env("KILN_TOKEN", client.authorization().unwrap().strip_prefix("Bearer ").unwrap())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feed = async move {
        // It need not read what it does not want.
        let _ = stdin.write_all(input).await;
    };
    tokio::join!(feed, child.wait_with_output()).1.unwrap()
}

#[track_caller]
fn ended(output: &Output, code: i32, stdout: &str, stderr: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), stdout, "{said}");
    assert!(if stderr.is_empty() { said.is_empty() } else { said.contains(stderr) }, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cli_values_are_set_from_files_and_from_standard_input() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, value: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, value).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // As long as it may be, and with every byte; nothing is trimmed, and nothing is a value as well.
    let most: Vec<u8> = (0..=u8::MAX).cycle().take(MAX_SECRET_VALUE).collect();
    let (src, src_most) = (file("value", VALUE), file("most", &most));
    for (id, more, input) in [
        ("file", &["--src", &src][..], &b"not this"[..]),
        ("stdin", &[], VALUE),
        ("most", &["--src", &src_most], b""),
        ("most.stdin", &[], &most),
        ("empty", &[], b""),
        ("empty", &["--src", "/dev/null"], b""),
    ] {
        ended(&kiln(&acme, &[&["set", id], more].concat(), input).await, 0, "", "");
    }
    let declared = ["file", "stdin", "most", "most.stdin", "empty"].map(|id| json!({"id": id}));
    let form = Form::new().text("secrets", json!(declared).to_string());
    let made = acme.submit(form.part("source", crate::support::source())).await;
    let build = server.store.build(&id_of(&made)).await.unwrap().unwrap();
    for (id, expected) in
        [("file", VALUE), ("stdin", VALUE), ("most", &most), ("most.stdin", &most), ("empty", b"")]
    {
        assert!(value(asked(&server, &build, id).await) == expected, "{id}");
    }
    // What is there is replaced.
    ended(&kiln(&acme, &["set", "stdin"], b"another").await, 0, "", "");
    assert_eq!(value(asked(&server, &build, "stdin").await), b"another");
}

#[tokio::test(flavor = "multi_thread")]
async fn cli_values_that_cannot_be_are_refused() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    let dir = tempfile::tempdir().unwrap();
    let more = vec![7; MAX_SECRET_VALUE + 1];
    let (path, none) = (dir.path().join("more"), dir.path().join("none"));
    std::fs::write(&path, &more).unwrap();
    let at = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let too_large = "kiln: the secret has more than 524288 bytes\n";
    ended(&kiln(&acme, &["set", "more"], &more).await, 2, "", too_large);
    ended(&kiln(&acme, &["set", "more", "--src", &at(&path)], b"").await, 2, "", too_large);
    // Of one that never ends no more is read.
    ended(&kiln(&acme, &["set", "more", "--src", "/dev/zero"], b"").await, 2, "", too_large);
    let missing = kiln(&acme, &["set", "more", "--src", &at(&none)], b"x").await;
    ended(&missing, 2, "", &format!("the secret's file {}: No such file", none.display()));
    for args in [&["set", ".hidden"][..], &["set", "a/b"], &["rm", "a b"], &["set"], &[]] {
        assert_eq!(kiln(&acme, args, b"x").await.status.code(), Some(2), "{args:?}");
    }
    assert_eq!(acme.json("/secrets").await, json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn cli_secrets_are_listed_and_removed() {
    let server = server().await;
    let acme = server.client("acme", Role::Tenant).await;
    ended(&kiln(&acme, &["ls"], b"").await, 0, "ID  CREATED  UPDATED\n", "");
    for id in ["npm.token", "a"] {
        ended(&kiln(&acme, &["set", id], b"hunter2-of-acme").await, 0, "", "");
    }
    let listed = acme.json("/secrets").await;
    let row = |n: usize| {
        let field = |name: &str| listed[n][name].as_str().unwrap().to_owned();
        (field("id"), field("created_at"), field("updated_at"))
    };
    let ((a, a_created, a_updated), (npm, npm_created, npm_updated)) = (row(0), row(1));
    let width = a_created.len().max(npm_created.len());
    let line =
        |id: &str, created: &str, updated: &str| format!("{id:9}  {created:width$}  {updated}\n");
    let table = [
        line("ID", "CREATED", "UPDATED"),
        line(&a, &a_created, &a_updated),
        line(&npm, &npm_created, &npm_updated),
    ];
    ended(&kiln(&acme, &["ls"], b"").await, 0, &table.concat(), "");
    ended(&kiln(&acme, &["ls", "--format", "json"], b"").await, 0, &format!("{listed}\n"), "");
    // Nobody else sees it, or removes it.
    let other = server.client("other", Role::Tenant).await;
    ended(&kiln(&other, &["ls"], b"").await, 0, "ID  CREATED  UPDATED\n", "");
    ended(&kiln(&other, &["rm", "a"], b"").await, 1, "", "kiln: there is no such secret");
    let reader = server.client("acme", Role::Reader).await;
    ended(&kiln(&reader, &["ls"], b"").await, 3, "", "kiln: ");

    ended(&kiln(&acme, &["rm", "a"], b"").await, 0, "", "");
    ended(&kiln(&acme, &["rm", "a"], b"").await, 1, "", "kiln: there is no such secret");
    let left = acme.json("/secrets").await;
    assert_eq!((&left[0]["id"], left.as_array().unwrap().len()), (&json!("npm.token"), 1));
}
