//! From a guest's push to the registry.

use bytes::Bytes;
use futures_util::stream;
use kiln::build::FailureKind;
use kiln::gateway::{Backing, GuestContext, Upstreams};
use kiln::publish::{Checked, PublishError, check, is_published, push};
use kiln::staging::Digest;

use crate::support::{A, ADMIN, Image, OCI_MANIFEST, World, http, ok};

/// Pushes an image into the staging area, but for the parts whose content is left out.
pub async fn stage(ctx: &GuestContext, image: &Image, without: &[&[u8]]) {
    for blob in image.blobs().filter(|blob| !without.contains(&blob.as_slice())) {
        let id = ctx.staging().begin_upload().await.unwrap();
        let body = stream::iter([Ok::<_, std::io::Error>(Bytes::copy_from_slice(blob))]);
        ctx.staging().finish(id, None, body, Digest::of(blob)).await.unwrap();
    }
    let bytes = Bytes::copy_from_slice(&image.manifest);
    ctx.staging().put_manifest(Some("result"), OCI_MANIFEST, bytes).await.unwrap();
}

#[tokio::test]
async fn a_checked_image_is_published_and_may_be_again() {
    let world = World::new().await;
    let (ctx, _) = world.guest().await;
    let image = Image::new(&["one", "two"]);
    stage(&ctx, &image, &[]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    let backing = world.registry.backing();
    assert!(!is_published(backing, "a/app", image.digest()).await.unwrap());
    push(&checked, backing, &Upstreams::none(), "a/app", "v1").await.unwrap();
    assert!(is_published(backing, "a/app", image.digest()).await.unwrap());
    assert_eq!(ok(&world.inspect(A, "a/app:v1").await), image.digest().to_string());
    push(&checked, backing, &Upstreams::none(), "a/app", "v1").await.unwrap();
    push(&checked, backing, &Upstreams::none(), "builds/of-a", "latest").await.unwrap();
    assert_eq!(ok(&world.inspect(A, "builds/of-a:latest").await), image.digest().to_string());
}

#[tokio::test]
async fn a_base_layer_is_mounted_and_never_uploaded() {
    let world = World::new().await;
    let base = Image::new(&["base"]);
    ok(&world.push(ADMIN, &base.layout(world.path("base")), "base/debian:trixie").await);
    let (ctx, at) = world.guest().await;
    http().get(format!("http://{at}/v2/base/debian/manifests/trixie")).send().await.unwrap();
    let image = Image::new(&["base", "mine"]);
    stage(&ctx, &image, &[&image.layers[0]]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    let layer = checked.blobs.iter().find(|b| b.digest == Digest::of(&image.layers[0])).unwrap();
    assert_eq!((layer.staged, layer.source.as_deref()), (false, Some("base/debian")));
    push(&checked, world.registry.backing(), &Upstreams::none(), "a/app", "v1").await.unwrap();
    assert_eq!(ok(&world.inspect(A, "a/app:v1").await), image.digest().to_string());
}

#[tokio::test]
async fn what_was_checked_survives_the_host() {
    let world = World::new().await;
    let (ctx, _) = world.guest().await;
    let image = Image::new(&["one"]);
    assert_eq!(Checked::load(ctx.staging().dir()).await.unwrap(), None);
    stage(&ctx, &image, &[]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    let dir = ctx.staging().dir().to_owned();
    drop(ctx);
    let loaded = Checked::load(&dir).await.unwrap().unwrap();
    assert_eq!(loaded, checked);
    push(&loaded, world.registry.backing(), &Upstreams::none(), "a/app", "v1").await.unwrap();
    assert!(is_published(world.registry.backing(), "a/app", image.digest()).await.unwrap());
}

#[tokio::test]
async fn only_what_the_agent_reported_and_the_guest_pushed_is_taken() {
    let world = World::new().await;
    let (ctx, _) = world.guest().await;
    let image = Image::new(&["one"]);
    let kind = |error: PublishError| error.failure_kind();
    for bad in ["", "latest", "sha256:../..", "sha256:0"] {
        let refused = check(&ctx, bad).await.unwrap_err();
        assert!(matches!(refused, PublishError::BadDigest), "{bad}");
    }
    let digest = image.digest().to_string();
    let missing = check(&ctx, &digest).await.unwrap_err();
    assert!(matches!(missing, PublishError::ManifestMissing(_)));
    assert_eq!(kind(missing), FailureKind::PushFailed);
    stage(&ctx, &image, &[&image.layers[0]]).await;
    let missing = check(&ctx, &digest).await.unwrap_err();
    assert!(matches!(missing, PublishError::BlobMissing(_)));
    stage(&ctx, &image, &[]).await;
    // A file that somebody cut on the disk.
    let path = ctx.staging().blob_path(&Digest::of(&image.layers[0]));
    std::fs::write(&path, b"x").unwrap();
    let cut = check(&ctx, &digest).await.unwrap_err();
    assert_eq!(kind(cut), FailureKind::Internal);
}

#[tokio::test]
async fn a_changed_blob_is_not_published() {
    let world = World::new().await;
    let (ctx, _) = world.guest().await;
    let image = Image::new(&["one"]);
    stage(&ctx, &image, &[]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    let path = ctx.staging().blob_path(&Digest::of(&image.layers[0]));
    std::fs::write(&path, vec![0; image.layers[0].len()]).unwrap();
    let refused = push(&checked, world.registry.backing(), &Upstreams::none(), "a/app", "v1")
        .await
        .unwrap_err();
    assert!(matches!(refused, PublishError::Refused { .. }), "{refused:?}");
    assert!(!is_published(world.registry.backing(), "a/app", image.digest()).await.unwrap());
    let bad = push(&checked, world.registry.backing(), &Upstreams::none(), "a/App", "v1")
        .await
        .unwrap_err();
    assert!(matches!(bad, PublishError::BadName(_)));
    let bad = push(&checked, world.registry.backing(), &Upstreams::none(), "a/app", "-")
        .await
        .unwrap_err();
    assert!(matches!(bad, PublishError::BadName(_)));
}

#[tokio::test]
async fn a_restart_of_the_registry_is_survived() {
    let world = World::new().await;
    let (ctx, _) = world.guest().await;
    let image = Image::new(&["one", "two"]);
    stage(&ctx, &image, &[]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    let pid = std::fs::read_to_string(world.path("registry/pid")).unwrap();
    let pid = pid.split_whitespace().next().unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    push(&checked, world.registry.backing(), &Upstreams::none(), "a/app", "v1").await.unwrap();
    assert!(is_published(world.registry.backing(), "a/app", image.digest()).await.unwrap());
}

/// The gateway itself as somebody's external registry: token login, by Docker's config file.
#[tokio::test]
async fn an_external_registry_with_tokens_works_alike() {
    let world = World::new().await;
    let (ctx, _) = world.guest().await;
    let image = Image::new(&["one", "two"]);
    stage(&ctx, &image, &[]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    let config = world.path("config.json");
    let auth = serde_json::json!({"username": "any", "password": A});
    let text = serde_json::json!({"auths": {world.gateway.to_string(): auth}}).to_string();
    std::fs::write(&config, text).unwrap();
    let url = format!("http://{}", world.gateway);
    let external = Backing::external(&url, Some(&config)).unwrap();
    assert!(!is_published(&external, "a/app", image.digest()).await.unwrap());
    push(&checked, &external, &Upstreams::none(), "a/app", "v1").await.unwrap();
    assert!(is_published(&external, "a/app", image.digest()).await.unwrap());
    let anonymous = Backing::external(&url, None).unwrap();
    let refused = push(&checked, &anonymous, &Upstreams::none(), "a/app", "v2").await.unwrap_err();
    assert_eq!(refused.failure_kind(), FailureKind::PushFailed);
}
