//! `kiln-image inspect DIR|REF`.

use std::fmt::Write as _;

use anyhow::Context as _;
use clap::Args;

use super::{RegistryOptions, Subject, print};
use crate::text::printable;
use crate::verify::{self, Image};

#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A directory, or `HOST[:PORT]/REPOSITORY[:TAG]`
    #[arg(value_name = "DIR|REF")]
    subject: String,
    #[command(flatten)]
    registry: RegistryOptions,
}

impl Inspect {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let found = match Subject::parse(&self.subject)? {
            Subject::Dir(dir) => verify::inspect_dir(&dir),
            Subject::Ref(reference) => verify::inspect_ref(&reference, &self.registry.into()).await,
        };
        let image = found.with_context(|| format!("cannot inspect {}", self.subject))?;
        print(&describe(&image)?)
    }
}

/// A line for each fact, then the configuration (of a bundle: `bundle.json`) as JSON.
fn describe(image: &Image) -> anyhow::Result<String> {
    let mut out = String::new();
    writeln!(out, "digest    {}", image.digest)?;
    if let Some(kind) = &image.artifact_type {
        writeln!(out, "type      {}", printable(kind))?;
    }
    for layer in &image.layers {
        let what = layer.title.as_deref().unwrap_or(&layer.media_type);
        writeln!(out, "layer     {} {:>11}  {}", layer.digest, layer.size, printable(what))?;
    }
    if let Some(bundle) = image.bundle()? {
        let fits = if bundle.check_protocol().is_ok() { "this Kiln's" } else { "not this Kiln's" };
        writeln!(out, "protocol  {} ({fits})", bundle.protocol)?;
    }
    if image.config_bytes.is_empty() {
        return Ok(out);
    }
    let config: serde_json::Value =
        serde_json::from_slice(&image.config_bytes).context("the configuration is not JSON")?;
    // JSON escapes control characters in strings already.
    writeln!(out, "{config:#}")?;
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_described() {
        let dir = tempfile::tempdir().unwrap();
        crate::bundle::tests::sample(dir.path());
        insta::assert_snapshot!(describe(&verify::inspect_dir(dir.path()).unwrap()).unwrap(), @r#"
        digest    sha256:bc0f59b1f6dadf614839e9c1aa38656730b1c4766de9f8844b1f9e03ba448fa2
        type      application/vnd.kiln.builder.v1+json
        layer     sha256:a204d4ad1de3e9b07751899e5cf4d4a3017328c41372c70fdcc8db9587bb38fb           6  kernel
        layer     sha256:f5e3dba158c542884540793cb24e361afb19e6874c5934e2a0304203b7626fe4           6  initrd
        layer     sha256:fed4199357214dfb94724176c68a76698dbc3c2d36317a895320207ac910dea6           4  root.erofs
        protocol  v1 (this Kiln's)
        {
          "agent": {
            "digest": "sha256:b62db7d0b79d11100c7103df97dd87bc90ff6ffbd88de6019cf1e933069c8525",
            "version": "0.1.0"
          },
          "architecture": "amd64",
          "engine": {
            "buildah": "1.39.3+ds1-1"
          },
          "files": {
            "initrd": {
              "digest": "sha256:f5e3dba158c542884540793cb24e361afb19e6874c5934e2a0304203b7626fe4",
              "size": 6
            },
            "kernel": {
              "digest": "sha256:a204d4ad1de3e9b07751899e5cf4d4a3017328c41372c70fdcc8db9587bb38fb",
              "size": 6
            },
            "root.erofs": {
              "digest": "sha256:fed4199357214dfb94724176c68a76698dbc3c2d36317a895320207ac910dea6",
              "size": 4
            }
          },
          "identity": "builder@sha256:fed4199357214dfb94724176c68a76698dbc3c2d36317a895320207ac910dea6",
          "kernel": {
            "modules": [
              "virtio_ring",
              "virtio"
            ],
            "release": "6.1.0-56-cloud-amd64",
            "suite": "bookworm",
            "version": "6.1.0-56-cloud-amd64 Debian 6.1.192-2"
          },
          "name": "builder",
          "protocol": {
            "max": 1,
            "min": 1
          },
          "schema": 1,
          "suite": "trixie"
        }
        "#);
    }
}
