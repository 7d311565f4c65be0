//! A build: its states, and the pure transitions between them.
//!
//! ```text
//! queued ──claim──▶ building ──engine pushes──▶ pushing ──publishing(digest)──▶ ready
//!   │                  │                           │             │
//!   ├──cancel─────▶ cancelled ◀──cancel── building, pushing until publishing is recorded
//!   └──fail───────▶ failed    ◀──fail──── building, pushing
//! queued ◀──requeue── building, pushing until publishing is recorded
//! ```
//!
//! **Invariant**: a finished build never changes, and only the driver that holds the claim's fence
//! changes a claimed build.

mod request_hash;

use std::collections::BTreeMap;

pub use kiln_protocol::event::FailureKind;
pub use kiln_protocol::job::BuildId;
use kiln_protocol::secret::SecretSpec;
use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch, by the host's clock.
pub type Millis = i64;

/// Where a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Stored, waiting for a VM.
    Queued,
    /// A VM is being started or runs the Dockerfile.
    Building,
    /// The image goes to staging, is checked and published.
    Pushing,
    /// Published.
    Ready,
    /// Failed, with a cause.
    Failed,
    /// Cancelled by somebody.
    Cancelled,
}

impl Status {
    /// Every status.
    pub const ALL: [Self; 6] =
        [Self::Queued, Self::Building, Self::Pushing, Self::Ready, Self::Failed, Self::Cancelled];

    /// The API's and the store's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Building => "building",
            Self::Pushing => "pushing",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The status of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == name)
    }

    /// Whether nothing changes any more.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Ready | Self::Failed | Self::Cancelled)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who owns builds, secrets and repositories: `[a-z0-9][a-z0-9-]{0,38}`, not a reserved word.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tenant(String);

/// Longest name of a tenant, in bytes.
pub const MAX_TENANT: usize = 39;

/// Names that no tenant may have: they are namespaces of the registry.
pub const RESERVED_TENANTS: [&str; 4] = ["builds", "base", "upstream", "staging"];

/// A text that cannot be a tenant's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTenant {
    /// Not of the form.
    #[error(
        "tenant {0:?} is not a name of 1 to 39 of a-z, 0-9 and -, starting with a letter or digit"
    )]
    Form(String),
    /// Taken by Kiln itself.
    #[error("tenant {0:?} is reserved; choose another name")]
    Reserved(String),
}

impl Tenant {
    /// Checks the text and takes it as a tenant's name.
    pub fn new(name: impl Into<String>) -> Result<Self, BadTenant> {
        let name = name.into();
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let fits = (1..=MAX_TENANT).contains(&name.len())
            && plain(name.as_bytes()[0])
            && name.bytes().all(|b| plain(b) || b == b'-');
        if !fits {
            Err(BadTenant::Form(name))
        } else if RESERVED_TENANTS.contains(&name.as_str()) {
            Err(BadTenant::Reserved(name))
        } else {
            Ok(Self(name))
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Tenant {
    type Error = BadTenant;
    fn try_from(name: String) -> Result<Self, BadTenant> {
        Self::new(name)
    }
}

impl From<Tenant> for String {
    fn from(tenant: Tenant) -> Self {
        tenant.0
    }
}

impl std::fmt::Display for Tenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the steps of a build may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// Nothing.
    None,
    /// The domains of the build's list.
    Allowlist,
    /// Everything public.
    Open,
}

/// The name that an image gets in the tenant's repositories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageName {
    /// Below the tenant: `app`, `team/app`.
    pub name: String,
    /// The tag.
    pub tag: String,
}

/// What the user asked for. Never changes after the submit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The Dockerfile's content where it was sent apart from the source.
    pub dockerfile: Option<String>,
    /// The stage to build.
    pub target: Option<String>,
    /// The image's name; `builds/<id>` without.
    pub image_name: Option<ImageName>,
    /// `--build-arg`, by name.
    pub build_args: BTreeMap<String, String>,
    /// The user's labels of the build.
    pub tags: BTreeMap<String, String>,
    /// `sha256:…` that the base of the built stage has to have.
    #[serde(default)]
    pub base_image_digest: Option<String>,
    /// The secrets that the Dockerfile may ask for, without values.
    #[serde(default)]
    pub secrets: Vec<SecretSpec>,
    /// What steps may reach.
    pub network: NetworkMode,
    /// Domains for [`NetworkMode::Allowlist`].
    pub allowed_domains: Vec<String>,
    /// From the VM's start.
    pub timeout_seconds: u32,
    /// Of the VM.
    pub memory_mb: u32,
    /// Of the VM.
    pub cpus: u32,
    /// Of the VM's scratch disk.
    pub disk_gb: u32,
    /// How long a failed step stays to be entered, in seconds; 0 when it does not.
    #[serde(default)]
    pub keep_failed_seconds: u32,
    /// Among the tenant's queued builds, 0 to 100: higher ones go first.
    #[serde(default = "normal", skip_serializing_if = "is_normal")]
    pub priority: u32,
    /// SHA-256 over every byte of the source as it was sent, `sha256:…`.
    pub source_digest: String,
    /// Length of the source in bytes.
    pub source_bytes: u64,
}

