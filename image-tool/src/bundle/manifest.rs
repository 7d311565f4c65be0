//! `bundle.json`: its form, and what can be decided from it alone.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_protocol::version::{SUPPORTED, VersionRange};
use serde::{Deserialize, Serialize};

use super::{BundleError, SCHEMA};
use crate::digest::Digest;
use crate::file::FileError;
use crate::layout::Blob;

/// `bundle.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Form of this file.
    pub schema: u32,
    /// The recipe's name.
    pub name: String,
    /// What the initrd says of itself (`/etc/kiln/image`, and so `Hello.image`): the name and the root
    /// disk's digest. It cannot be the bundle's own digest, because the bundle contains it.
    pub identity: String,
    /// Debian's name of the architecture.
    pub architecture: String,
    /// Debian's release of the root.
    pub suite: String,
    /// What the agent speaks.
    pub protocol: VersionRange,
    /// The agent.
    pub agent: AgentInfo,
    /// The kernel.
    pub kernel: KernelInfo,
    /// Package → version of what executes Dockerfiles.
    pub engine: BTreeMap<String, String>,
    /// The files, by name.
    pub files: Files,
    /// Seconds since 1970, where `SOURCE_DATE_EPOCH` gave them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<u64>,
}

/// The agent in a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// Kiln's version.
    pub version: String,
    /// Of the program.
    pub digest: Digest,
}

/// The kernel in a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInfo {
    /// `uname -r`.
    pub release: String,
    /// `uname -v` and more, which has the package's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Debian's release that it is from.
    pub suite: String,
    /// Modules in the initrd, in load order.
    pub modules: Vec<String>,
}

/// The files of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// The kernel image.
    pub kernel: FileInfo,
    /// Agent and modules.
    pub initrd: FileInfo,
    /// The root disk.
    #[serde(rename = "root.erofs")]
    pub root: FileInfo,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Of its bytes.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
}

impl FileInfo {
    /// Reads a file to describe it.
    pub fn of(path: &Path) -> Result<Self, FileError> {
        let (digest, size) = Digest::of_file(path)?;
        Ok(Self { digest, size })
    }
}

impl Files {
    /// Name, media type and description of each, in the order of the OCI manifest's layers.
    pub fn each(&self) -> [(&'static str, &'static str, &FileInfo); 3] {
        [
            ("kernel", "application/vnd.kiln.builder.kernel.v1", &self.kernel),
            ("initrd", "application/vnd.kiln.builder.initrd.v1", &self.initrd),
            ("root.erofs", "application/vnd.kiln.builder.root.v1.erofs", &self.root),
        ]
    }
}

impl Manifest {
    /// Parses `bundle.json`; `path` is for messages only.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, BundleError> {
        #[derive(Deserialize)]
        struct OnlySchema {
            schema: u64,
        }
        let malformed = |source| BundleError::Malformed { path: path.to_owned(), source };
        // First, so that a newer form is called that and not "malformed".
        let schema = serde_json::from_slice::<OnlySchema>(bytes).map_err(malformed)?.schema;
        if schema != u64::from(SCHEMA) {
            return Err(BundleError::Schema(schema));
        }
        serde_json::from_slice(bytes).map_err(malformed)
    }

    /// Whether this host can talk to the agent.
    pub fn check_protocol(&self) -> Result<(), BundleError> {
        match SUPPORTED.agree(self.protocol) {
            Some(_) => Ok(()),
            None => Err(BundleError::Protocol { bundle: self.protocol, host: SUPPORTED }),
        }
    }

    /// The OCI manifest's layers.
    pub fn layers(&self) -> Vec<Blob> {
        let blob = |(name, media_type, info): (&str, &str, &FileInfo)| Blob {
            media_type: media_type.to_owned(),
            digest: info.digest.clone(),
            size: info.size,
            title: Some(name.to_owned()),
        };
        self.files.each().map(blob).into()
    }
}
