//! `kind = "base"`: a Debian root as an ordinary image of one layer.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write as _};
use std::path::Path;

use oci_spec::image::MediaType;

use super::{BuildError, Built, Request, architecture, require_root};
use crate::digest::{self, Digest, Hashing};
use crate::file::{self, FileError};
use crate::inputs::{self, Inputs};
use crate::layout::{self, Blob, Layout, Writer};
use crate::place::Place;
use crate::recipe::{Base, Compression, Recipe};
use crate::rootfs;
use crate::tools::{self, MMDEBSTRAP, TAR};

/// Near zstd's best ratio for its time; the layer is made once and unpacked in every build.
const ZSTD_LEVEL: i32 = 12;
/// gzip's own default.
const GZIP_LEVEL: u32 = 6;

pub(super) async fn build(
    request: &Request,
    recipe: &Recipe,
    base: &Base,
    progress: &dyn Fn(&str),
) -> Result<Built, BuildError> {
    let wanted = Inputs::default()
        .with("root", inputs::root(&base.root, &[], &recipe.files())?)
        .with("image", inputs::image(&base.name, &base.image));
    let place = Place::prepare(&request.out)?;
    if !request.force
        && Inputs::load(&request.out).as_ref() == Some(&wanted)
        && let Some(digest) = undamaged(&request.out, progress)
    {
        return Ok(Built { digest, made: Vec::new() });
    }
    require_root()?;
    tools::require(&[MMDEBSTRAP, TAR])?;

    let (root, archive) = (place.scratch("root"), place.scratch("layer.tar"));
    progress(&format!("installing Debian {}", base.root.suite));
    rootfs::bootstrap(&base.root, &recipe.files(), &root).await?;
    progress("packing the layer");
    rootfs::to_tar(&root, file::create(&archive)?).await?;
    place.discard(&root)?;
    let writer = Writer::create(place.dir())?;
    let (layer, diff_id) = add_layer(&writer, &place, &archive, base.image.compression)?;
    let digest = write_image(writer, base, &layer, &diff_id)?;
    wanted.save(place.dir()).map_err(BuildError::File)?;
    place.commit()?;
    Ok(Built { digest, made: vec!["root", "image"] })
}

fn undamaged(out: &Path, progress: &dyn Fn(&str)) -> Option<Digest> {
    let checked = Layout::open(out).and_then(|layout| layout.verify().map(|()| layout));
    match checked {
        Ok(layout) => layout.root().map(|(blob, _)| blob.digest.clone()),
        Err(error) => {
            progress(&format!("the older result is damaged and is made anew: {error}"));
            None
        }
    }
}

/// Compresses the archive into the layout; gives the layer and the archive's own digest.
fn add_layer(
    writer: &Writer,
    place: &Place,
    archive: &Path,
    compression: Compression,
) -> Result<(Blob, Digest), BuildError> {
    let packed = place.scratch("layer");
    let failed = |e| FileError::new("compress", archive, e);
    let output = BufWriter::new(file::create(&packed)?);
    let (blob, diff_id) = compress(file::open(archive)?, output, compression).map_err(failed)?;
    let blob = writer.add_link(&packed, blob)?;
    for done in [archive, &packed] {
        std::fs::remove_file(done).map_err(|e| FileError::new("remove", done, e))?;
    }
    Ok((blob, diff_id))
}

fn compress(
    archive: File,
    output: BufWriter<File>,
    compression: Compression,
) -> io::Result<(Blob, Digest)> {
    let mut input = BufReader::new(archive);
    let mut packed = Hashing::new(output);
    let (diff_id, media_type) = match compression {
        Compression::Zstd => {
            let mut zstd = zstd::Encoder::new(&mut packed, ZSTD_LEVEL)?;
            let (diff_id, _) = digest::copy(&mut input, &mut zstd)?;
            zstd.finish()?;
            (diff_id, MediaType::ImageLayerZstd)
        }
        Compression::Gzip => {
            // The header gets no time and no name: the same archive gives the same bytes.
            let mut gzip =
                flate2::write::GzEncoder::new(&mut packed, flate2::Compression::new(GZIP_LEVEL));
            let (diff_id, _) = digest::copy(&mut input, &mut gzip)?;
            gzip.finish()?;
            (diff_id, MediaType::ImageLayerGzip)
        }
    };
    packed.flush()?;
    let (digest, size) = packed.finish();
    Ok((Blob { media_type: media_type.to_string(), digest, size, title: None }, diff_id))
}

fn write_image(
    writer: Writer,
    base: &Base,
    layer: &Blob,
    diff_id: &Digest,
) -> Result<Digest, BuildError> {
    let env: Vec<String> = base.image.env.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let mut config = serde_json::json!({
        "architecture": architecture(),
        "os": "linux",
        "config": { "Cmd": base.image.cmd, "Env": env },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created_by": format!("kiln-image build ({})", base.name) }],
    });
    if let Some(time) = tools::source_date_epoch().and_then(rfc3339) {
        config["created"] = time.into();
    }
    let config = writer.add_bytes(MediaType::ImageConfig.as_ref(), &layout::canonical(&config))?;
    let media_type = MediaType::ImageManifest.to_string();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config.to_json(),
        "layers": [layer.to_json()],
    });
    let manifest = writer.add_bytes(&media_type, &layout::canonical(&manifest))?;
    let platform = serde_json::json!({
        "platform": { "architecture": architecture(), "os": "linux" },
    });
    writer.finish(&manifest, &platform)?;
    Ok(manifest.digest)
}

/// Seconds since 1970 as an RFC 3339 time in UTC; `None` beyond the year 9999.
fn rfc3339(seconds: u64) -> Option<String> {
    Some(jiff::Timestamp::from_second(seconds.try_into().ok()?).ok()?.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn layers_unpack_to_the_archive_and_are_stable() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("a.tar");
        let data: Vec<u8> = (0..20_000u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&archive, &data).unwrap();
        for (compression, suffix) in [(Compression::Gzip, "+gzip"), (Compression::Zstd, "+zstd")] {
            let pack = |name: &str| {
                let path = dir.path().join(format!("{name}{suffix}"));
                let output = BufWriter::new(File::create(&path).unwrap());
                let (blob, diff_id) =
                    compress(File::open(&archive).unwrap(), output, compression).unwrap();
                (blob, diff_id, std::fs::read(path).unwrap())
            };
            let (blob, diff_id, bytes) = pack("one");
            assert_eq!(diff_id, Digest::of(&data));
            assert_eq!((&blob.digest, blob.size), (&Digest::of(&bytes), bytes.len() as u64));
            assert!(blob.media_type.ends_with(suffix));
            let mut unpacked = Vec::new();
            match compression {
                Compression::Gzip => {
                    flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut unpacked)
                }
                Compression::Zstd => {
                    zstd::Decoder::new(bytes.as_slice()).unwrap().read_to_end(&mut unpacked)
                }
            }
            .unwrap();
            assert!(unpacked == data);
            assert_eq!(pack("two").0, blob);
        }
    }

    #[test]
    fn times_are_written_as_rfc3339() {
        assert_eq!(rfc3339(1_735_689_600).as_deref(), Some("2025-01-01T00:00:00Z"));
        assert_eq!(rfc3339(u64::MAX), None);
    }
}