/// The priority of a build that asks for none.
pub const NORMAL_PRIORITY: u32 = 50;

fn normal() -> u32 {
    NORMAL_PRIORITY
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
fn is_normal(priority: &u32) -> bool {
    *priority == NORMAL_PRIORITY
}

/// Why a build failed. Shown as it is by the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Failure {
    /// The cause, for programs.
    #[schema(value_type = crate::api::openapi::schemas::FailureKind)]
    pub kind: FailureKind,
    /// What happened, to what, and what to do.
    pub message: String,
    /// The step to blame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub step: Option<u32>,
    /// Its exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub exit_code: Option<i32>,
    /// More, such as the engine's last lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub detail: Option<String>,
}

impl Failure {
    /// A failure without a step.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), step: None, exit_code: None, detail: None }
    }

    /// Adds more.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }
}

impl From<kiln_protocol::event::Failure> for Failure {
    fn from(f: kiln_protocol::event::Failure) -> Self {
        let kiln_protocol::event::Failure { kind, message, step, exit_code, detail } = f;
        Self { kind, message, step, exit_code, detail }
    }
}

/// What a build used, as far as is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Usage {
    /// The most memory that one step used at one time, in bytes.
    pub memory_peak_bytes: Option<u64>,
    /// Log content, in bytes.
    pub log_bytes: Option<u64>,
    /// From the submit to the VM's processes running, in milliseconds. Holds the wait in the queue.
    pub vm_start_ms: Option<u64>,
    /// From there to the agent's Hello, in milliseconds.
    pub boot_ms: Option<u64>,
    /// From the Hello to the engine's process running, in milliseconds. Holds the unpacking of the source.
    pub engine_start_ms: Option<u64>,
    /// How long of that the kernel took to start the engine's process, in milliseconds, as the agent says.
    pub engine_spawn_ms: Option<u64>,
    /// How long the engine took for the Dockerfile, the push apart, in milliseconds, by the guest's clock.
    pub engine_build_ms: Option<u64>,
    /// The most memory that the agent used at one time, in bytes, as it says.
    pub agent_memory_peak_bytes: Option<u64>,
}

/// Something that the build pulled through the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Pulled {
    /// As the build named it: `registry.kiln/base/debian:trixie`, `docker.io/library/debian:trixie`.
    pub reference: String,
    /// Of the manifest that was served, `sha256:…`.
    #[schema(value_type = crate::api::openapi::schemas::Digest)]
    pub digest: String,
}

/// A host that a step of the build reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Reached {
    /// As the step named it, in lower case; an address where it named one.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// What a build was made with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// Digest of the builder bundle that it ran in, `sha256:…`.
    pub builder_digest: Option<String>,
    /// Digest of the kernel that its VM ran.
    pub kernel_digest: Option<String>,
    /// What the guest says of itself. The host cannot check it.
    pub guest: Option<GuestSays>,
}

/// What a guest says of a build that worked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSays {
    /// What executed the Dockerfile: `buildah 1.39.3`.
    pub engine: String,
    /// The source's lockfiles by path, with `sha256:…` of each.
    pub lockfiles: BTreeMap<String, String>,
}

impl From<&kiln_protocol::event::Built> for GuestSays {
    fn from(built: &kiln_protocol::event::Built) -> Self {
        let hash = |sha256| format!("sha256:{}", hex::encode(sha256));
        let lockfiles = built.lockfiles.iter();
        Self {
            engine: built.engine.clone(),
            lockfiles: lockfiles.map(|file| (file.path.clone(), hash(file.sha256))).collect(),
        }
    }
}

