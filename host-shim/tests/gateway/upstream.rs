//! Pulls from other registries: a real docker-registry with token login, and upstreams that mean harm.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use kiln::gateway::upstream::{Guard, Settings};
use kiln::gateway::{GatewayState, GuestContext, Upstreams, router};
use kiln::publish::{check, push};
use kiln::staging::{Digest, MAX_MANIFEST_BYTES};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};

use crate::publish::stage;
use crate::support::{
    A, ADMIN, Image, OCI_MANIFEST, People, World, code_of, fails, http, ok, skopeo,
};

/// What a server of the test's was asked for: method, path, and what came with it.
type Asked = Arc<Mutex<Vec<(String, HeaderMap)>>>;

/// How often something with these words was asked for.
fn count(asked: &Asked, words: &[&str]) -> usize {
    let asked = asked.lock().unwrap();
    asked.iter().filter(|(line, _)| words.iter().all(|word| line.contains(word))).count()
}

/// Serves on an address of the loopback and writes down what it is asked for.
async fn serve(ip: &str, app: impl FnOnce(SocketAddr) -> Router) -> (SocketAddr, Asked) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    let asked = Asked::default();
    let log = Arc::clone(&asked);
    let app = app(at).layer(axum::middleware::from_fn(
        move |request: Request, next: axum::middleware::Next| {
            let line = format!("{} {}", request.method(), request.uri());
            log.lock().unwrap().push((line, request.headers().clone()));
            next.run(request)
        },
    ));
    tokio::spawn(async move { axum::serve(listener, app).await });
    (at, asked)
}

/// A server that answers by path, whatever the method.
async fn answering<F>(ip: &str, answer: F) -> (SocketAddr, Asked)
where
    F: Fn(&str) -> Response + Clone + Send + Sync + 'static,
{
    serve(ip, |_| {
        Router::new().fallback(move |request: Request| {
            let answer = answer(request.uri().path());
            async move { answer }
        })
    })
    .await
}

/// The world's registry with its token login, as somebody else's registry that counts.
async fn real(world: &World) -> (SocketAddr, Asked) {
    serve("127.0.0.1", |at| {
        router(GatewayState {
            backing: world.registry.backing().clone(),
            authorizer: Arc::new(People),
            keys: world.keys.clone(),
            public_url: format!("http://{at}").parse().unwrap(),
        })
    })
    .await
}

fn logins(dir: &Path, at: SocketAddr, password: &str) -> std::path::PathBuf {
    let auth = serde_json::json!({"username": "any", "password": password});
    let file = dir.join("logins.json");
    std::fs::write(&file, serde_json::json!({"auths": {at.to_string(): auth}}).to_string())
        .unwrap();
    file
}

fn settings(dir: &Path, specs: &[String]) -> Settings {
    let specs = specs.iter().map(|spec| spec.parse().unwrap()).collect();
    Settings { specs, dir: dir.join("cache"), cache_bytes: 1 << 20, ..Settings::default() }
}

/// 127.0.0.1 is a public address, and the rest of the loopback is not.
fn public() -> Guard {
    Guard { permitted: vec!["127.0.0.1/32".parse().unwrap()] }
}

async fn get(at: SocketAddr, path: &str) -> reqwest::Response {
    http().get(format!("http://{at}/v2/upstream/{path}")).send().await.unwrap()
}

/// Whether an answer is none, or its body breaks off: how far a fetch is when its reader looks is chance.
async fn is_broken(answer: reqwest::Response) -> bool {
    answer.status() == StatusCode::BAD_GATEWAY || answer.bytes().await.is_err()
}

