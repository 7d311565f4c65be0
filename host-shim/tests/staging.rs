//! The staging area: what it keeps, what it refuses, and that it forgets.
#![allow(clippy::unwrap_used)]

use std::io;

use bytes::Bytes;
use futures_util::stream;
use kiln::staging::{
    Digest, Limits, MAX_MANIFEST_BYTES, MAX_MANIFESTS, MAX_TAGS, MAX_UPLOADS, Staging,
    StagingError, UploadId,
};

const LIMITS: Limits = Limits { max_bytes: 1000, max_blobs: 3 };

fn staging() -> (tempfile::TempDir, Staging) {
    staging_with(LIMITS)
}

fn staging_with(limits: Limits) -> (tempfile::TempDir, Staging) {
    let dir = tempfile::tempdir().unwrap();
    let staging = Staging::new(dir.path().join("staging"), limits).unwrap();
    (dir, staging)
}

fn body(chunks: &[&[u8]]) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Unpin {
    let chunks: Vec<_> = chunks.iter().map(|c| Ok(Bytes::copy_from_slice(c))).collect();
    stream::iter(chunks)
}

/// Some chunks, then the connection breaks.
fn broken(chunks: &[&[u8]]) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Unpin {
    let mut chunks: Vec<_> = chunks.iter().map(|c| Ok(Bytes::copy_from_slice(c))).collect();
    chunks.push(Err(io::ErrorKind::ConnectionReset.into()));
    stream::iter(chunks)
}

async fn put(staging: &Staging, content: &[u8]) -> Result<Digest, StagingError> {
    let id = staging.begin_upload().await?;
    let digest = Digest::of(content);
    staging.finish(id, None, body(&[content]), digest).await?;
    Ok(digest)
}

fn files(staging: &Staging) -> usize {
    let count = |part| std::fs::read_dir(staging.dir().join(part)).unwrap().count();
    count("blobs/sha256") + count("uploads") + count("manifests")
}

#[tokio::test]
async fn an_upload_in_chunks_becomes_a_blob() {
    let (_dir, staging) = staging();
    let id = staging.begin_upload().await.unwrap();
    assert_eq!(staging.append(id, Some(0), body(&[b"ab", b"c"])).await.unwrap(), 3);
    assert_eq!(staging.append(id, None, body(&[b"d"])).await.unwrap(), 4);
    assert_eq!(staging.upload_offset(id).unwrap(), 4);
    let digest = Digest::of(b"abcdef");
    assert_eq!(staging.blob(&digest), None, "unfinished uploads are no blobs");
    assert_eq!(staging.finish(id, Some(4), body(&[b"ef"]), digest).await.unwrap(), 6);
    assert_eq!(staging.blob(&digest), Some(6));
    assert_eq!(std::fs::read(staging.blob_path(&digest)).unwrap(), b"abcdef");
    assert!(matches!(staging.upload_offset(id), Err(StagingError::UnknownUpload)));
    assert_eq!((files(&staging), staging.used_bytes()), (1, 6));
}

#[tokio::test]
async fn content_that_is_not_its_digest_leaves_nothing() {
    let (_dir, staging) = staging();
    let id = staging.begin_upload().await.unwrap();
    let refused = staging.finish(id, None, body(&[b"evil"]), Digest::of(b"good")).await;
    assert!(matches!(refused, Err(StagingError::DigestMismatch { .. })));
    assert_eq!((files(&staging), staging.used_bytes()), (0, 0));
}

#[tokio::test]
async fn a_chunk_must_continue_and_a_broken_one_can_be_continued() {
    let (_dir, staging) = staging();
    let id = staging.begin_upload().await.unwrap();
    let broke = staging.append(id, Some(0), broken(&[b"abc"])).await;
    assert!(matches!(broke, Err(StagingError::Body(_))));
    let wrong = staging.append(id, Some(0), body(&[b"abc"])).await;
    assert!(matches!(wrong, Err(StagingError::WrongOffset { expected: 3, actual: 0 })));
    let digest = Digest::of(b"abcd");
    staging.finish(id, Some(3), body(&[b"d"]), digest).await.unwrap();
    assert_eq!(staging.blob(&digest), Some(4));
}

#[tokio::test]
async fn an_upload_that_was_dropped_inside_a_write_has_to_begin_anew() {
    let limits = Limits { max_bytes: u64::MAX, max_blobs: 3 };
    let (_dir, staging) = staging_with(limits);
    // Far more than the file takes at once, so that the first look cannot write it all.
    let content = vec![7; 64 << 20];
    let id = staging.begin_upload().await.unwrap();
    {
        let chunks = [content.as_slice()];
        let append = staging.append(id, None, body(&chunks));
        tokio::pin!(append);
        assert!(futures_util::poll!(&mut append).is_pending());
    }
    assert!(matches!(staging.upload_offset(id), Err(StagingError::UnknownUpload)));
    let end = staging.finish(id, None, body(&[]), Digest::of(&content)).await;
    assert!(matches!(end, Err(StagingError::UnknownUpload)), "{end:?}");
    assert_eq!((files(&staging), staging.used_bytes()), (0, 0));
    let digest = put(&staging, &content).await.unwrap();
    assert_eq!(std::fs::read(staging.blob_path(&digest)).unwrap().len(), content.len());
}