/// A build as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// Its id.
    pub id: BuildId,
    /// Whose it is.
    pub tenant: Tenant,
    /// Where it is.
    pub status: Status,
    /// What was asked for.
    pub request: Request,
    /// When it was stored.
    pub created_at: Millis,
    /// When it was first claimed.
    pub started_at: Option<Millis>,
    /// When it became final.
    pub completed_at: Option<Millis>,
    /// How often it was claimed.
    pub attempt: u32,
    /// Whether somebody was in its VM while it ran: then what it made may be theirs. Never false again.
    pub entered: bool,
    /// The digest that is being, or was, published. Once set it is not cancelled any more.
    pub publishing: Option<String>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// What it used.
    pub usage: Usage,
    /// What it pulled.
    pub pulled: Vec<Pulled>,
    /// What its steps reached.
    pub reached: Vec<Reached>,
    /// What it was made with.
    pub provenance: Provenance,
}

impl Build {
    /// A new one.
    pub fn queued(id: BuildId, tenant: Tenant, request: Request, now: Millis) -> Self {
        Self {
            id,
            tenant,
            status: Status::Queued,
            request,
            created_at: now,
            started_at: None,
            completed_at: None,
            attempt: 0,
            entered: false,
            publishing: None,
            failure: None,
            usage: Usage::default(),
            pulled: vec![],
            reached: vec![],
            provenance: Provenance::default(),
        }
    }

    /// The repository that the image goes to: `<tenant>/<name>`, or `builds/<id>`.
    pub fn repository(&self) -> String {
        match &self.request.image_name {
            Some(image) => format!("{}/{}", self.tenant, image.name),
            None => format!("builds/{}", self.id),
        }
    }

    /// The tag that the image gets.
    pub fn tag(&self) -> &str {
        self.request.image_name.as_ref().map_or("latest", |image| &image.tag)
    }

    /// The digest of the published image.
    pub fn image_digest(&self) -> Option<&str> {
        if self.status == Status::Ready { self.publishing.as_deref() } else { None }
    }
}

/// A step in a build's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A driver has taken it.
    Claim,
    /// The engine began to push.
    Push,
    /// The digest was checked and will be published: the point of no return.
    Publish(String),
    /// It is in the registry.
    Finish,
    /// It failed.
    Fail(Failure),
    /// Somebody cancelled it.
    Cancel,
    /// Its host went away before anything was published: once more from the start. What the lost
    /// attempt used, pulled and reached is forgotten.
    Requeue,
}

/// A change that a build's state does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is finished.
    #[error("the build is already {0}")]
    Final(Status),
    /// It is being published.
    #[error("the build is already being published")]
    Publishing,
    /// Not from this state.
    #[error("a build that is {0} cannot do that")]
    From(Status),
}

impl Build {
    /// The build after a change; pure.
    pub fn apply(&self, change: Change, now: Millis) -> Result<Self, Refused> {
        use Status::{Building, Cancelled, Failed, Pushing, Queued, Ready};
        if self.status.is_final() {
            return Err(Refused::Final(self.status));
        }
        let mut next = self.clone();
        match (self.status, change) {
            (Queued, Change::Claim) => {
                next.status = Building;
                next.attempt += 1;
                next.started_at.get_or_insert(now);
            }
            (Building, Change::Push) => next.status = Pushing,
            (Pushing, Change::Publish(digest)) => match &self.publishing {
                None => next.publishing = Some(digest),
                Some(recorded) if *recorded == digest => {}
                Some(_) => return Err(Refused::Publishing),
            },
            (Pushing, Change::Finish) if self.publishing.is_some() => next.status = Ready,
            (_, Change::Fail(failure)) => {
                next.status = Failed;
                next.failure = Some(failure);
            }
            (_, Change::Cancel | Change::Requeue) if self.publishing.is_some() => {
                return Err(Refused::Publishing);
            }
            (_, Change::Cancel) => next.status = Cancelled,
            (Building | Pushing, Change::Requeue) => {
                next.status = Queued;
                next.usage = Usage::default();
                next.pulled.clear();
                next.reached.clear();
                next.provenance = Provenance::default();
            }
            (from, _) => return Err(Refused::From(from)),
        }
        if next.status.is_final() {
            next.completed_at = Some(now);
        }
        Ok(next)
    }
}

#[cfg(test)]
pub(crate) mod tests;
