//! Whether an image that is about to be published holds one of its build's secrets.
//!
//! Layers that the build pulled are not the build's; those that it pushed are read as they unpack, once, with the
//! names of their entries; the manifest and the configuration as text and string by string. What is packed once more
//! inside a layer is not unpacked.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::rc::Rc;

use serde_json::Value;

use super::Masker;
use super::mask::REACH;

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
    /// It unpacks to more than the build's disk holds.
    #[error("it unpacks to more than {0} bytes, which the build's disk does not hold")]
    TooLarge(u64),
    /// It does not unpack.
    #[error("it does not unpack")]
    Damaged(#[from] io::Error),
}

/// The first secret in a layer's blob. It blocks.
pub fn in_layer(masker: &Masker, blob: File, limit: u64) -> Result<Option<Leak>, LeakError> {
    let found = Rc::new(RefCell::new(None));
    let tap = Tap {
        inner: unpacked(blob)?,
        masker,
        found: Rc::clone(&found),
        tail: vec![],
        left: Some(limit),
    };
    let mut archive = tar::Archive::new(tap);
    archive.set_ignore_zeros(true);
    let searched = entries(&mut archive, &found);
    if let Ok(Some(leak)) = searched {
        return Ok(Some(leak));
    }
    // What is no archive, or behind its end.
    let mut tap = archive.into_inner();
    io::copy(&mut tap, &mut io::sink()).map_err(|error| too_large(error, limit))?;
    searched.map_err(|error| too_large(error, limit)).or_else(|error| match error {
        LeakError::TooLarge(_) => Err(error),
        LeakError::Damaged(_) => Ok(None),
    })?;
    Ok(found.take().map(|secret| Leak { secret, path: None }))
}

/// The first secret in a JSON document.
pub fn in_json(masker: &Masker, bytes: &[u8]) -> Option<Leak> {
    let secret = masker.find(bytes).map(str::to_owned).or_else(|| {
        let value = serde_json::from_slice::<Value>(bytes).ok()?;
        in_value(masker, &value)
    });
    secret.map(|secret| Leak { secret, path: None })
}

fn in_value(masker: &Masker, value: &Value) -> Option<String> {
    match value {
        Value::String(text) => masker.find(text.as_bytes()).map(str::to_owned),
        Value::Array(list) => list.iter().find_map(|value| in_value(masker, value)),
        Value::Object(map) => map.iter().find_map(|(key, value)| {
            masker.find(key.as_bytes()).map(str::to_owned).or_else(|| in_value(masker, value))
        }),
        _ => None,
    }
}

fn entries<R: Read>(
    archive: &mut tar::Archive<R>,
    found: &RefCell<Option<String>>,
) -> io::Result<Option<Leak>> {
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        io::copy(&mut entry, &mut io::sink())?;
        if let Some(secret) = found.take() {
            return Ok(Some(Leak { secret, path: Some(path) }));
        }
    }
    Ok(None)
}

/// By its first bytes, whatever its media type says.
fn unpacked(mut blob: File) -> io::Result<Box<dyn Read>> {
    let mut magic = [0; 4];
    let read = (&blob).take(4).read(&mut magic)?;
    blob.rewind()?;
    let blob = BufReader::with_capacity(CHUNK, blob);
    Ok(match &magic[..read] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(blob)?),
        _ => Box::new(blob),
    })
}

/// Searches what passes.
struct Tap<'m> {
    inner: Box<dyn Read>,
    masker: &'m Masker,
    found: Rc<RefCell<Option<String>>>,
    /// The end of what passed, which a secret may have begun in.
    tail: Vec<u8>,
    /// How much more may come; `None` for ever once more came.
    left: Option<u64>,
}

#[derive(Debug, thiserror::Error)]
#[error("too large")]
struct TooLarge;

fn too_large(error: io::Error, limit: u64) -> LeakError {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<TooLarge>());
    if inner.is_some() { LeakError::TooLarge(limit) } else { LeakError::Damaged(error) }
}

impl Read for Tap<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        // Nothing passes unsearched: from here on there is no end but this error.
        self.left = self.left.and_then(|left| left.checked_sub(length as u64));
        if self.left.is_none() {
            return Err(io::Error::other(TooLarge));
        }
        self.tail.extend_from_slice(&buffer[..length]);
        if self.found.borrow().is_none()
            && let Some(secret) = self.masker.find(&self.tail)
        {
            *self.found.borrow_mut() = Some(secret.to_owned());
        }
        let old = self.tail.len().saturating_sub(REACH);
        self.tail.drain(..old);
        Ok(length)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;

    use serde_json::json;

    use super::*;

    const SECRET: &[u8] = b"hunter2/canary+value";

    fn masker() -> Masker {
        let mut masker = Masker::default();
        masker.add("npm", SECRET).unwrap();
        masker
    }

    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(vec![]);
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packed = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap()
    }

    fn leak(blob: &[u8]) -> Option<Leak> {
        in_layer(&masker(), file(blob), 1 << 30).unwrap()
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
        let searched = in_layer(&masker(), file(&zeros), 1 << 20);
        assert!(matches!(searched, Err(LeakError::TooLarge(1_048_576))), "{searched:?}");
        // Whoever reads may hide the error, and the end may come right behind it.
        let last = archive(&[("a", &[b'q'; 3000])]);
        for limit in (0..last.len() as u64).step_by(100) {
            let searched = in_layer(&masker(), file(&last), limit);
            assert!(matches!(searched, Err(LeakError::TooLarge(_))), "{limit}: {searched:?}");
        }
        let cut = &gzip(&archive(&[("a", &[b'q'; 5000])]))[..40];
        assert!(matches!(in_layer(&masker(), file(cut), 1 << 20), Err(LeakError::Damaged(_))));
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