#[tokio::test]
async fn the_byte_limit_holds_over_everything_and_is_given_back() {
    let (_dir, staging) = staging();
    put(&staging, &[1; 400]).await.unwrap();
    staging.put_manifest(Some("t"), "m", Bytes::from_static(&[b' '; 100])).await.unwrap();
    let open = staging.begin_upload().await.unwrap();
    staging.append(open, None, body(&[&[2; 100]])).await.unwrap();
    assert!(matches!(put(&staging, &[3; 401]).await, Err(StagingError::TooLarge { limit: 1000 })));
    assert_eq!(staging.used_bytes(), 600, "the refused upload is given up");
    put(&staging, &[3; 400]).await.unwrap();
    let full = staging.put_manifest(None, "m", Bytes::from_static(b"{}")).await;
    assert!(matches!(full, Err(StagingError::TooLarge { .. })));
    staging.cancel_upload(open).await.unwrap();
    assert_eq!(staging.used_bytes(), 900);
    staging.put_manifest(None, "m", Bytes::from_static(b"{}")).await.unwrap();
}

#[tokio::test]
async fn the_same_content_counts_once() {
    let (_dir, staging) = staging();
    for _ in 0..5 {
        put(&staging, &[1; 400]).await.unwrap();
        staging.put_manifest(Some("t"), "m", Bytes::from_static(b"{}")).await.unwrap();
    }
    assert_eq!((files(&staging), staging.used_bytes()), (2, 402));
}

#[tokio::test]
async fn blobs_uploads_manifests_and_tags_are_counted() {
    let (_dir, staging) = staging();
    for n in 0..3 {
        put(&staging, &[n]).await.unwrap();
    }
    assert!(matches!(put(&staging, &[3]).await, Err(StagingError::TooMany { limit: 3, .. })));
    assert_eq!(files(&staging), 3);
    put(&staging, &[2]).await.unwrap();

    let mut ids = vec![];
    for _ in 0..MAX_UPLOADS {
        ids.push(staging.begin_upload().await.unwrap());
    }
    assert!(matches!(staging.begin_upload().await, Err(StagingError::TooMany { .. })));
    staging.cancel_upload(ids[0]).await.unwrap();
    staging.begin_upload().await.unwrap();

    let manifest = |n: usize| Bytes::from(n.to_string());
    for n in 0..MAX_MANIFESTS {
        staging.put_manifest(None, "m", manifest(n)).await.unwrap();
    }
    let over = staging.put_manifest(None, "m", manifest(MAX_MANIFESTS)).await;
    assert!(matches!(over, Err(StagingError::TooMany { what: "manifests", .. })));
    for n in 0..MAX_TAGS {
        staging.put_manifest(Some(&n.to_string()), "m", manifest(0)).await.unwrap();
    }
    let over = staging.put_manifest(Some("over"), "m", manifest(0)).await;
    assert!(matches!(over, Err(StagingError::TooMany { what: "tags", .. })));
    staging.put_manifest(Some("0"), "m", manifest(1)).await.unwrap();
    assert_eq!(staging.tag("0"), Some(Digest::of(b"1")));
}

#[tokio::test]
async fn a_manifest_has_a_size_limit_and_comes_back_byte_for_byte() {
    let limits = Limits { max_bytes: u64::MAX, max_blobs: 1 };
    let (_dir, staging) = staging_with(limits);
    let bytes = |n| Bytes::from(vec![b' '; n]);
    let digest = staging.put_manifest(None, "type", bytes(MAX_MANIFEST_BYTES)).await.unwrap();
    let over = staging.put_manifest(None, "type", bytes(MAX_MANIFEST_BYTES + 1)).await;
    assert!(matches!(over, Err(StagingError::ManifestTooLarge)));
    let staged = staging.manifest(&digest).await.unwrap().unwrap();
    assert_eq!((staged.media_type.as_str(), staged.bytes.len()), ("type", MAX_MANIFEST_BYTES));
    assert!(staging.manifest(&Digest::of(b"x")).await.unwrap().is_none());
}

#[tokio::test]
async fn two_requests_do_not_write_to_one_upload() {
    let (_dir, staging) = staging();
    let id = staging.begin_upload().await.unwrap();
    let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<Bytes>>(1);
    let slow = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let append = staging.append(id, None, slow);
    tokio::pin!(append);
    assert!(futures_util::poll!(&mut append).is_pending());
    assert!(matches!(staging.append(id, None, body(&[b"x"])).await, Err(StagingError::Busy)));
    assert!(matches!(staging.cancel_upload(id).await, Err(StagingError::Busy)));
    drop(sender);
    assert_eq!(append.await.unwrap(), 0);
}

#[tokio::test]
async fn after_the_removal_nothing_is_left_and_nothing_is_taken() {
    let (_dir, staging) = staging();
    let digest = put(&staging, b"blob").await.unwrap();
    let open = staging.begin_upload().await.unwrap();
    staging.remove().await.unwrap();
    assert!(!staging.dir().exists());
    assert_eq!(staging.blob(&digest), None);
    assert!(matches!(staging.begin_upload().await, Err(StagingError::Removed)));
    let late = staging.append(open, None, body(&[b"x"])).await;
    assert!(matches!(late, Err(StagingError::UnknownUpload)));
    let late = staging.put_manifest(None, "m", Bytes::from_static(b"{}")).await;
    assert!(matches!(late, Err(StagingError::Removed)));
    staging.remove().await.unwrap();
}

#[test]
fn only_ids_of_the_right_form_name_uploads() {
    for bad in ["", "..", "../../etc/passwd", "a/b", "x"] {
        assert!(UploadId::parse(bad).is_none(), "{bad:?}");
    }
}
