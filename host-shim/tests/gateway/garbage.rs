//! What is removed from the real registry while it runs, and what is not.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Method, StatusCode, header};
use kiln::build::{Build, BuildId, ImageName, NetworkMode, Request, Status, Tenant};
use kiln::events::payload;
use kiln::gateway::gate::{GRACE, Gate};
use kiln::gateway::path::{Name, Reference, Route};
use kiln::gateway::{Garbage, GuestContext, Upstreams};
use kiln::kept::Kept;
use kiln::metrics::Metrics;
use kiln::publish::{Checked, check, push};
use kiln::retention::{Collected, Keep, Retention, Room};
use kiln::sources::Sources;
use kiln::staging::{Digest, Limits, Staging};
use kiln::store::Store;
use kiln::store::sqlite::SqliteStore;
use tokio_util::sync::CancellationToken;

use crate::clients::token;
use crate::publish::stage;
use crate::support::{A, A_READER, ADMIN, Image, OCI_MANIFEST, World, http, ok};

const DAYS: i64 = 24 * 60 * 60 * 1000;
const NOW: i64 = 1000 * DAYS;

/// A push that the gate remembers nothing of, as builds publish.
async fn publish(world: &World, image: &Image, repository: &str) {
    let checked = checked(world, image).await;
    push(&checked, world.registry.backing(), &Upstreams::none(), repository, "v1").await.unwrap();
}

/// In a staging area of its own.
async fn checked(world: &World, image: &Image) -> Checked {
    let limits = Limits { max_bytes: 1 << 20, max_blobs: 16 };
    let staging = world.path(&format!("staging-{}", image.digest().hex()));
    let staging = Arc::new(Staging::new(staging, limits).unwrap());
    let (build, tenant) = (BuildId::new("b1").unwrap(), Tenant::new("a").unwrap());
    let (backing, none) = (world.registry.backing().clone(), Upstreams::none());
    let ctx = GuestContext::new(build, tenant, staging, backing, none);
    stage(&ctx, image, &[]).await;
    check(&ctx, &image.digest().to_string()).await.unwrap()
}

/// What a path of the registry answers.
async fn get(world: &World, route: Route) -> (StatusCode, Vec<u8>) {
    let backing = world.registry.backing();
    let accept = OCI_MANIFEST.parse().unwrap();
    let answer = backing.request(Method::GET, route).header(header::ACCEPT, accept).send().await;
    let answer = answer.unwrap();
    (answer.status(), answer.bytes().await.unwrap().to_vec())
}

/// Whether all of the image is there, byte for byte.
async fn is_whole(world: &World, image: &Image, repository: &str) -> bool {
    let name = Name::parse(repository).unwrap();
    let route = Route::Manifest(name.clone(), Reference::Digest(image.digest()));
    if get(world, route).await != (StatusCode::OK, image.manifest.clone()) {
        return false;
    }
    for blob in image.blobs() {
        let route = Route::Blob(name.clone(), Digest::of(blob));
        if get(world, route).await != (StatusCode::OK, blob.clone()) {
            return false;
        }
    }
    true
}

async fn delete(world: &World, image: &Image, repository: &str) {
    let name = Name::parse(repository).unwrap();
    let route = Route::Manifest(name, Reference::Digest(image.digest()));
    let _change = world.registry.backing().change().await;
    let answer = world.registry.backing().request(Method::DELETE, route).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
}

fn storage(world: &World) -> PathBuf {
    world.path("registry/storage/docker/registry/v2")
}

fn blob(world: &World, content: &[u8]) -> PathBuf {
    let hex = Digest::of(content).hex();
    storage(world).join("blobs/sha256").join(&hex[..2]).join(hex)
}

/// Makes blobs older than the grace.
fn age<'a>(world: &World, blobs: impl IntoIterator<Item = &'a Vec<u8>>) {
    for content in blobs {
        let file = std::fs::File::open(blob(world, content).join("data")).unwrap();
        file.set_modified(SystemTime::now() - GRACE - Duration::from_secs(1)).unwrap();
    }
}

fn with_manifest(image: &Image) -> impl Iterator<Item = &Vec<u8>> {
    image.blobs().chain([&image.manifest])
}

async fn sweep(world: &World) -> (u64, u64) {
    let swept = world.registry.garbage().sweep(&HashSet::new()).await.unwrap();
    (swept.blobs, swept.bytes)
}

