//! Whether an image that is about to be published holds one of its build's secrets.
//!
//! Layers that the build pulled are not the build's; those that it pushed are read as they unpack, once, with the
//! names of their entries; the manifest and the configuration as text and string by string. What is packed once more
//! inside a layer is not unpacked.
//!
//! ```text
//! blob ─▶ unpacked ─▶ Tap: reads, searches ─▶ walk: where a file ends
//!                      │ hits                   │
//!                      └────────▶ Evidence of this file ─▶ Leak
//! ```

mod bounds;
#[cfg(test)]
mod fixture;
mod gate;
mod tap;
mod walk;

use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::time::Duration;

use serde_json::Value;

pub use self::bounds::Bounds;
use self::bounds::Stored;
use self::gate::Evidence;
pub use self::gate::Gate;
use self::tap::Tap;

/// How much is read at once.
const CHUNK: usize = 64 * 1024;

/// A secret that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leak {
    /// Which one.
    pub secret: String,
    /// The entry of the layer, where one was being read.
    pub path: Option<String>,
}

/// Why a layer cannot be searched.
#[derive(Debug, thiserror::Error)]
pub enum LeakError {
    /// The image unpacks to more than the build's disk holds.
    #[error("the image unpacks to more than {0} bytes, which the build's disk does not hold")]
    TooLarge(u64),
    /// There is no more time for the image.
    #[error("the search took longer than {} s", .0.as_secs())]
    Late(Duration),
    /// Somebody asked for the search's end.
    #[error("the search was stopped")]
    Stopped,
    /// It does not unpack.
    #[error("it does not unpack")]
    Damaged(#[from] io::Error),
}

/// The first secret in a layer's blob. It blocks.
pub fn in_layer(gate: &Gate, blob: File, bounds: &Bounds) -> Result<Option<Leak>, LeakError> {
    let searched = search(gate, blob, bounds);
    match bounds.ended() {
        Some(ended) => Err(ended),
        None => Ok(searched?),
    }
}

fn search(gate: &Gate, blob: File, bounds: &Bounds) -> io::Result<Option<Leak>> {
    let mut tap = Tap::new(unpacked(blob, bounds)?, gate, bounds);
    if let Some(leak) = walk::entries(&mut tap)? {
        return Ok(Some(leak));
    }
    // What is no archive, or behind its end.
    tap.skip(u64::MAX)?;
    Ok(tap.passed().map(|secret| Leak { secret: secret.to_owned(), path: None }))
}

/// The first secret in a JSON document, which is one text.
pub fn in_json(gate: &Gate, bytes: &[u8]) -> Option<Leak> {
    let mut evidence = Evidence::new(gate);
    evidence.text(bytes);
    if evidence.leaked().is_none()
        && let Ok(value) = serde_json::from_slice::<Value>(bytes)
    {
        in_value(&mut evidence, &value);
    }
    evidence.leaked().map(|secret| Leak { secret: secret.to_owned(), path: None })
}

fn in_value(evidence: &mut Evidence<'_>, value: &Value) {
    match value {
        Value::String(text) => evidence.text(text.as_bytes()),
        Value::Array(list) => list.iter().for_each(|value| in_value(evidence, value)),
        Value::Object(map) => {
            for (key, value) in map {
                evidence.text(key.as_bytes());
                in_value(evidence, value);
            }
        }
        _ => {}
    }
}

/// By its first bytes, whatever its media type says.
fn unpacked(mut blob: File, bounds: &Bounds) -> io::Result<Box<dyn Read + '_>> {
    let mut magic = [0; 4];
    let read = (&blob).take(4).read(&mut magic)?;
    blob.rewind()?;
    let blob = BufReader::with_capacity(CHUNK, Stored { file: blob, bounds });
    Ok(match &magic[..read] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(blob)?),
        _ => Box::new(blob),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;
    use tokio_util::sync::CancellationToken;

    use super::fixture::{archive, bounds, file, gzip};
    use super::*;
    use crate::secrets::Masker;

    const SECRET: &[u8] = b"hunter2/canary+value";

    fn masker() -> Gate {
        let mut masker = Masker::default();
        masker.add("npm", SECRET).unwrap();
        masker.into_gate()
    }

    fn leak(blob: &[u8]) -> Option<Leak> {
        in_layer(&masker(), file(blob), &bounds(1 << 30)).unwrap()
    }

