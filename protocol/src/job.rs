//! The job: all that the guest is told about what to do. It holds no credential.

use serde::{Deserialize, Serialize};

use crate::event::MAX_DIGEST;
use crate::name::MAX_UPSTREAM;
use crate::run::RunJob;
use crate::secret::SecretSpec;

/// Longest list of certificates of a job, in bytes.
pub const MAX_EGRESS_CA: usize = 128 * 1024;
/// Most build arguments of a job.
pub const MAX_BUILD_ARGS: usize = 256;
/// Longest text of a job (a name, a path, a target, an argument), in bytes.
pub const MAX_JOB_TEXT: usize = 32 * 1024;
/// Longest inline Dockerfile, in bytes. With everything else a job stays under one frame.
pub const MAX_DOCKERFILE: usize = 512 * 1024;
/// Most bytes of all build arguments together.
pub const MAX_BUILD_ARGS_BYTES: usize = 256 * 1024;

/// Most registries that a job names.
pub const MAX_UPSTREAMS: usize = 64;

/// Longest id of a build, in bytes.
pub const MAX_BUILD_ID: usize = 64;

/// Identifies a build. Lower-case letters, digits and `-`; 1 to 64 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BuildId(String);

/// A text that cannot be a build's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a build id is 1 to 64 of a-z, 0-9 and -")]
pub struct BadBuildId;

impl BuildId {
    /// Checks the text and takes it as an id.
    pub fn new(id: impl Into<String>) -> Result<Self, BadBuildId> {
        let id = id.into();
        let fits = (1..=MAX_BUILD_ID).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if fits { Ok(Self(id)) } else { Err(BadBuildId) }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for BuildId {
    type Error = BadBuildId;
    fn try_from(id: String) -> Result<Self, BadBuildId> {
        Self::new(id)
    }
}

impl From<BuildId> for String {
    fn from(id: BuildId) -> Self {
        id.0
    }
}

impl std::fmt::Display for BuildId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Host → guest: what this VM is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Whose job it is: the build's id, or the instance's.
    pub build: BuildId,
    /// What to do.
    pub role: Role,
    /// What may be used up.
    pub limits: Limits,
}

/// What a VM does in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Run a Dockerfile and push the image to [`crate::name::STAGING_REPOSITORY`].
    Build(BuildJob),
    /// Run the program of the image on the VM's third disk.
    Run(RunJob),
}

/// A Dockerfile to run. The source follows as a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildJob {
    /// Where the Dockerfile is.
    pub dockerfile: Dockerfile,
    /// The stage to build; the last one otherwise.
    pub target: Option<String>,
    /// `--build-arg`, in order.
    pub build_args: Vec<(String, String)>,
    /// What steps may reach.
    pub network: StepNetwork,
    /// `sha256:…`: what the image that the last stage is made from has to be.
    pub base_digest: Option<String>,
    /// Certificates, as PEM, that steps trust besides the public ones: those of the operator's egress.
    #[serde(with = "serde_bytes")]
    pub egress_ca: Vec<u8>,
    /// The secrets that the build declares; their values are asked for.
    pub secrets: Vec<SecretSpec>,
    /// Whether a step that fails stays, so that it can be entered: see [`crate::message::AgentToHost::Kept`].
    pub keep_failed: bool,
    /// The other registries that the gateway leads to, as names of images begin with them: `docker.io`,
    /// `registry.example:5000`. See [`crate::name::upstream_repository`].
    pub upstreams: Vec<String>,
}

/// Where a Dockerfile is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dockerfile {
    /// A path inside the source, relative to its root.
    InSource(String),
    /// Its content. Wins over a file in the source.
    Inline(Vec<u8>),
}

/// What the network of a step has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StepNetwork {
    /// A loopback with nothing on it.
    None,
    /// A loopback with the egress proxy on it.
    Proxy,
}

/// What a job may use up. The host enforces its own side of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// From the VM's start to the outcome, in milliseconds.
    pub timeout_ms: u64,
    /// How much of the timeout had passed when the job was sent, in milliseconds.
    pub spent_ms: u64,
    /// Of all log content together, in bytes.
    pub log_bytes: u64,
    /// Processes of one step at one time.
    pub processes: u32,
    /// Of the unpacked source, in bytes. An instance has none.
    pub source_bytes: u64,
    /// Files and directories of the unpacked source.
    pub source_entries: u64,
}

/// A job that breaks a bound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} of the job is {actual}, over the limit of {limit}")]
pub struct JobTooLarge {
    /// Which field.
    pub field: &'static str,
    /// What it holds, in bytes or entries.
    pub actual: usize,
    /// What it may hold.
    pub limit: usize,
}