#[tokio::test]
async fn a_deleted_image_loses_what_no_other_has_after_the_grace() {
    let world = World::new().await;
    assert_eq!(sweep(&world).await, (0, 0), "of nothing");
    let (mine, other) = (Image::new(&["mine", "shared"]), Image::new(&["shared", "other"]));
    publish(&world, &mine, "a/app").await;
    publish(&world, &other, "a/other").await;
    age(&world, with_manifest(&mine).chain(with_manifest(&other)));
    assert_eq!(sweep(&world).await, (0, 0));
    delete(&world, &mine, "a/app").await;
    // Those that are just as old as they may be.
    let own = [&mine.layers[0], &mine.config, &mine.manifest];
    for content in own {
        let file = std::fs::File::open(blob(&world, content).join("data")).unwrap();
        file.set_modified(SystemTime::now() - GRACE + Duration::from_secs(60)).unwrap();
    }
    assert_eq!(sweep(&world).await, (0, 0), "before the grace is over");
    age(&world, own);
    let bytes: usize = own.iter().map(|content| content.len()).sum();
    assert_eq!(sweep(&world).await, (3, bytes as u64));
    assert!(own.iter().all(|content| !blob(&world, content).exists()));
    assert!(is_whole(&world, &other, "a/other").await);
    // The registry knows at once, and takes it again.
    let route = Route::Blob(Name::parse("a/app").unwrap(), Digest::of(own[0]));
    assert_eq!(get(&world, route).await.0, StatusCode::NOT_FOUND);
    publish(&world, &mine, "a/app").await;
    assert!(is_whole(&world, &mine, "a/app").await);
}

#[tokio::test]
async fn an_untagged_image_and_a_lonely_index_stay() {
    let world = World::with_grace(Duration::ZERO).await;
    let (old, new) = (Image::new(&["old"]), Image::new(&["new"]));
    publish(&world, &old, "a/app").await;
    // The tag moves on.
    publish(&world, &new, "a/app").await;
    // docker-registry does not look into a repository without layers.
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = format!("{{\"schemaVersion\":2,\"mediaType\":\"{kind}\",\"manifests\":[]}}");
    let put = http()
        .put(format!("http://{}/v2/a/index/manifests/v1", world.gateway))
        .bearer_auth(token(&world, A, &["repository:a/index:pull,push"]).await)
        .header("Content-Type", kind)
        .body(index.clone());
    let accepted = put.send().await.unwrap().status();
    assert_eq!(accepted, StatusCode::CREATED);
    assert_eq!(sweep(&world).await, (0, 0));
    assert!(is_whole(&world, &old, "a/app").await && is_whole(&world, &new, "a/app").await);
    assert!(blob(&world, index.as_bytes()).exists());
}

#[tokio::test]
async fn what_somebody_who_may_push_has_looked_at_stays() {
    let world = World::new().await;
    let image = Image::new(&["looked at", "seen by a reader"]);
    publish(&world, &image, "a/app").await;
    delete(&world, &image, "a/app").await;
    age(&world, with_manifest(&image));
    let head = async |who: &str, of: &[u8]| {
        let url = format!("http://{}/v2/a/app/blobs/{}", world.gateway, Digest::of(of));
        let bearer = token(&world, who, &["repository:a/app:pull,push"]).await;
        let asked = http().head(url).bearer_auth(bearer);
        assert_eq!(asked.send().await.unwrap().status(), StatusCode::OK);
    };
    head(A, &image.layers[0]).await;
    head(A_READER, &image.layers[1]).await;
    assert_eq!(sweep(&world).await.0, 3);
    assert!(blob(&world, &image.layers[0]).exists() && !blob(&world, &image.layers[1]).exists());
}

