//! Archives into a root that is full of links, and out of it.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

use super::*;

/// A root with a secret beside it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("root/srv/real")).unwrap();
        fs::write(dir.path().join("secret"), "secret").unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        let place = Self { dir };
        for (link, target) in [
            ("abs", "/srv/real"),
            ("up", "../../../../../srv/real"),
            ("out", "../outside"),
            ("srv/leads", "/"),
        ] {
            symlink(target, place.root().join(link)).unwrap();
        }
        place
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("root")
    }

    fn spot(&self, path: &str) -> Spot {
        let meta = fs::metadata(self.root()).unwrap();
        Spot::below(&self.root(), path, Some((meta.uid(), meta.gid())))
    }

    /// Unpacks one file of that name at the path.
    async fn put(&self, path: &str, name: &str) -> Ended {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_mode(0o644);
        header.set_size(3);
        header.set_cksum();
        let mut tar = tar::Builder::new(vec![]);
        tar.append(&header, &b"new"[..]).unwrap();
        let archive = tar.into_inner().unwrap();
        let (mut there, here) = duplex(1 << 20);
        let (host, mut said) = mpsc::channel(2);
        for message in [HostToSession::Input(archive), HostToSession::InputEnd] {
            let frame = kiln_protocol::frame::encode(&message).unwrap();
            there.write_all(&frame).await.unwrap();
        }
        let frames = FrameReader::new(here);
        let all = async { while said.recv().await.is_some() {} };
        let work = async move { inward(self.spot(path), frames, &host).await.unwrap() };
        tokio::join!(work, all).0
    }

    async fn get(&self, path: &str) -> (Ended, Vec<u8>) {
        let (_there, here): (DuplexStream, _) = duplex(1 << 20);
        let (host, mut said) = mpsc::channel(2);
        let work =
            async move { out(self.spot(path), FrameReader::new(here), &host).await.unwrap() };
        let all = async {
            let mut all = vec![];
            while let Some(message) = said.recv().await {
                if let SessionToHost::Output { bytes, .. } = message {
                    all.extend(bytes);
                }
            }
            all
        };
        tokio::join!(work, all)
    }
}

fn exited(ended: &Ended) -> bool {
    *ended == Ended::Exited { code: 0 }
}

#[tokio::test]
async fn links_of_the_container_are_resolved_within_its_root() {
    let place = Place::new();
    let real = place.root().join("srv/real");
    for (path, name) in
        [("/abs", "a"), ("/up", "b"), ("/srv/leads/srv/real", "c"), ("/../../abs", "d")]
    {
        let ended = place.put(path, name).await;
        assert!(exited(&ended), "{path}: {ended:?}");
        assert_eq!(fs::read(real.join(name)).unwrap(), b"new", "{path}");
    }
    // `/../outside` of the container is its `/outside`, which is not there.
    for path in ["/out", "/out/x", "/../outside"] {
        let ended = place.put(path, "x").await;
        let fine = exited(&ended) && !path.ends_with("/x") && path != "/out";
        let missing = matches!(ended, Ended::Failed { cause: Cause::NotFound, .. });
        assert!(fine || missing || path == "/out", "{path}: {ended:?}");
    }
    assert_eq!(fs::read_dir(place.dir.path().join("outside")).unwrap().count(), 0);
    for path in ["/abs/a", "/up/../real/a", "/srv/leads/abs/a"] {
        let (ended, archive) = place.get(path).await;
        assert!(exited(&ended) && !archive.is_empty(), "{path}: {ended:?}");
    }
    for path in ["/../secret", "/out/../secret", "/out/", "/../../secret"] {
        let (ended, archive) = place.get(path).await;
        let missing = matches!(ended, Ended::Failed { cause: Cause::NotFound, .. });
        assert!(missing && archive.is_empty(), "{path}: {ended:?}");
    }
}

#[tokio::test]
async fn hostile_names_stay_below_the_path() {
    let place = Place::new();
    for name in ["../x", "/x", "leads/x", "a/../../x"] {
        let ended = place.put("/srv", name).await;
        assert!(matches!(ended, Ended::Failed { cause: Cause::Invalid, .. }), "{name}: {ended:?}");
    }
    assert!(!Path::new("/x").exists() && !place.root().join("x").exists());
    let ended = place.put("/srv", "real").await;
    assert!(matches!(ended, Ended::Failed { cause: Cause::Invalid, .. }), "{ended:?}");
    assert!(place.root().join("srv/real").is_dir(), "a directory is not replaced");
    assert!(exited(&place.put("/srv/leads", "x").await), "the link itself is followed");
    assert_eq!(fs::read(place.root().join("x")).unwrap(), b"new");
}
