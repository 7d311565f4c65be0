//! The registry as a guest sees it: skopeo (the engine's own library) and bare HTTP.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{Method, StatusCode};
use kiln::gateway::GuestContext;
use kiln::gateway::serve;
use kiln::staging::{Digest, MAX_MANIFEST_BYTES};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::support::{A, ADMIN, B, Image, OCI_MANIFEST, World, code_of, fails, http, ok, skopeo};

async fn send(at: SocketAddr, method: Method, path: &str) -> reqwest::Response {
    http().request(method, format!("http://{at}{path}")).send().await.unwrap()
}

async fn put_manifest(
    at: SocketAddr,
    reference: &str,
    media_type: &str,
    bytes: &[u8],
) -> (u16, String) {
    let url = format!("http://{at}/v2/staging/image/manifests/{reference}");
    let put = http().put(url).header("Content-Type", media_type).body(bytes.to_vec());
    code_of(put.send().await.unwrap()).await
}

async fn put_blob(at: SocketAddr, bytes: &[u8]) {
    let digest = Digest::of(bytes);
    let url = format!("http://{at}/v2/staging/image/blobs/uploads/?digest={digest}");
    let done = http().post(url).body(bytes.to_vec()).send().await.unwrap();
    assert_eq!(done.status(), StatusCode::CREATED);
}

/// A world with a base image, and a guest in it.
async fn world() -> (World, Image, Arc<GuestContext>, SocketAddr) {
    let world = World::new().await;
    let base = Image::new(&["base"]);
    ok(&world.push(ADMIN, &base.layout(world.path("base")), "base/debian:trixie").await);
    let (ctx, at) = world.guest().await;
    (world, base, ctx, at)
}