#[tokio::test]
async fn what_a_build_has_pulled_stays_until_its_image_is_published() {
    let world = World::with_grace(Duration::ZERO).await;
    let (base, image) = (Image::new(&["base"]), Image::new(&["base", "own"]));
    publish(&world, &base, "base/debian").await;
    let (ctx, at) = world.guest().await;
    let pull = http().get(format!("http://{at}/v2/base/debian/manifests/v1"));
    assert_eq!(pull.send().await.unwrap().status(), StatusCode::OK);
    // Somebody deletes the base while it builds.
    delete(&world, &base, "base/debian").await;
    assert_eq!(sweep(&world).await.0, 1, "the manifest");
    stage(&ctx, &image, &[&base.layers[0]]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    let none = Upstreams::none();
    push(&checked, world.registry.backing(), &none, "a/app", "v1").await.unwrap();
    assert!(is_whole(&world, &image, "a/app").await);
}

/// Rounds, one after the other, until their end.
struct Rounds(CancellationToken, tokio::task::JoinHandle<(u64, u64)>);

impl Rounds {
    fn begin(garbage: Garbage) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let rounds = tokio::spawn(async move {
            let (mut rounds, mut blobs) = (0, 0);
            while !stopped.is_cancelled() {
                blobs += garbage.sweep(&HashSet::new()).await.unwrap().blobs;
                rounds += 1;
            }
            (rounds, blobs)
        });
        Self(stop, rounds)
    }

    async fn end(self) -> (u64, u64) {
        self.0.cancel();
        self.1.await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_that_publish_while_rounds_run_publish_whole_images() {
    // Nothing but the gate keeps what is published.
    let world = World::with_grace(Duration::ZERO).await;
    let images: Vec<_> =
        (0..3).map(|n| Image::new(&["base", "also in others", &format!("own of {n}")])).collect();
    let rounds = Rounds::begin(world.registry.garbage().clone());
    let publishers = images.iter().enumerate().map(|(n, image)| {
        let world = &world;
        async move {
            let (repository, checked) = (format!("a/app{n}"), checked(world, image).await);
            for turn in 0..8 {
                let (backing, none) = (world.registry.backing(), Upstreams::none());
                push(&checked, backing, &none, &repository, "v1").await.unwrap();
                assert!(is_whole(world, image, &repository).await, "{n} in turn {turn}");
                // What it consists of is nobody's now, unless another has it.
                delete(world, image, &repository).await;
            }
        }
    });
    futures_util::future::join_all(publishers).await;
    let (rounds, blobs) = rounds.end().await;
    assert!(rounds > 0 && blobs > 0, "{rounds} {blobs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_blobs_are_marked_manifests_neither_come_nor_go_and_all_else_does() {
    let gate = Gate::new(GRACE);
    let world = World::with_gate(gate.clone()).await;
    let (one, two) = (Image::new(&["one"]), Image::new(&["two"]));
    publish(&world, &one, "a/app").await;
    publish(&world, &two, "a/app").await;
    delete(&world, &two, "a/app").await;
    let bearer = token(&world, A, &["repository:a/app:pull,push,delete"]).await;
    let ask = |method, path: String| {
        let url = format!("http://{}/v2/a/app/{path}", world.gateway);
        http().request(method, url).bearer_auth(&bearer).header("Accept", OCI_MANIFEST)
    };
    let send = |request: reqwest::RequestBuilder| {
        tokio::spawn(async move { request.send().await.unwrap().status().as_u16() })
    };
    let closed = gate.close().await;
    let goes = send(ask(Method::DELETE, format!("manifests/{}", one.digest())));
    let comes = ask(Method::PUT, format!("manifests/{}", two.digest()));
    let comes = send(comes.header("Content-Type", OCI_MANIFEST).body(two.manifest.clone()));
    for _ in 0..20 {
        let blob = format!("blobs/{}", Digest::of(&two.layers[0]));
        assert_eq!(send(ask(Method::HEAD, blob)).await.unwrap(), 200);
        assert_eq!(send(ask(Method::POST, "blobs/uploads/".into())).await.unwrap(), 202);
        let manifest = format!("manifests/{}", one.digest());
        assert_eq!(send(ask(Method::GET, manifest)).await.unwrap(), 200);
    }
    assert!(!goes.is_finished() && !comes.is_finished());
    drop(closed);
    assert_eq!((goes.await.unwrap(), comes.await.unwrap()), (202, 201));
    assert!(is_whole(&world, &two, "a/app").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_deletes_images_while_rounds_run_deletes_no_others() {
    let world = World::with_grace(Duration::ZERO).await;
    let images: Vec<_> = (0..24).map(|n| Image::new(&[&format!("image {n}")])).collect();
    for image in &images {
        publish(&world, image, "a/many").await;
    }
    let bearer = token(&world, A, &["repository:a/many:pull,delete"]).await;
    let rounds = Rounds::begin(world.registry.garbage().clone());
    for image in images.iter().step_by(2) {
        let url = format!("http://{}/v2/a/many/manifests/{}", world.gateway, image.digest());
        let asked = http().delete(url).bearer_auth(&bearer);
        assert_eq!(asked.send().await.unwrap().status(), StatusCode::ACCEPTED);
    }
    assert!(rounds.end().await.0 > 0);
    sweep(&world).await;
    for (n, image) in images.iter().enumerate() {
        assert_eq!(is_whole(&world, image, "a/many").await, n % 2 == 1, "{n}");
        assert_eq!(with_manifest(image).any(|one| blob(&world, one).exists()), n % 2 == 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_push_old_layers_while_rounds_run_push_whole_images() {
    let world = World::new().await;
    let image = Image::new(&["old base", "old layer"]);
    let layout = image.layout(world.path("layout"));
    for turn in 0..3 {
        // All of it is there, nothing refers to it, and it is old enough to go.
        publish(&world, &image, "a/left").await;
        delete(&world, &image, "a/left").await;
        age(&world, with_manifest(&image));
        let rounds = Rounds::begin(world.registry.garbage().clone());
        ok(&world.push(A, &layout, &format!("a/app{turn}:v1")).await);
        assert!(rounds.end().await.0 > 0);
        assert!(is_whole(&world, &image, &format!("a/app{turn}")).await);
        delete(&world, &image, &format!("a/app{turn}")).await;
    }
}

#[tokio::test]
async fn links_that_the_registrys_user_planted_are_not_followed() {
    let world = World::with_grace(Duration::ZERO).await;
    let image = Image::new(&["one", "two", "three"]);
    publish(&world, &image, "builds/planted").await;
    let outside = world.path("outside");
    let file = |path: &Path| {
        std::fs::create_dir_all(path).unwrap();
        std::fs::write(path.join("data"), "not the registry's").unwrap();
        path.join("data")
    };
    let mut kept = vec![];
    // In the place of a blob's directory, of all with its first digits, and of its file.
    let dirs = [&image.layers[0], &image.layers[1], &image.layers[2]].map(|one| blob(&world, one));
    kept.push(file(&outside.join("blob")));
    std::fs::remove_dir_all(&dirs[0]).unwrap();
    symlink(outside.join("blob"), &dirs[0]).unwrap();
    let digits = dirs[1].parent().unwrap();
    kept.push(file(&outside.join("digits").join(dirs[1].file_name().unwrap())));
    std::fs::remove_dir_all(digits).unwrap();
    symlink(outside.join("digits"), digits).unwrap();
    kept.push(file(&outside.join("file")));
    std::fs::remove_file(dirs[2].join("data")).unwrap();
    symlink(outside.join("file/data"), dirs[2].join("data")).unwrap();
    // In the place of an image, and in one.
    let builds = storage(&world).join("repositories/builds");
    kept.push(file(&outside.join("repository")));
    symlink(outside.join("repository"), builds.join("elsewhere")).unwrap();
    symlink(outside.join("repository"), builds.join("planted/inside")).unwrap();

    let garbage = world.registry.garbage();
    for id in ["planted", "elsewhere"].map(|id| BuildId::new(id).unwrap()) {
        garbage.remove_nameless(&id).await.unwrap();
    }
    assert_eq!(garbage.nameless().await.unwrap(), []);
    sweep(&world).await;
    assert!(kept.iter().all(|file| file.exists()), "{kept:?}");
    // All images without a name.
    std::fs::remove_dir_all(&builds).unwrap();
    std::fs::create_dir_all(outside.join("builds/b1")).unwrap();
    symlink(outside.join("builds"), &builds).unwrap();
    assert_eq!(garbage.nameless().await.unwrap(), []);
    assert!(garbage.remove_nameless(&BuildId::new("b1").unwrap()).await.unwrap().is_none());
    assert!(outside.join("builds/b1").exists());
}

/// Retention over a store and a registry.
struct Bench {
    world: World,
    store: Arc<dyn Store>,
}

impl Bench {
    async fn new() -> Self {
        let world = World::new().await;
        let store = Arc::new(SqliteStore::open(world.dir.path()).await.unwrap());
        Self { world, store }
    }

    /// A build that published an image, and has ended so many days ago if it has.
    async fn build(&self, id: &str, name: Option<&str>, image: &Image, ended: Option<i64>) {
        let image_name = name.map(|name| ImageName { name: name.into(), tag: "v1".into() });
        let tenant = Tenant::new("a").unwrap();
        let build =
            Build::queued(BuildId::new(id).unwrap(), tenant, request(image_name), NOW - 99 * DAYS);
        let first = payload::of_host(1, payload::status(Status::Queued, None));
        self.store.insert_build(&build, &[first], None, &[]).await.unwrap();
        publish(&self.world, image, &build.repository()).await;
        if let Some(days) = ended {
            // Cancelled or ready: it is finished, which is what counts.
            let last = payload::of_host(1, payload::status(Status::Cancelled, None));
            self.store.cancel_queued(&build.id, NOW - days * DAYS, &[last]).await.unwrap();
        }
    }

    async fn collect(&self, keep: Keep) -> Collected {
        let (store, kept) = (Arc::clone(&self.store), Kept::new(1));
        let sources = Sources::new(self.world.path("builds"));
        let registry = Some(self.world.registry.garbage().clone());
        let room = Room { registry, ..Room::default() };
        let retention = Retention::new(store, kept, sources, Metrics::default(), keep, room);
        retention.collect(NOW).await.unwrap()
    }
}

fn request(image_name: Option<ImageName>) -> Request {
    Request {
        dockerfile: None,
        target: None,
        image_name,
        build_args: BTreeMap::new(),
        tags: BTreeMap::new(),
        base_image_digest: None,
        network: NetworkMode::None,
        allowed_domains: vec![],
        secrets: vec![],
        timeout_seconds: 1,
        memory_mb: 256,
        cpus: 1,
        disk_gb: 1,
        keep_failed_seconds: 0,
        priority: 50,
        source_digest: "sha256:00".into(),
        source_bytes: 1,
    }
}

#[tokio::test]
async fn an_image_without_a_name_goes_with_its_build_and_a_named_one_stays() {
    let bench = Bench::new().await;
    let images = ["nameless", "named", "young"].map(|content| Image::new(&["base", content]));
    bench.build("old", None, &images[0], Some(3)).await;
    bench.build("named", Some("app"), &images[1], Some(3)).await;
    bench.build("young", None, &images[2], Some(1)).await;
    let collected = bench.collect(Keep { builds_days: 2, ..Keep::default() }).await;
    // Its layer, its config and its manifest go at once: nobody else had them.
    assert_eq!((collected.builds, collected.images, collected.blobs), (2, 1, 3));
    let own = [&images[0].layers[1], &images[0].config, &images[0].manifest];
    assert_eq!(collected.blob_bytes, own.iter().map(|one| one.len() as u64).sum::<u64>());
    assert!(!storage(&bench.world).join("repositories/builds/old").exists());
    assert!(own.iter().all(|one| !blob(&bench.world, one).exists()));
    assert!(is_whole(&bench.world, &images[1], "a/app").await);
    assert!(is_whole(&bench.world, &images[2], "builds/young").await);
}

#[tokio::test]
async fn the_oldest_images_without_a_name_go_until_the_registry_is_small_enough() {
    let bench = Bench::new().await;
    let images: Vec<_> =
        ["b", "c", "a", "d", "n"].into_iter().map(|id| Image::new(&[id])).collect();
    let [first, second, zeroth, running, named] = images.as_slice() else { panic!() };
    // By their ids, whenever they ended and were published.
    bench.build("b", None, first, Some(1)).await;
    bench.build("c", None, second, Some(7)).await;
    bench.build("a", None, zeroth, Some(2)).await;
    bench.build("aa", None, running, None).await;
    bench.build("n", Some("app"), named, Some(9)).await;
    let size = |image: &Image| with_manifest(image).map(|one| one.len() as u64).sum::<u64>();
    let all: u64 = images.iter().map(size).sum();
    let keep = |images_bytes| Keep { images_bytes, ..Keep::default() };
    assert_eq!(bench.collect(keep(all)).await, Collected::default());
    let collected = bench.collect(keep(all - 1)).await;
    assert_eq!((collected.images, collected.blobs, collected.blob_bytes), (1, 3, size(zeroth)));
    assert!(is_whole(&bench.world, first, "builds/b").await);
    let collected = bench.collect(keep(all - size(zeroth) - size(first))).await;
    assert_eq!(collected.images, 1);
    assert!(!is_whole(&bench.world, first, "builds/b").await);
    assert!(is_whole(&bench.world, second, "builds/c").await);
    // What is left may not go, however small the registry should be.
    assert_eq!(bench.collect(keep(1)).await.images, 1);
    assert!(is_whole(&bench.world, running, "builds/aa").await);
    assert!(is_whole(&bench.world, named, "a/app").await);
    assert_eq!(bench.collect(keep(1)).await, Collected::default());
    ok(&bench.world.inspect(ADMIN, "a/app:v1").await);
}