    #[expect(clippy::unnecessary_wraps, reason = "stands for what may be missing")]
    fn at(path: &str) -> Option<Leak> {
        Some(Leak { secret: "npm".into(), path: Some(path.into()) })
    }

    #[test]
    fn a_secret_in_a_file_is_found_however_the_layer_is_packed() {
        let large = [vec![b'x'; 200_000], SECRET.to_vec(), vec![b'y'; 100_000]].concat();
        let tar = archive(&[("etc/clean", b"nothing"), ("etc/npmrc", &large), ("z", b"")]);
        let halves = tar.split_at(1000);
        let members = [gzip(halves.0), gzip(halves.1)].concat();
        for blob in [tar.clone(), gzip(&tar), members, zstd::encode_all(&tar[..], 1).unwrap()] {
            assert_eq!(leak(&blob), at("etc/npmrc"));
        }
        let b64 = base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            [b"x", SECRET].concat(),
        );
        assert_eq!(leak(&archive(&[("a", b64.as_bytes())])), at("a"));
        assert_eq!(leak(&archive(&[("hunter2/canary+value", b"")])), at("hunter2/canary+value"));
        assert_eq!(leak(&gzip(&archive(&[("a", b"hunter2/canary")]))), None);
    }

    /// With signs that URLs do not have, and digits of base64 in which the alphabets differ wherever it stands.
    const EVERY: &[u8] = b"hunter2/canary+value>>>???~~~";

    /// As other programs write it: bytes in one notation or the other, URLs with what they leave.
    fn forms() -> Vec<(&'static str, Vec<u8>)> {
        use base64::Engine as _;
        use base64::engine::general_purpose::{STANDARD, URL_SAFE, URL_SAFE_NO_PAD};
        let hex = |digit: fn(&u8) -> String| EVERY.iter().map(digit).collect::<String>();
        let mut forms = vec![
            ("raw", EVERY.to_vec()),
            ("hex", hex(|byte| format!("{byte:02x}")).into()),
            ("HEX", hex(|byte| format!("{byte:02X}")).into()),
            ("RFC 3986", b"hunter2%2Fcanary%2Bvalue%3E%3E%3E%3F%3F%3F~~~".to_vec()),
            ("rfc 3986", b"hunter2%2fcanary%2bvalue%3e%3e%3e%3f%3f%3f~~~".to_vec()),
            ("forms", b"hunter2%2Fcanary%2Bvalue%3E%3E%3E%3F%3F%3F%7E%7E%7E".to_vec()),
        ];
        for before in [&b""[..], b"x", b"xy"] {
            let whole = [before, EVERY, b"."].concat();
            let (standard, url) = (STANDARD.encode(&whole), URL_SAFE.encode(&whole));
            assert_ne!(standard, url);
            let bare = URL_SAFE_NO_PAD.encode(&whole);
            forms.extend(
                [("base64", standard), ("base64url", url), ("unpadded", bare)]
                    .map(|(name, text)| (name, text.into_bytes())),
            );
        }
        forms
    }

    /// Each of them, in each kind of layer, whole in what is read at once and cut at its ends and in the middle.
    #[test]
    fn every_form_is_found_in_every_kind_of_layer() {
        type Pack = fn(&[u8]) -> Vec<u8>;
        let mut masker = Masker::default();
        masker.add("npm", EVERY).unwrap();
        let gate = masker.into_gate();
        let packings: [Pack; 3] = [<[u8]>::to_vec, gzip, |tar| zstd::encode_all(tar, 1).unwrap()];
        for (name, form) in forms() {
            for read in [0, 1, form.len() / 2, form.len() - 1] {
                // Behind two headers of 512 bytes.
                let before = vec![b'='; CHUNK - 2 * 512 - read];
                let tar = |form: &[u8]| {
                    let content = [&before[..], form, &[b'='; 100]].concat();
                    archive(&[("clean", b""), ("etc/npmrc", &content)])
                };
                let mut other = form.clone();
                other[form.len() / 2] = b'=';
                for pack in packings {
                    let search =
                        |tar: Vec<u8>| in_layer(&gate, file(&pack(&tar)), &bounds(1 << 30));
                    assert_eq!(search(tar(&form)).unwrap(), at("etc/npmrc"), "{name}, {read}");
                    assert_eq!(search(tar(&other)).unwrap(), None, "{name}, {read}");
                }
            }
        }
    }

    /// At every place in the chunks that are read.
    #[test]
    fn a_secret_is_found_across_reads() {
        for shift in 0..600 {
            let content = [vec![b'x'; 65_000 + shift], SECRET.to_vec()].concat();
            assert_eq!(leak(&archive(&[("a", &content)])), at("a"), "{shift}");
        }
    }

    #[test]
    fn what_is_no_archive_or_behind_one_is_searched_too() {
        let unnamed = Some(Leak { secret: "npm".into(), path: None });
        assert_eq!(leak(SECRET), unnamed);
        assert_eq!(leak(&[&archive(&[("a", b"x")]), &[b'z'; 700][..], SECRET].concat()), unnamed);
        assert_eq!(leak(b""), None);
    }

    #[test]
    fn a_layer_that_never_ends_is_refused_and_a_broken_one_told() {
        let zeros = gzip(&vec![0; 5 << 20]);
        let searched = in_layer(&masker(), file(&zeros), &bounds(1 << 20));
        assert!(matches!(searched, Err(LeakError::TooLarge(1_048_576))), "{searched:?}");
        // Whoever reads may hide the error, and the end may come right behind it.
        let last = archive(&[("a", &[b'q'; 3000])]);
        for limit in (0..last.len() as u64).step_by(100) {
            let searched = in_layer(&masker(), file(&last), &bounds(limit));
            assert!(matches!(searched, Err(LeakError::TooLarge(_))), "{limit}: {searched:?}");
        }
        let cut = &gzip(&archive(&[("a", &[b'q'; 5000])]))[..40];
        assert!(matches!(
            in_layer(&masker(), file(cut), &bounds(1 << 20)),
            Err(LeakError::Damaged(_))
        ));
    }

    #[test]
    fn layers_share_what_they_may_unpack_to() {
        let layer = gzip(&archive(&[("a", &[b'q'; 3000])]));
        let (masker, bounds) = (masker(), bounds(12_000));
        for _ in 0..2 {
            assert_eq!(in_layer(&masker, file(&layer), &bounds).unwrap(), None);
        }
        for blob in [&layer, SECRET] {
            let searched = in_layer(&masker, file(blob), &bounds);
            assert!(matches!(searched, Err(LeakError::TooLarge(12_000))), "{searched:?}");
        }
    }

    /// A file of a TiB that takes no place.
    fn endless(beginning: &[u8]) -> File {
        let file = file(beginning);
        file.set_len(1 << 40).unwrap();
        file
    }

    #[test]
    fn a_search_ends_when_it_is_cancelled_and_at_its_deadline() {
        let token = CancellationToken::new();
        let bounds =
            Bounds::new(u64::MAX, Duration::MAX, vec![CancellationToken::new(), token.clone()]);
        let (masker, ready) = (masker(), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            let search = scope.spawn(|| {
                ready.wait();
                in_layer(&masker, endless(b""), &{ bounds })
            });
            ready.wait();
            std::thread::sleep(Duration::from_millis(20));
            token.cancel();
            let cancelled = std::time::Instant::now();
            assert!(matches!(search.join().unwrap(), Err(LeakError::Stopped)));
            assert!(cancelled.elapsed() < Duration::from_secs(2));
        });
        let bounds = Bounds::new(u64::MAX, Duration::from_millis(50), vec![]);
        let searched = in_layer(&masker, endless(b""), &bounds);
        assert!(matches!(searched, Err(LeakError::Late(_))), "{searched:?}");
    }

    /// Packed members of nothing: a decoder reads them without giving anything.
    #[test]
    fn what_unpacks_to_nothing_for_ever_ends_too() {
        let token = CancellationToken::new();
        let bounds = Bounds::new(u64::MAX, Duration::MAX, vec![token.clone()]);
        let masker = masker();
        let blob = file(&gzip(b"").repeat(5 << 20));
        std::thread::scope(|scope| {
            let search = scope.spawn(|| in_layer(&masker, blob, &{ bounds }));
            std::thread::sleep(Duration::from_millis(20));
            token.cancel();
            let cancelled = std::time::Instant::now();
            assert!(matches!(search.join().unwrap(), Err(LeakError::Stopped)));
            assert!(cancelled.elapsed() < Duration::from_secs(2));
        });
    }

    fn header(kind: tar::EntryType, name: &str, size: u64) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    /// The most memory that this process has had, in bytes.
    fn peak() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    #[test]
    fn an_extension_of_any_length_is_searched_and_not_kept() {
        use std::os::unix::fs::FileExt as _;
        use tar::EntryType;
        const LENGTH: u64 = 32 << 20;
        let behind = [header(EntryType::Regular, "etc/npmrc", 512), vec![b'x'; 512]].concat();
        // The program's own pages, and what every search needs, are there before anything is measured.
        assert_eq!(leak(&archive(&[("npmrc", SECRET)])), at("npmrc"));
        for kind in [
            EntryType::GNULongName,
            EntryType::GNULongLink,
            EntryType::XHeader,
            EntryType::XGlobalHeader,
        ] {
            let layer = file(&header(kind, "long", LENGTH));
            layer.write_all_at(SECRET, 512 + LENGTH - 100).unwrap();
            layer.write_all_at(&behind, 512 + LENGTH).unwrap();
            let before = peak();
            let found = in_layer(&masker(), layer, &bounds(1 << 30)).unwrap().unwrap();
            assert_eq!(found.secret, "npm", "{kind:?}");
            // The kernel's own count is not exact: it can even fall a little.
            assert!(peak().saturating_sub(before) < LENGTH / 2, "{kind:?}");
            // A name that is too long is none; others are as the header has them.
            assert!(found.path.unwrap().len() <= "etc/npmrc".len(), "{kind:?}");
        }
    }

    #[test]
    fn entries_have_the_names_that_extensions_give_them() {
        let long = "d/".repeat(200) + "npmrc";
        assert_eq!(leak(&archive(&[("clean", b""), (&long, SECRET)])), at(&long));
        let mut builder = tar::Builder::new(vec![]);
        builder.append_pax_extensions([("path", long.as_bytes()), ("size", b"20")]).unwrap();
        let mut layer = builder.into_inner().unwrap();
        layer.truncate(1024);
        layer.extend(header(tar::EntryType::Regular, "short", 0));
        layer.extend([SECRET, &[0; 492]].concat());
        layer.extend(archive(&[("next", b"")]));
        assert_eq!(leak(&layer), at(&long));
        let never = "d".repeat(5000);
        let named = leak(&archive(&[(&never, SECRET)])).unwrap().path.unwrap();
        assert_eq!(named.len(), 4096);
    }

    /// Its holes are not in the archive, however long it says they are, and neither is anything read for them.
    #[test]
    fn a_sparse_file_is_searched_as_it_is_stored() {
        let mut header = tar::Header::new_gnu();
        header.set_path("sparse").unwrap();
        header.set_entry_type(tar::EntryType::GNUSparse);
        header.set_size(512);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.realsize.fill(b'7');
        gnu.sparse[0].offset.fill(b'7');
        gnu.sparse[0].numbytes.copy_from_slice(b"000000001000");
        gnu.set_is_extended(true);
        header.set_cksum();
        let clean = [&header.as_bytes()[..], &[0; 512], &[b'x'; 512]].concat();
        let layer = [clean.clone(), archive(&[("etc/npmrc", SECRET)])].concat();
        assert_eq!(leak(&layer), at("etc/npmrc"));
        assert_eq!(leak(&[&clean[..1024], SECRET, &[0; 492]].concat()), at("sparse"));
    }

    #[test]
    fn configurations_are_searched_string_by_string() {
        let masker = masker();
        let text = String::from_utf8(SECRET.to_vec()).unwrap();
        for config in [
            json!({"config": {"Env": [format!("A={text}")]}}),
            json!({"config": {"Labels": {text.clone(): ""}}}),
            json!({"history": [{"created_by": format!("RUN curl {text}")}]}),
        ] {
            assert!(in_json(&masker, config.to_string().as_bytes()).is_some(), "{config}");
        }
        let escaped = r#"{"a": "hunter2\/canary\u002bvalue"}"#;
        assert!(in_json(&masker, escaped.as_bytes()).is_some());
        assert_eq!(in_json(&masker, br#"{"a": "hunter2"}"#), None);
    }
}
