//! A disk that is kept at its mark while builds publish several times the room that there is.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::full::submit;
use super::read_only::Image;
use super::server::Home;
use super::{Client, PATIENCE, boot_with};

/// Five percent of it are free at the mark: VMs start where there is a GiB for each.
const DISK_GIB: u64 = 100;
const PERCENT: u64 = 95;
/// Free below the mark when builds begin.
const ROOM: u64 = 96 << 20;
/// What each image takes.
const LAYER: usize = 4 << 20;
const WAVES: usize = 6;
/// Builds of a wave.
const BUILDS: usize = 12;

/// What is used of a file system, and what may be, as `df` counts.
fn used_and_all(dir: &Path) -> (u64, u64) {
    let stat = rustix::fs::statvfs(dir).unwrap();
    let used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
    (used, used + stat.f_bavail * stat.f_frsize)
}

fn excess(dir: &Path) -> u64 {
    let (used, all) = used_and_all(dir);
    used.saturating_sub(all / 100 * PERCENT)
}

impl Client {
    /// Whether a build's image is there, every byte of it.
    async fn has_image(&self, build: &Value) -> bool {
        let (id, digest) = (build["id"].as_str().unwrap(), build["image_digest"].as_str().unwrap());
        let at = format!("http://{}/v2", *self.address.borrow());
        let scope = format!("{at}/token?service=kiln&scope=repository:builds/{id}:pull");
        let token = self.http.get(scope).basic_auth("any", Some(&self.token)).send().await.unwrap();
        let token: Value = token.json().await.unwrap();
        let get = async |path: String| {
            let asked = self.http.get(path).bearer_auth(token["token"].as_str().unwrap());
            let answer = asked.send().await.unwrap();
            answer.status().is_success().then_some(answer)?.bytes().await.ok()
        };
        let Some(manifest) = get(format!("{at}/builds/{id}/manifests/{digest}")).await else {
            return false;
        };
        let parsed: Value = serde_json::from_slice(&manifest).unwrap();
        let layers = parsed["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 1);
        for blob in layers.iter().chain([&parsed["config"]]) {
            let digest = blob["digest"].as_str().unwrap();
            let content = get(format!("{at}/builds/{id}/blobs/{digest}")).await;
            let sum = content.map(|bytes| format!("sha256:{}", hex::encode(Sha256::digest(bytes))));
            if sum.as_deref() != Some(digest) {
                return false;
            }
        }
        true
    }
}

#[test]
fn a_disk_is_kept_at_its_mark_and_no_build_fails_for_it() {
    let home = Arc::new(Home::new());
    let _image = Image::make(home.dir.path(), home.data(), DISK_GIB);
    let data = home.data();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let often = [("KILN_TEST_GC_LOOK_MS", "50")];
    let server = home.serve_with(&often, &["--gc-disk-percent", &PERCENT.to_string()]);
    let (_told, address) = watch::channel(server.address.clone().expect("it starts"));
    let client = Client { http: reqwest::Client::new(), address, token: home.token() };
    let (used, all) = used_and_all(&data);
    let ballast = File::create(data.join("ballast")).unwrap();
    let length = all / 100 * PERCENT - used - ROOM;
    rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), 0, length).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let down = CancellationToken::new();
        let agents = tokio::spawn(boot_with(Arc::clone(&home), down.clone(), LAYER));
        let mut builds = vec![];
        for wave in 0..WAVES {
            let submitted = join_all((0..BUILDS).map(|_| submit(&client))).await;
            let ended = submitted.into_iter().map(|(status, build)| {
                assert_eq!(status, 202, "{build}");
                let client = &client;
                async move { client.end(build["id"].as_str().unwrap()).await }
            });
            let ended = join_all(ended).await;
            for build in &ended {
                assert_eq!(build["status"], "ready", "wave {wave}: {build}");
            }
            builds.extend(ended);
            // The server looks, and does what it must.
            let begun = tokio::time::Instant::now();
            while excess(&data) > 0 {
                assert!(begun.elapsed() < PATIENCE, "wave {wave}: it stays above its mark");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        builds.sort_by_key(|build| build["id"].as_str().unwrap().to_owned());
        let mut there = vec![];
        for build in &builds {
            there.push(client.has_image(build).await);
        }
        let whole = there.iter().filter(|there| **there).count();
        // The oldest are gone, the newest are there, and in between they went in their order.
        let first = there.iter().position(|there| *there).unwrap();
        assert_eq!(there.len() - first, whole, "{there:?}");
        assert!(whole >= BUILDS / 2 && (whole * LAYER) as u64 <= ROOM, "{there:?}");
        down.cancel();
        agents.await.unwrap();
    });
    server.stop();
    assert_eq!(home.processes(), Vec::<PathBuf>::new());
    assert!(home.log().contains("fuller than --gc-disk-percent"));
}