/// Every blob in the cache.
fn kept(dir: &Path) -> Vec<String> {
    let blobs = std::fs::read_dir(dir.join("cache/docker.io/blobs")).unwrap();
    let mut names: Vec<_> =
        blobs.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn pull(world: &World, at: SocketAddr, name: &str, to: &str) -> std::process::Output {
    let out = format!("oci:{}:image", world.path(to).display());
    let from = format!("docker://{at}/upstream/{name}");
    skopeo(&["copy", "--preserve-digests", "--src-tls-verify=false", &from, &out]).await
}

#[tokio::test]
async fn an_image_is_pulled_with_the_hosts_login_once_and_recorded() {
    let world = World::new().await;
    let image = Image::new(&["base"]);
    ok(&world.push(ADMIN, &image.layout(world.path("base")), "library/debian:trixie").await);
    let (there, asked) = real(&world).await;
    let specs =
        [format!("docker.io=http://{there}"), format!("r.example:5000=http://{there}/library")];
    let mut with = settings(world.dir.path(), &specs);
    let (_, anonymous) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
    let said = fails(&pull(&world, anonymous, "docker.io/library/debian:trixie", "none").await);
    assert!(said.contains("docker.io has no library/debian:trixie, or does not show it"), "{said}");

    with.logins = Some(logins(world.dir.path(), there, ADMIN));
    let upstreams = Upstreams::open(&with).unwrap();
    let (ctx, at) = world.guest_of("a", &upstreams).await;
    ok(&pull(&world, at, "docker.io/debian:trixie", "first").await);
    let digest = image.digest().to_string();
    let names = |ctx: &GuestContext| {
        let pulled = ctx.pulled();
        assert!(pulled.iter().all(|pulled| pulled.digest == digest), "{pulled:?}");
        pulled.into_iter().map(|pulled| pulled.reference).collect::<Vec<_>>()
    };
    assert!(
        names(&ctx).contains(&"docker.io/library/debian:trixie".to_owned()),
        "{:?}",
        names(&ctx)
    );
    assert_eq!(count(&asked, &["GET", "/v2/library/debian/blobs/"]), 2);

    // Another build, of another process: the tag is asked for, and nothing is fetched.
    let upstreams = Upstreams::open(&with).unwrap();
    let (ctx, at) = world.guest_of("b", &upstreams).await;
    asked.lock().unwrap().clear();
    ok(&pull(&world, at, "docker.io/library/debian:trixie", "second").await);
    ok(&pull(&world, at, &format!("docker.io/library/debian@{digest}"), "third").await);
    assert_eq!(count(&asked, &["GET", "/blobs/"]), 0);
    assert_eq!(count(&asked, &["GET", "/manifests/"]), 0);
    assert!(count(&asked, &["HEAD", "/v2/library/debian/manifests/trixie"]) > 0);
    assert!(names(&ctx).contains(&format!("docker.io/library/debian@{digest}")));

    // A registry with a port, behind a prefix: its own cache, its own names.
    ok(&pull(&world, at, "r.example__5000/debian:trixie", "fourth").await);
    assert!(names(&ctx).contains(&"r.example:5000/debian:trixie".to_owned()), "{:?}", names(&ctx));
    assert_eq!(count(&asked, &["GET", "/v2/library/debian/blobs/"]), 2);

    // A tag that moves is followed.
    let other = Image::new(&["other"]);
    ok(&world.push(ADMIN, &other.layout(world.path("other")), "library/debian:trixie").await);
    let moved = get(at, "docker.io/library/debian/manifests/trixie").await;
    assert_eq!(moved.bytes().await.unwrap(), other.manifest);
}

#[tokio::test]
async fn who_may_not_pull_gets_nothing_that_is_kept() {
    let world = World::new().await;
    let image = Image::new(&["base"]);
    ok(&world.push(ADMIN, &image.layout(world.path("base")), "a/lib:1").await);
    let (there, _) = real(&world).await;
    let mut with = settings(world.dir.path(), &[format!("docker.io=http://{there}")]);
    with.specs[0].tenants = Some(vec![kiln::build::Tenant::new("a").unwrap()]);
    with.logins = Some(logins(world.dir.path(), there, A));
    let upstreams = Upstreams::open(&with).unwrap();
    let (_, at) = world.guest_of("a", &upstreams).await;
    ok(&pull(&world, at, "docker.io/a/lib:1", "first").await);
    let (ctx, other) = world.guest_of("b", &upstreams).await;
    let layer = Digest::of(&image.layers[0]);
    for path in [
        "docker.io/a/lib/manifests/1".to_owned(),
        format!("docker.io/a/lib/manifests/{}", image.digest()),
        format!("docker.io/a/lib/blobs/{layer}"),
    ] {
        assert_eq!(code_of(get(other, &path).await).await, (403, "DENIED".into()), "{path}");
    }
    let said = fails(&pull(&world, other, "docker.io/a/lib:1", "second").await);
    assert!(said.contains("tenant b may not pull from docker.io: ask the operator"), "{said}");
    assert_eq!(ctx.pulled(), []);
    for (method, path) in [
        (Method::PUT, "docker.io/a/lib/manifests/1"),
        (Method::POST, "docker.io/a/lib/blobs/uploads/"),
        (Method::DELETE, "docker.io/a/lib/manifests/1"),
    ] {
        let url = format!("http://{at}/v2/upstream/{path}");
        let answer = http().request(method, url).send().await.unwrap();
        assert_eq!(code_of(answer).await, (403, "DENIED".into()), "{path}");
    }
}

#[tokio::test]
async fn a_base_of_another_registry_is_published_with_the_image() {
    let world = World::new().await;
    let base = Image::new(&["base"]);
    ok(&world.push(ADMIN, &base.layout(world.path("base")), "library/debian:trixie").await);
    let (there, asked) = real(&world).await;
    let mut with = settings(world.dir.path(), &[format!("docker.io=http://{there}")]);
    with.logins = Some(logins(world.dir.path(), there, ADMIN));
    let upstreams = Upstreams::open(&with).unwrap();
    let (ctx, at) = world.guest_of("a", &upstreams).await;
    ok(&pull(&world, at, "docker.io/library/debian:trixie", "pulled").await);
    let image = Image::new(&["base", "mine"]);
    stage(&ctx, &image, &[&image.layers[0]]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    let layer = checked.blobs.iter().find(|b| b.digest == Digest::of(&image.layers[0])).unwrap();
    assert_eq!(layer.source.as_deref(), Some("upstream/docker.io/library/debian"));
    asked.lock().unwrap().clear();
    push(&checked, world.registry.backing(), &upstreams, "a/app", "v1").await.unwrap();
    assert_eq!(count(&asked, &["/blobs/"]), 0, "it is on this host");
    assert_eq!(ok(&world.inspect(A, "a/app:v1").await), image.digest().to_string());
    // An upstream that is none any more has no layers.
    let nothing = Upstreams::none();
    let gone = push(&checked, world.registry.backing(), &nothing, "b/app", "v1").await;
    assert!(gone.is_err());
}

/// A blob whose bytes come when the test says so.
fn slow(parts: mpsc::Receiver<Bytes>, length: usize) -> Response {
    let parts = futures_util::stream::unfold(parts, |mut parts| async {
        let part = parts.recv().await?;
        Some((Ok::<_, std::io::Error>(part), parts))
    });
    ([(header::CONTENT_LENGTH, length)], Body::from_stream(parts)).into_response()
}

#[tokio::test]
async fn concurrent_pulls_of_a_blob_are_one_fetch_that_all_read_along() {
    let world = World::new().await;
    let content: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    let digest = Digest::of(&content);
    let (feed, parts) = mpsc::channel(4);
    let parts = Arc::new(Mutex::new(Some(parts)));
    let length = content.len();
    let (there, asked) =
        answering("127.0.0.1", move |_| slow(parts.lock().unwrap().take().unwrap(), length)).await;
    let mut with = settings(world.dir.path(), &[format!("docker.io=http://{there}")]);
    with.cache_bytes = 4 << 20;
    let upstreams = Upstreams::open(&with).unwrap();
    let path = format!("docker.io/a/b/blobs/{digest}");
    // Not before the first has begun: each has its answer's head, and the first bytes, while the rest is not there.
    let content = Bytes::from(content);
    feed.send(content.slice(..1_000_000)).await.unwrap();
    let mut readers = Vec::new();
    for tenant in ["a", "b", "c"] {
        let (_, at) = world.guest_of(tenant, &upstreams).await;
        let mut answer = get(at, &path).await;
        assert_eq!(answer.headers()[header::CONTENT_LENGTH], content.len().to_string());
        let first = answer.chunk().await.unwrap().unwrap();
        assert_eq!(first, content.slice(..first.len()));
        readers.push((first, answer));
    }
    // One that goes away takes nothing from the others.
    readers.remove(0);
    feed.send(content.slice(1_000_000..)).await.unwrap();
    drop(feed);
    for (first, answer) in readers {
        let rest = answer.bytes().await.unwrap();
        assert_eq!([&first[..], &rest[..]].concat(), content);
    }
    assert_eq!(count(&asked, &["GET"]), 1);
    let (_, at) = world.guest_of("a", &upstreams).await;
    assert_eq!(get(at, &path).await.bytes().await.unwrap(), content);
    assert_eq!(count(&asked, &["GET"]), 1);
    let head = http().head(format!("http://{at}/v2/upstream/{path}")).send().await.unwrap();
    assert_eq!(head.headers()[header::CONTENT_LENGTH], content.len().to_string());
}

#[tokio::test]
async fn a_fetch_that_nobody_waits_for_ends_and_the_next_one_begins_anew() {
    let world = World::new().await;
    let gone = Arc::new(Semaphore::new(0));
    let told = Arc::clone(&gone);
    let (there, asked) = answering("127.0.0.1", move |_| {
        let told = Arc::clone(&told);
        let held = scopeguard(move || told.add_permits(1));
        let first = std::iter::once(Bytes::from(vec![1; 600_000]));
        let never = futures_util::stream::pending::<Bytes>();
        let body = futures_util::StreamExt::map(
            futures_util::StreamExt::chain(futures_util::stream::iter(first), never),
            move |part| {
                let _ = &held;
                Ok::<_, std::io::Error>(part)
            },
        );
        ([(header::CONTENT_LENGTH, 700_000)], Body::from_stream(body)).into_response()
    })
    .await;
    let with = settings(world.dir.path(), &[format!("docker.io=http://{there}")]);
    let (_, at) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
    let path = format!("docker.io/a/b/blobs/{}", Digest::of(b"x"));
    for n in 1..=2 {
        let mut answer = get(at, &path).await;
        assert!(answer.chunk().await.unwrap().is_some());
        drop(answer);
        // The upstream's connection is closed: that is the event.
        gone.acquire().await.unwrap().forget();
        assert_eq!(count(&asked, &["GET"]), n);
    }
    assert_eq!(kept(world.dir.path()), Vec::<String>::new());
}

/// Calls a function when it is dropped.
fn scopeguard<F: FnOnce() + Send>(f: F) -> impl Send + Sync {
    struct Guard<F: FnOnce()>(Mutex<Option<F>>);
    impl<F: FnOnce()> Drop for Guard<F> {
        fn drop(&mut self) {
            if let Some(f) = self.0.lock().unwrap().take() {
                f();
            }
        }
    }
    Guard(Mutex::new(Some(f)))
}

#[tokio::test]
async fn what_is_not_what_its_digest_says_breaks_off_and_is_not_kept() {
    let world = World::new().await;
    let lie = vec![7_u8; 300_000];
    let body = lie.clone();
    let (there, asked) = answering("127.0.0.1", move |path| {
        let large = path.contains("/large/");
        let body = if large { vec![b' '; MAX_MANIFEST_BYTES + 1] } else { body.clone() };
        // Without a length, where it is to be streamed.
        if path.contains("/endless/") {
            let parts = futures_util::stream::iter([Ok::<_, std::io::Error>(body)]);
            return Body::from_stream(parts).into_response();
        }
        ([(header::CONTENT_TYPE, OCI_MANIFEST)], body).into_response()
    })
    .await;
    let with = settings(world.dir.path(), &[format!("docker.io=http://{there}")]);
    let (ctx, at) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
    let truth = Digest::of(b"truth");
    for repository in ["a/b", "a/b", "a/endless/b"] {
        let answer = get(at, &format!("docker.io/{repository}/blobs/{truth}")).await;
        assert!(is_broken(answer).await, "{repository}");
    }
    assert_eq!(
        count(&asked, &["GET", "/blobs/"]),
        4,
        "the one without a length is asked for twice"
    );
    assert_eq!(kept(world.dir.path()), Vec::<String>::new());
    for path in [format!("a/b/manifests/{truth}"), "a/large/manifests/1".into()] {
        assert_eq!(get(at, &format!("docker.io/{path}")).await.status(), 502, "{path}");
    }
    assert_eq!(ctx.pulled(), []);
    assert_eq!(std::fs::read_dir(world.path("cache/docker.io/manifests")).unwrap().count(), 0);

    // Honest, and kept; then changed on the disk: not served to its end, and fetched again.
    let digest = Digest::of(&lie);
    let path = format!("docker.io/a/b/blobs/{digest}");
    assert_eq!(get(at, &path).await.bytes().await.unwrap(), lie);
    // It has its name once the fetch is over, which is after its last byte.
    let file = world.path("cache/docker.io/blobs").join(digest.hex());
    while !file.exists() {
        tokio::task::yield_now().await;
    }
    std::fs::write(&file, vec![8_u8; lie.len()]).unwrap();
    let (_, at) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
    assert!(is_broken(get(at, &path).await).await);
    assert_eq!(get(at, &path).await.bytes().await.unwrap(), lie);
}

#[tokio::test]
async fn without_room_a_blob_is_streamed_and_checked_all_the_same() {
    let world = World::new().await;
    let content = vec![7_u8; 300_000];
    let body = content.clone();
    let (there, _) = answering("127.0.0.1", move |_| body.clone().into_response()).await;
    let mut with = settings(world.dir.path(), &[format!("docker.io=http://{there}")]);
    with.cache_bytes = 0;
    let (_, at) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
    let of = |digest: Digest| format!("docker.io/a/b/blobs/{digest}");
    assert_eq!(get(at, &of(Digest::of(&content))).await.bytes().await.unwrap(), content);
    assert!(is_broken(get(at, &of(Digest::of(b"other"))).await).await);
    assert_eq!(kept(world.dir.path()), Vec::<String>::new());
}

/// An upstream that sends to another place: for blobs, or for a token.
async fn sending(to: &str) -> (SocketAddr, Asked) {
    let to = to.to_owned();
    answering("127.0.0.1", move |path| {
        if path.contains("/manifests/") {
            let bearer = format!("Bearer realm=\"{to}/token\",service=\"x\"");
            return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, bearer)])
                .into_response();
        }
        (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, format!("{to}/blob"))]).into_response()
    })
    .await
}