impl Job {
    /// Whether every bound holds. Both sides ask: the host before it sends, the agent before it
    /// believes.
    pub fn check(&self) -> Result<(), JobTooLarge> {
        match &self.role {
            Role::Build(build) => build.check(),
            Role::Run(run) => run.check(),
        }
    }
}

impl BuildJob {
    fn check(&self) -> Result<(), JobTooLarge> {
        match &self.dockerfile {
            Dockerfile::InSource(path) => at_most("dockerfile path", path.len(), MAX_JOB_TEXT)?,
            Dockerfile::Inline(content) => at_most("dockerfile", content.len(), MAX_DOCKERFILE)?,
        }
        if let Some(target) = &self.target {
            at_most("target", target.len(), MAX_JOB_TEXT)?;
        }
        if let Some(digest) = &self.base_digest {
            at_most("base_digest", digest.len(), MAX_DIGEST)?;
        }
        at_most("egress_ca", self.egress_ca.len(), MAX_EGRESS_CA)?;
        SecretSpec::check_all(&self.secrets)?;
        at_most("upstreams count", self.upstreams.len(), MAX_UPSTREAMS)?;
        for upstream in &self.upstreams {
            at_most("upstream", upstream.len(), MAX_UPSTREAM)?;
        }
        at_most("build_args count", self.build_args.len(), MAX_BUILD_ARGS)?;
        let mut total = 0;
        for (key, value) in &self.build_args {
            at_most("build argument", key.len().max(value.len()), MAX_JOB_TEXT)?;
            total += key.len() + value.len();
        }
        at_most("build_args", total, MAX_BUILD_ARGS_BYTES)
    }
}