#[tokio::test]
async fn an_engine_pulls_its_base_and_pushes_its_result() {
    let (world, base, ctx, at) = world().await;
    let out = format!("oci:{}:image", world.path("pulled").display());
    let from = format!("docker://{at}/base/debian:trixie");
    ok(&skopeo(&["copy", "--preserve-digests", "--src-tls-verify=false", &from, &out]).await);
    let pulled = ctx.pulled();
    let digests: Vec<_> = pulled.iter().map(|p| p.digest.clone()).collect();
    assert!(digests.iter().all(|d| *d == base.digest().to_string()), "{pulled:?}");
    assert!(pulled.iter().any(|p| p.reference == "registry.kiln/base/debian:trixie"), "{pulled:?}");

    // The result has the base's layer and one more.
    let image = Image::new(&["base", "mine"]);
    let layout = format!("oci:{}:image", image.layout(world.path("image")).display());
    let to = format!("docker://{at}/staging/image:result");
    let push = ["copy", "--preserve-digests", "--dest-tls-verify=false", &layout, &to];
    assert!(fails(&skopeo(&push).await).contains("does not push its result yet"));
    ctx.set_pushing(true);
    ok(&skopeo(&push).await);
    let staged = ctx.staging().manifest(&image.digest()).await.unwrap().unwrap();
    assert_eq!(staged.bytes, image.manifest);
    assert_eq!(ctx.staging().tag("result"), Some(image.digest()));
    assert_eq!(
        ctx.staging().blob(&Digest::of(&image.layers[0])),
        None,
        "the base's layer was not sent"
    );
    assert!(ctx.staging().blob(&Digest::of(&image.layers[1])).is_some());
    // It can read back what it pushed, the base's layer too.
    let out = format!("oci:{}:image", world.path("back").display());
    ok(&skopeo(&[
        "copy",
        "--src-tls-verify=false",
        &to.replace(":result", &format!("@{}", image.digest())),
        &out,
    ])
    .await);
    ctx.set_pushing(false);
    let begin = send(at, Method::POST, "/v2/staging/image/blobs/uploads/").await;
    assert_eq!(begin.status(), StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_build_sees_base_and_its_tenants_repositories_only() {
    let (world, base, _ctx, at) = world().await;
    let layout = world.path("base");
    ok(&world.push(A, &layout, "a/lib:v1").await);
    ok(&world.push(B, &layout, "b/lib:v1").await);
    let layer = Digest::of(&base.layers[0]);
    for (path, status) in [
        ("/v2/".to_owned(), 200),
        ("/v2/base/debian/manifests/trixie".into(), 200),
        ("/v2/base/debian/tags/list".into(), 200),
        (format!("/v2/base/debian/blobs/{layer}"), 200),
        ("/v2/a/lib/manifests/v1".into(), 200),
        ("/v2/b/lib/manifests/v1".into(), 404),
        (format!("/v2/b/lib/blobs/{layer}"), 404),
        ("/v2/builds/b1/manifests/latest".into(), 404),
        ("/v2/upstream/docker.io/x/manifests/latest".into(), 404),
        ("/v2/upstream/x/manifests/latest".into(), 404),
        ("/v2/upstream/127.0.0.1__1/x/manifests/latest".into(), 404),
        ("/v2/upstream/docker.io/x/tags/list".into(), 405),
        ("/v2/base/missing/manifests/latest".into(), 404),
        ("/v2/base/debian/manifests/missing".into(), 404),
        ("/v2/staging/image/manifests/result".into(), 404),
        ("/v2/staging/other/manifests/result".into(), 404),
        ("/v2/_catalog".into(), 405),
        ("/v2/token".into(), 404),
        ("/metrics".into(), 404),
        ("/v2/base/../b/lib/manifests/v1".into(), 404),
    ] {
        assert_eq!(send(at, Method::GET, &path).await.status().as_u16(), status, "{path}");
    }
    for (method, path) in [
        (Method::PUT, "/v2/a/lib/manifests/v2"),
        (Method::POST, "/v2/a/lib/blobs/uploads/"),
        (Method::DELETE, "/v2/a/lib/manifests/v1"),
        (Method::PUT, "/v2/base/debian/manifests/trixie"),
    ] {
        let answer = send(at, method.clone(), path).await;
        assert_eq!(code_of(answer).await, (403, "DENIED".into()), "{method} {path}");
    }
    let upstream = send(at, Method::GET, "/v2/upstream/docker.io/x/manifests/latest").await;
    let said = upstream.text().await.unwrap();
    let asks =
        "docker.io is not an upstream of this host: ask the operator for --upstream docker.io";
    assert!(said.contains(asks), "{said}");
}

#[tokio::test]
async fn pulls_are_written_down_by_what_was_served() {
    let (_world, base, ctx, at) = world().await;
    let digest = base.digest();
    send(at, Method::HEAD, "/v2/base/debian/manifests/trixie").await;
    assert_eq!(ctx.pulled(), [], "looking is not pulling");
    let by_digest = format!("/v2/base/debian/manifests/{digest}");
    let answer = send(at, Method::GET, &by_digest).await;
    assert_eq!(answer.headers()["docker-content-digest"], digest.to_string().as_str());
    assert_eq!(answer.headers()["content-type"], OCI_MANIFEST);
    assert_eq!(answer.bytes().await.unwrap(), base.manifest);
    let pulled = ctx.pulled();
    assert_eq!(pulled.len(), 1);
    assert_eq!(pulled[0].reference, format!("registry.kiln/base/debian@{digest}"));
    let blob = ctx.pulled_blob(&Digest::of(&base.layers[0])).unwrap();
    assert_eq!((blob.repository.as_str(), blob.size), ("base/debian", base.layers[0].len() as u64));
    let layer = format!("/v2/base/debian/blobs/{}", Digest::of(&base.layers[0]));
    let url = format!("http://{at}{layer}");
    let part = http().get(url).header("Range", "bytes=0-1").send().await.unwrap();
    assert_eq!(part.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.bytes().await.unwrap(), base.layers[0][..2]);
}

#[tokio::test]
async fn uploads_follow_the_spec() {
    let (_world, _base, ctx, at) = world().await;
    ctx.set_pushing(true);
    let begin = send(at, Method::POST, "/v2/staging/image/blobs/uploads/").await;
    assert_eq!(begin.status(), StatusCode::ACCEPTED);
    let url = format!("http://{at}{}", begin.headers()["location"].to_str().unwrap());
    let patch = |range: &'static str, body: &'static str| {
        http().patch(&url).header("Content-Range", range).body(body).send()
    };
    let first = patch("0-2", "abc").await.unwrap();
    assert_eq!(
        (first.status(), &first.headers()["range"]),
        (StatusCode::ACCEPTED, &"0-2".parse().unwrap())
    );
    let again = patch("0-2", "abc").await.unwrap();
    assert_eq!(again.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    let nonsense = patch("x", "abc").await.unwrap();
    assert_eq!(nonsense.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    let progress = http().get(&url).send().await.unwrap();
    assert_eq!(
        (progress.status(), &progress.headers()["range"]),
        (StatusCode::NO_CONTENT, &"0-2".parse().unwrap())
    );
    let no_digest = http().put(&url).body("def").send().await.unwrap();
    assert_eq!(code_of(no_digest).await, (400, "DIGEST_INVALID".into()));
    let digest = Digest::of(b"abcdef");
    let done = http().put(format!("{url}?digest={digest}")).body("def").send().await.unwrap();
    assert_eq!(done.status(), StatusCode::CREATED);
    assert_eq!(done.headers()["location"], format!("/v2/staging/image/blobs/{digest}").as_str());
    let gone = http().get(&url).send().await.unwrap();
    assert_eq!(code_of(gone).await, (404, "BLOB_UPLOAD_UNKNOWN".into()));
    let got = send(at, Method::GET, &format!("/v2/staging/image/blobs/{digest}")).await;
    assert_eq!(got.bytes().await.unwrap(), "abcdef");

    let wrong = format!("http://{at}/v2/staging/image/blobs/uploads/?digest={}", Digest::of(b"x"));
    let wrong = http().post(wrong).body("y").send().await.unwrap();
    assert_eq!(code_of(wrong).await, (400, "DIGEST_INVALID".into()));
    for bad in [
        "/v2/staging/image/blobs/uploads/?digest=sha256:1",
        "/v2/staging/image/blobs/uploads/?mount=../x",
    ] {
        assert_eq!(code_of(send(at, Method::POST, bad).await).await.0, 400, "{bad}");
    }
    let cancel = send(at, Method::POST, "/v2/staging/image/blobs/uploads/").await;
    let url = format!("http://{at}{}", cancel.headers()["location"].to_str().unwrap());
    assert_eq!(http().delete(&url).send().await.unwrap().status(), StatusCode::NO_CONTENT);
    assert_eq!(http().delete(&url).send().await.unwrap().status(), StatusCode::NOT_FOUND);
    // Larger than the limit of this staging area.
    let large = vec![0; 65 * 1024 * 1024];
    let url = format!("http://{at}/v2/staging/image/blobs/uploads/?digest={}", Digest::of(&large));
    // The answer comes before all is sent; a client may see a broken pipe instead.
    if let Ok(answer) = http().post(url).body(large).send().await {
        assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
    assert_eq!(ctx.staging().used_bytes(), 6);
}

#[tokio::test]
async fn mounts_work_for_what_was_pulled() {
    let (_world, base, ctx, at) = world().await;
    ctx.set_pushing(true);
    let digest = Digest::of(&base.layers[0]);
    let mount = format!("/v2/staging/image/blobs/uploads/?mount={digest}&from=base/debian");
    assert_eq!(
        send(at, Method::POST, &mount).await.status(),
        StatusCode::ACCEPTED,
        "not pulled yet"
    );
    let blob = format!("/v2/staging/image/blobs/{digest}");
    assert_eq!(send(at, Method::HEAD, &blob).await.status(), StatusCode::NOT_FOUND);
    send(at, Method::GET, "/v2/base/debian/manifests/trixie").await;
    let mounted = send(at, Method::POST, &mount).await;
    assert_eq!(mounted.status(), StatusCode::CREATED);
    assert_eq!(mounted.headers()["location"], blob.as_str());
    let head = send(at, Method::HEAD, &blob).await;
    assert_eq!(head.headers()["content-length"], base.layers[0].len().to_string().as_str());
}

#[tokio::test]
async fn a_manifest_must_be_one_of_an_image_that_is_there() {
    let (_world, _base, ctx, at) = world().await;
    ctx.set_pushing(true);
    let image = Image::new(&["mine"]);
    let put = |bytes: Vec<u8>, media_type: &'static str| async move {
        put_manifest(at, "result", media_type, &bytes).await
    };
    let unknown = (400, "MANIFEST_BLOB_UNKNOWN".to_owned());
    let invalid = (400, "MANIFEST_INVALID".to_owned());
    assert_eq!(put(image.manifest.clone(), OCI_MANIFEST).await, unknown);
    put_blob(at, &image.layers[0]).await;
    assert_eq!(put(image.manifest.clone(), OCI_MANIFEST).await, unknown);
    put_blob(at, &image.config).await;
    assert_eq!(put(image.manifest.clone(), OCI_MANIFEST).await.0, 201);

    let text = String::from_utf8(image.manifest.clone()).unwrap();
    let size = format!("\"size\":{}", image.config.len());
    let lying = text.replace(&size, "\"size\":1");
    assert_eq!(put(lying.into_bytes(), OCI_MANIFEST).await, invalid);
    assert_eq!(put(b"{}".to_vec(), OCI_MANIFEST).await, invalid);
    assert_eq!(put(b"nonsense".to_vec(), OCI_MANIFEST).await, invalid);
    let index = "application/vnd.oci.image.index.v1+json";
    assert_eq!(put(text.clone().into_bytes(), index).await, invalid);
    assert_eq!(put(text.into_bytes(), "text/plain").await, invalid);
    assert_eq!(put(vec![b' '; MAX_MANIFEST_BYTES + 1], OCI_MANIFEST).await, invalid);
    let by_digest =
        put_manifest(at, &Digest::of(b"x").to_string(), OCI_MANIFEST, &image.manifest).await;
    assert_eq!(by_digest, (400, "DIGEST_INVALID".into()));
    let digest = image.digest().to_string();
    assert_eq!(put_manifest(at, &digest, OCI_MANIFEST, &image.manifest).await.0, 201);
    let delete = send(at, Method::DELETE, &format!("/v2/staging/image/manifests/{digest}")).await;
    assert_eq!(delete.status(), StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn hostile_connections_end() {
    let (_world, _base, ctx, _at) = world().await;
    // More headers than allowed.
    let (mut guest, host) = tokio::io::duplex(1024 * 1024);
    let serving = tokio::spawn(serve(host, ctx.clone(), CancellationToken::new(), || ()));
    let headers = "X-A: b\r\n".repeat(1000);
    guest
        .write_all(format!("GET /v2/ HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    guest.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    serving.await.unwrap();
    // A line without an end.
    let (mut guest, host) = tokio::io::duplex(1024 * 1024);
    let serving = tokio::spawn(serve(host, ctx.clone(), CancellationToken::new(), || ()));
    let _ = guest.write_all(&vec![b'a'; 512 * 1024]).await;
    serving.await.unwrap();
    // One that is cancelled in the middle.
    let cancel = CancellationToken::new();
    let (_guest, host) = tokio::io::duplex(1024);
    let serving = tokio::spawn(serve(host, ctx, cancel.clone(), || ()));
    cancel.cancel();
    serving.await.unwrap();
}