#[tokio::test]
async fn a_public_upstream_leads_to_no_private_address() {
    let world = World::new().await;
    let digest = Digest::of(b"inner");
    let (inner, inside) = answering("127.0.0.2", |_| "inner".into_response()).await;
    for to in [
        format!("http://{inner}"),
        format!("http://127.2:{}", inner.port()),
        format!("http://[::ffff:127.0.0.2]:{}", inner.port()),
        "http://169.254.169.254".into(),
        "https://10.0.0.1".into(),
        "file:///etc".into(),
        format!("http://user:password@127.0.0.1:{}", inner.port()),
    ] {
        let (there, _) = sending(&to).await;
        let mut with = settings(&world.path("public"), &[format!("docker.io=http://{there}")]);
        with.guard = public();
        let (ctx, at) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
        for path in [format!("a/b/blobs/{digest}"), "a/b/manifests/1".into()] {
            let answer = get(at, &format!("docker.io/{path}")).await;
            assert_eq!(answer.status(), StatusCode::BAD_GATEWAY, "{to} {path}");
            let said = answer.text().await.unwrap();
            assert!(!said.contains("127.") && !said.contains("169."), "{said}");
        }
        assert_eq!(ctx.pulled(), []);
    }
    assert_eq!(count(&inside, &[]), 0);

    // One that answers from a private address leads to others, but never to a machine's metadata.
    let (there, _) = sending(&format!("http://{inner}")).await;
    let with = settings(&world.path("near"), &[format!("docker.io=http://{there}")]);
    let (_, at) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
    let path = format!("docker.io/a/b/blobs/{digest}");
    assert_eq!(get(at, &path).await.bytes().await.unwrap(), "inner");
    let (there, _) = sending("http://169.254.169.254").await;
    let with = settings(&world.path("far"), &[format!("docker.io=http://{there}")]);
    let (_, at) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
    assert_eq!(get(at, &path).await.status(), StatusCode::BAD_GATEWAY);
}