pub(crate) fn at_most(field: &'static str, actual: usize, limit: usize) -> Result<(), JobTooLarge> {
    if actual > limit { Err(JobTooLarge { field, actual, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{MAX_SECRET_ID, MAX_SECRET_VARIABLE, MAX_SECRETS, SecretId};

    fn job(build: BuildJob) -> Job {
        Job {
            build: BuildId::new("b1").unwrap(),
            role: Role::Build(build),
            limits: Limits {
                timeout_ms: 1,
                spent_ms: 0,
                log_bytes: 1,
                processes: 1,
                source_bytes: 1,
                source_entries: 1,
            },
        }
    }

    fn build() -> BuildJob {
        BuildJob {
            dockerfile: Dockerfile::InSource("Dockerfile".into()),
            target: None,
            build_args: vec![],
            network: StepNetwork::None,
            base_digest: None,
            egress_ca: vec![],
            secrets: vec![],
            keep_failed: false,
            upstreams: vec![],
        }
    }

    fn check(build: BuildJob) -> Option<&'static str> {
        job(build).check().err().map(|e| e.field)
    }

    #[test]
    fn build_ids_are_short_and_plain() {
        assert!(BuildId::new("a").is_ok());
        assert!(BuildId::new("a".repeat(64)).is_ok());
        for bad in ["", "A", "a/b", "..", "a_b", &"a".repeat(65)] {
            assert_eq!(BuildId::new(bad), Err(BadBuildId), "{bad:?}");
        }
    }

    #[test]
    fn a_bad_id_does_not_decode() {
        let bytes = postcard::to_stdvec("../etc").unwrap();
        assert!(postcard::from_bytes::<BuildId>(&bytes).is_err());
    }

    #[test]
    fn every_bound_holds_at_and_breaks_above() {
        let path = |n| BuildJob { dockerfile: Dockerfile::InSource("p".repeat(n)), ..build() };
        assert_eq!(check(path(MAX_JOB_TEXT)), None);
        assert_eq!(check(path(MAX_JOB_TEXT + 1)), Some("dockerfile path"));

        let inline = |n| BuildJob { dockerfile: Dockerfile::Inline(vec![0; n]), ..build() };
        assert_eq!(check(inline(MAX_DOCKERFILE)), None);
        assert_eq!(check(inline(MAX_DOCKERFILE + 1)), Some("dockerfile"));

        let target = |n| BuildJob { target: Some("t".repeat(n)), ..build() };
        assert_eq!(check(target(MAX_JOB_TEXT)), None);
        assert_eq!(check(target(MAX_JOB_TEXT + 1)), Some("target"));

        let digest = |n| BuildJob { base_digest: Some("d".repeat(n)), ..build() };
        assert_eq!(check(digest(MAX_DIGEST)), None);
        assert_eq!(check(digest(MAX_DIGEST + 1)), Some("base_digest"));

        let ca = |n| BuildJob { egress_ca: vec![0; n], ..build() };
        assert_eq!(check(ca(MAX_EGRESS_CA)), None);
        assert_eq!(check(ca(MAX_EGRESS_CA + 1)), Some("egress_ca"));

        let secret = |length| SecretSpec {
            id: SecretId::new("a").unwrap(),
            variable: Some("v".repeat(length)),
        };
        let secrets = |n| BuildJob { secrets: vec![secret(1); n], ..build() };
        assert_eq!(check(secrets(MAX_SECRETS)), None);
        assert_eq!(check(secrets(MAX_SECRETS + 1)), Some("secrets count"));
        let variable = |n| BuildJob { secrets: vec![secret(n)], ..build() };
        assert_eq!(check(variable(MAX_SECRET_VARIABLE)), None);
        assert_eq!(check(variable(MAX_SECRET_VARIABLE + 1)), Some("secret's variable"));

        let upstreams = |n, length| BuildJob { upstreams: vec!["u".repeat(length); n], ..build() };
        assert_eq!(check(upstreams(MAX_UPSTREAMS, MAX_UPSTREAM)), None);
        assert_eq!(check(upstreams(MAX_UPSTREAMS + 1, 1)), Some("upstreams count"));
        assert_eq!(check(upstreams(1, MAX_UPSTREAM + 1)), Some("upstream"));

        let args = |n| BuildJob { build_args: vec![("k".into(), "v".into()); n], ..build() };
        assert_eq!(check(args(MAX_BUILD_ARGS)), None);
        assert_eq!(check(args(MAX_BUILD_ARGS + 1)), Some("build_args count"));

        let arg = |n| BuildJob { build_args: vec![("k".into(), "v".repeat(n))], ..build() };
        assert_eq!(check(arg(MAX_JOB_TEXT)), None);
        assert_eq!(check(arg(MAX_JOB_TEXT + 1)), Some("build argument"));

        let value = MAX_JOB_TEXT - 1;
        let total =
            |n| BuildJob { build_args: vec![("k".into(), "v".repeat(value)); n], ..build() };
        assert_eq!(check(total(MAX_BUILD_ARGS_BYTES / MAX_JOB_TEXT)), None);
        assert_eq!(check(total(MAX_BUILD_ARGS_BYTES / MAX_JOB_TEXT + 1)), Some("build_args"));
    }

    #[test]
    fn the_largest_job_fits_into_one_frame() {
        let mut largest = build();
        largest.dockerfile = Dockerfile::Inline(vec![b'x'; MAX_DOCKERFILE]);
        largest.egress_ca = vec![b'x'; MAX_EGRESS_CA];
        let secret = SecretSpec {
            id: SecretId::new("a".repeat(MAX_SECRET_ID)).unwrap(),
            variable: Some("v".repeat(MAX_SECRET_VARIABLE)),
        };
        largest.secrets = vec![secret; MAX_SECRETS];
        largest.upstreams = vec!["u".repeat(MAX_UPSTREAM); MAX_UPSTREAMS];
        largest.target = Some("t".repeat(MAX_JOB_TEXT));
        largest.build_args = vec![("k".repeat(1024), String::new()); MAX_BUILD_ARGS];
        let largest = job(largest);
        assert_eq!(largest.check(), Ok(()));
        let frame = crate::frame::encode(&crate::message::HostToAgent::Job(Box::new(largest)));
        assert!(frame.is_ok());
    }

    #[test]
    fn the_largest_job_of_an_instance_fits_into_one_frame() {
        use crate::run::{MAX_ARGS, MAX_DIRECTORY, MAX_ENV, MAX_HOSTNAME, MAX_RUN_BYTES, MAX_USER};
        let mut largest = job(build());
        largest.role = Role::Run(RunJob {
            hostname: "h".repeat(MAX_HOSTNAME),
            args: vec!["a".repeat(MAX_RUN_BYTES / MAX_ARGS); MAX_ARGS],
            env: vec![("k".repeat(MAX_RUN_BYTES / MAX_ENV), String::new()); MAX_ENV],
            user: "u".repeat(MAX_USER),
            working_dir: "/".repeat(MAX_DIRECTORY),
            stop_signal: u8::MAX,
        });
        assert_eq!(largest.check(), Ok(()));
        let frame = crate::frame::encode(&crate::message::HostToAgent::Job(Box::new(largest)));
        assert!(frame.is_ok());
    }
}
