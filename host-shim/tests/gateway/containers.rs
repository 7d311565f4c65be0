//! podman, buildah and skopeo, as their users have them: log in, push, list, pull, delete. Of an image that is there no blob is sent.

use std::path::PathBuf;
use std::process::{Command, Output};

use http::Method;

use crate::counter::{Counter, of_blobs};
use crate::support::{A, A_READER, B, Image, World, fails, ok};

/// A user's programs: their files are in a home of the test's own.
struct User {
    home: PathBuf,
    server: String,
}

impl User {
    fn new(world: &World, name: &str) -> Self {
        let home = world.path(name);
        let config = home.join(".config/containers");
        std::fs::create_dir_all(&config).unwrap();
        // Debian's packages recommend these files, and do not need them.
        let policy = r#"{"default": [{"type": "insecureAcceptAnything"}]}"#;
        std::fs::write(config.join("policy.json"), policy).unwrap();
        std::fs::write(config.join("registries.conf"), "").unwrap();
        Self { home, server: world.gateway.to_string() }
    }

    /// Runs a program with the words of a line, apart from the test's own runtime, which serves it.
    async fn run(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        // Both of them keep images; the driver needs nothing of the kernel.
        if line.starts_with("podman") || line.starts_with("buildah") {
            command.args(["--storage-driver", "vfs"]);
            command.arg("--root").arg(self.home.join("storage"));
            command.arg("--runroot").arg(self.home.join("run"));
        }
        command.args(words).env("HOME", &self.home).env("XDG_RUNTIME_DIR", self.home.join("run"));
        command.env("REGISTRY_AUTH_FILE", self.home.join("auth.json"));
        // podman and buildah name an image by its layout's path, of which they take lower case only.
        command.current_dir(self.home.parent().unwrap());
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    async fn login(&self, program: &str, token: &str) -> Output {
        let server = &self.server;
        self.run(&format!("{program} login --tls-verify=false -u any -p {token} {server}")).await
    }
}

/// An image whose layers do not pack to nothing, in a layout `layout`.
fn image(world: &World) -> Image {
    let content: [String; 3] = std::array::from_fn(|_| {
        (0..1000).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect()
    });
    let image = Image::new(&content.each_ref().map(String::as_str));
    image.layout(world.path("layout"));
    image
}

/// That the last push uploaded blobs, and how many bytes of them.
fn sent(counter: &Counter) -> usize {
    let seen = counter.take();
    assert!(seen.iter().any(|seen| seen.method == Method::PATCH), "{seen:?}");
    of_blobs(&seen)
}

/// That the last push uploaded nothing: it asked for the blobs, and wrote the manifest.
fn sent_nothing(counter: &Counter) {
    let seen = counter.take();
    assert_eq!(of_blobs(&seen), 0, "{seen:?}");
    let uploads = seen.iter().filter(|seen| seen.path.contains("/uploads/"));
    assert_eq!(uploads.count(), 0, "{seen:?}");
    let asked = seen.iter().filter(|s| s.method == Method::HEAD && s.path.contains("/blobs/"));
    assert!(asked.count() >= 4, "three layers and the configuration: {seen:?}");
    let put = seen.iter().filter(|s| s.method == Method::PUT && s.path.contains("/manifests/"));
    assert!(put.map(|put| put.bytes).sum::<usize>() > 0, "{seen:?}");
}

#[tokio::test]
async fn skopeo_sends_no_blob_twice() {
    let (world, counter) = World::counted().await;
    let user = User::new(&world, "skopeo");
    let image = image(&world);
    ok(&user.login("skopeo", A).await);
    let server = &user.server;
    let push = |name: &str| {
        format!("skopeo copy --dest-tls-verify=false oci:layout:image docker://{server}/{name}")
    };
    counter.take();
    ok(&user.run(&push("a/app:v1")).await);
    assert_eq!(sent(&counter), image.blobs().map(Vec::len).sum::<usize>());
    for again in ["a/app:v1", "a/app:v2"] {
        ok(&user.run(&push(again)).await);
        sent_nothing(&counter);
    }
}

#[tokio::test]
async fn podman_logs_in_pushes_lists_and_pulls() {
    logs_in_pushes_and_pulls("podman").await;
}

#[tokio::test]
async fn buildah_logs_in_pushes_and_pulls() {
    logs_in_pushes_and_pulls("buildah").await;
}

async fn logs_in_pushes_and_pulls(program: &str) {
    let (world, counter) = World::counted().await;
    let user = User::new(&world, "user");
    let image = image(&world);
    let server = &user.server;
    fails(&user.login(program, "kiln_wrong").await);
    ok(&user.login(program, A).await);
    ok(&user.run(&format!("{program} pull oci:layout:image")).await);
    let id = image_id(&user, program).await;

    counter.take();
    let push =
        |name: &str| format!("{program} push --tls-verify=false {id} docker://{server}/{name}");
    ok(&user.run(&push("a/app:v1")).await);
    // It packs the layers itself: how large they become is its own business.
    assert!(sent(&counter) > image.layers.iter().map(Vec::len).sum::<usize>() / 2);
    for again in ["a/app:v1", "a/app:v2"] {
        ok(&user.run(&push(again)).await);
        sent_nothing(&counter);
    }
    fails(&user.run(&push("b/app:v1")).await);

    // Only podman lists what a registry has.
    if program == "podman" {
        let list = format!("podman search --list-tags --tls-verify=false {server}/a/app");
        let listed = ok(&user.run(&list).await);
        assert!(listed.contains("v1") && listed.contains("v2"), "{listed}");
    }

    // Somebody else of the tenant, with nothing of his own.
    let reader = User::new(&world, "reader");
    let pull = format!("{program} pull --tls-verify=false {server}/a/app:v1");
    fails(&reader.run(&pull).await);
    ok(&reader.login(program, A_READER).await);
    ok(&reader.run(&pull).await);
    assert_eq!(image_id(&reader, program).await, id);
    fails(&reader.run(&format!("{program} push --tls-verify=false {id} {server}/a/app:v3")).await);
    // buildah asks for nothing that it has.
    ok(&reader.run(&format!("{program} rmi --all --force")).await);
    ok(&reader.run(&format!("{program} logout {server}")).await);
    fails(&reader.run(&pull).await);
    ok(&reader.login(program, B).await);
    fails(&reader.run(&pull).await);

    // Neither deletes from a registry; skopeo does, with the same login.
    let delete = format!("skopeo delete --tls-verify=false docker://{server}/a/app:v1");
    fails(&reader.run(&delete).await);
    ok(&user.run(&delete).await);
    fails(&user.run(&format!("{program} pull --tls-verify=false {server}/a/app:v1")).await);
}

/// Of the one image that the user has; it is the digest of its configuration.
async fn image_id(user: &User, program: &str) -> String {
    let ids = ok(&user.run(&format!("{program} images --no-trunc --quiet")).await);
    assert_eq!(ids.lines().count(), 1, "{ids}");
    ids.trim_start_matches("sha256:").to_owned()
}