#[tokio::test]
async fn a_blobs_store_gets_no_login_and_a_ring_of_redirects_ends() {
    let world = World::new().await;
    let digest = Digest::of(b"stored");
    let (store, stored) = answering("127.0.0.1", |_| "stored".into_response()).await;
    let (there, asked) = serve("127.0.0.1", |at| {
        Router::new().fallback(move |request: Request| async move {
            if !request.headers().contains_key(header::AUTHORIZATION) {
                let basic = [(header::WWW_AUTHENTICATE, "Basic realm=\"x\"")];
                return (StatusCode::UNAUTHORIZED, basic).into_response();
            }
            let to = match request.uri().path() {
                path if path.contains("/ring/") => format!("http://{at}{path}"),
                _ => format!("http://{store}/blob"),
            };
            (StatusCode::FOUND, [(header::LOCATION, to)]).into_response()
        })
    })
    .await;
    let mut with = settings(world.dir.path(), &[format!("docker.io=http://{there}")]);
    with.logins = Some(logins(world.dir.path(), there, "hunter2"));
    with.guard = public();
    let (_, at) = world.guest_of("a", &Upstreams::open(&with).unwrap()).await;
    let answer = get(at, &format!("docker.io/a/b/blobs/{digest}")).await;
    assert_eq!(answer.bytes().await.unwrap(), "stored");
    let headers: HashMap<_, _> = stored.lock().unwrap().iter().cloned().collect();
    let seen = &headers["GET /blob"];
    assert!(
        !seen.contains_key(header::AUTHORIZATION) && !seen.contains_key(header::REFERER),
        "{seen:?}"
    );
    let ring = get(at, &format!("docker.io/a/ring/blobs/{}", Digest::of(b"r"))).await;
    assert_eq!(ring.status(), StatusCode::BAD_GATEWAY);
    assert!(count(&asked, &["/ring/"]) < 10);
}
