//! The shapes of the API's JSON, and how they come from Kiln's own types.
//!
//! `Build` has the fields of hypeman's `Build` (0.28.0) and Kiln's own beside them. A field that
//! does not apply is absent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::openapi::schemas;
use super::whole;
use crate::build::{Build as Stored, Failure, FailureKind, Millis, Pulled, Reached, Status, Usage};
pub use crate::clock::rfc3339;
use crate::exec::{Session as StoredSession, Subject};
use crate::retention;
use crate::store::{Role, SecretRecord, TokenRecord};

/// What a round of retention has removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Collected {
    /// Log lines of finished builds, those of removed builds too.
    pub log_events_removed: u64,
    /// What they took in the store.
    pub log_bytes_removed: u64,
    /// Finished builds.
    pub builds_removed: u64,
    /// Sessions of the audit log.
    pub sessions_removed: u64,
    /// Directories of sources, and of what was staged, that no build needs.
    pub sources_removed: u64,
    /// Images without a name, of finished builds.
    pub images_removed: u64,
    /// Blobs of the registry that nothing referred to.
    pub blobs_removed: u64,
    /// What they took.
    pub blob_bytes_removed: u64,
}

impl Collected {
    /// The shape of a round's end.
    pub fn new(collected: &retention::Collected) -> Self {
        Self {
            log_events_removed: collected.log_events,
            log_bytes_removed: collected.log_bytes,
            builds_removed: collected.builds,
            sessions_removed: collected.sessions,
            sources_removed: collected.sources,
            images_removed: collected.images,
            blobs_removed: collected.blobs,
            blob_bytes_removed: collected.blob_bytes,
        }
    }
}

/// A build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Build {
    /// Its id.
    #[schema(value_type = schemas::Id)]
    pub id: String,
    /// Where it is.
    pub status: Status,
    /// 1 for the next to be taken; only while queued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub queue_position: Option<u32>,
    /// Of the manifest; only when ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Digest, required = false)]
    pub image_digest: Option<String>,
    /// `HOST:PORT/REPOSITORY@DIGEST`; only when ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub image_ref: Option<String>,
    /// The failure's message; for a failed step with its number and exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub provenance: Option<Provenance>,
    /// RFC 3339.
    #[schema(value_type = schemas::Time)]
    pub created_at: String,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub started_at: Option<String>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub completed_at: Option<String>,
    /// From `started_at` to `completed_at`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub duration_ms: Option<i64>,
    /// The user's labels.
    #[serde(default)]
    #[schema(required = true)]
    pub tags: BTreeMap<String, String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub failure: Option<Failure>,
    /// Whose it is.
    #[schema(value_type = schemas::TenantName)]
    pub tenant: String,
    /// What it used, as far as is known.
    #[serde(default)]
    #[schema(required = true)]
    pub usage: Usage,
    /// What it pulled.
    #[serde(default)]
    #[schema(required = true)]
    pub pulled: Vec<Pulled>,
    /// What its steps reached through the host, the first 256 hosts and ports.
    #[serde(default)]
    #[schema(required = true)]
    pub reached: Vec<Reached>,
    /// How often it was taken by a VM.
    #[serde(default)]
    #[schema(required = true)]
    pub attempt: u32,
    /// Until when its failed step can be entered (`kiln exec`), RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub kept_until: Option<String>,
    /// Whether somebody entered its VM while it ran (`kiln exec`).
    #[serde(default)]
    #[schema(required = true)]
    pub entered: bool,
}

/// What a build was made from: hypeman's fields that Kiln knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Provenance {
    /// SHA-256 over the source as it was sent, `sha256:…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Digest, required = false)]
    pub source_hash: Option<String>,
    /// SHA-256 over what was asked for beside the source, `sha256:…`: a Dockerfile that was sent apart, the stage, the
    /// build arguments, the base's digest, the secrets' names (`docs/PROVENANCE.md` has the form).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Digest, required = false)]
    pub request_hash: Option<String>,
    /// When the build was completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub timestamp: Option<String>,
    /// The digest that the base had to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Digest, required = false)]
    pub base_image_digest: Option<String>,
    /// Digest of the builder bundle that the build ran in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Digest, required = false)]
    pub builder_digest: Option<String>,
    /// Digest of the kernel that its VM ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Digest, required = false)]
    pub kernel_digest: Option<String>,
    /// What executed the Dockerfile. The guest says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub engine_version: Option<String>,
    /// `sha256:…` of the source's lockfiles, by path. The guest says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub lockfile_hashes: Option<BTreeMap<String, String>>,
    /// Which of these the guest said: the host cannot check them. It has seen all others itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reported_by_guest: Vec<String>,
}

impl Provenance {
    fn of(build: &Stored, timestamp: Option<String>) -> Self {
        let made = &build.provenance;
        let guest = made.guest.as_ref();
        let said = guest.map(|_| vec!["engine_version".into(), "lockfile_hashes".into()]);
        Self {
            source_hash: Some(build.request.source_digest.clone()),
            request_hash: Some(build.request.hash()),
            timestamp,
            base_image_digest: build.request.base_image_digest.clone(),
            builder_digest: made.builder_digest.clone(),
            kernel_digest: made.kernel_digest.clone(),
            engine_version: guest.map(|guest| guest.engine.clone()),
            lockfile_hashes: guest.map(|guest| guest.lockfiles.clone()),
            reported_by_guest: said.unwrap_or_default(),
        }
    }
}

impl Build {
    /// The shape of a build. `public_host` is where clients reach the registry.
    pub fn new(build: &Stored, queue_position: Option<u32>, public_host: &str) -> Self {
        let digest = build.image_digest();
        let completed_at = build.completed_at.map(rfc3339);
        let duration = build
            .started_at
            .zip(build.completed_at)
            .map(|(from, to)| to.saturating_sub(from).max(0));
        Self {
            id: build.id.to_string(),
            status: build.status,
            queue_position: queue_position.filter(|_| build.status == Status::Queued),
            image_digest: digest.map(str::to_owned),
            image_ref: digest
                .map(|digest| format!("{public_host}/{}@{digest}", build.repository())),
            error: build.failure.as_ref().map(error_text),
            provenance: Some(Provenance::of(build, completed_at.clone())),
            created_at: rfc3339(build.created_at),
            started_at: build.started_at.map(rfc3339),
            completed_at,
            duration_ms: duration,
            tags: build.request.tags.clone(),
            failure: build.failure.clone(),
            tenant: build.tenant.to_string(),
            usage: build.usage,
            pulled: build.pulled.clone(),
            reached: build.reached.clone(),
            attempt: build.attempt,
            kept_until: None,
            entered: build.entered,
        }
    }
}

/// The failure's message; a failed step's number and exit code are added where it does not say.
fn error_text(failure: &Failure) -> String {
    let message = &failure.message;
    match (failure.kind, failure.step, failure.exit_code) {
        (FailureKind::StepFailed, Some(step), Some(code)) => {
            let (step, code) = (format!("step {step}"), format!("exit code {code}"));
            if message.contains(&step) && message.contains(&code) {
                message.clone()
            } else {
                format!("{message} ({step}, {code})")
            }
        }
        _ => message.clone(),
    }
}

/// Body of POST `/tokens`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// Whose it will be.
    #[schema(value_type = schemas::TenantName)]
    pub tenant: String,
    /// `reader`, `tenant` or `admin`.
    #[schema(value_type = schemas::RoleName)]
    pub role: String,
    /// How long it lives; for ever where it is absent.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "whole::optional"
    )]
    #[schema(value_type = schemas::TtlSeconds, required = false)]
    pub ttl_seconds: Option<u64>,
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::TokenName, required = false)]
    pub name: Option<String>,
}

/// An API token, as GET `/tokens` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Its public id.
    pub id: String,
    /// Whose it is.
    #[schema(value_type = schemas::TenantName)]
    pub tenant: String,
    /// `reader`, `tenant` or `admin`.
    #[schema(value_type = schemas::RoleName)]
    pub role: String,
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// RFC 3339.
    #[schema(value_type = schemas::Time)]
    pub created_at: String,
    /// RFC 3339; absent for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub expires_at: Option<String>,
    /// Whether it was revoked.
    pub revoked: bool,
    /// Whether its time is over.
    pub expired: bool,
    /// When it was last shown to API or registry, to about a minute, RFC 3339; absent while it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub last_used_at: Option<String>,
    /// The token itself: only in the answer of the POST that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub token: Option<String>,
}

impl Token {
    /// The shape of a token, at that time.
    pub fn new(record: &TokenRecord, now: Millis) -> Self {
        Self {
            id: record.id.clone(),
            tenant: record.tenant.to_string(),
            role: record.role.to_string(),
            name: record.name.clone(),
            created_at: rfc3339(record.created_at),
            expires_at: record.expires_at.map(rfc3339),
            revoked: record.revoked,
            expired: record.expires_at.is_some_and(|end| end <= now),
            last_used_at: record.last_used_at.map(rfc3339),
            token: None,
        }
    }
}

/// A tenant's secret, as GET `/secrets` lists it: never with its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Secret {
    /// What builds call it.
    #[schema(value_type = schemas::SecretId)]
    pub id: String,
    /// RFC 3339: when it was first set.
    #[schema(value_type = schemas::Time)]
    pub created_at: String,
    /// RFC 3339: when its value was set.
    #[schema(value_type = schemas::Time)]
    pub updated_at: String,
}

impl Secret {
    /// The shape of a secret.
    pub fn new(record: &SecretRecord) -> Self {
        Self {
            id: record.id.to_string(),
            created_at: rfc3339(record.created_at),
            updated_at: rfc3339(record.updated_at),
        }
    }
}

/// A session in a VM, as GET `/sessions` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing of a session")]
pub struct Session {
    /// Its id.
    #[schema(value_type = schemas::Id)]
    pub id: String,
    /// The build that was entered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Id, required = false)]
    pub build: Option<String>,
    /// The instance that was entered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Id, required = false)]
    pub instance: Option<String>,
    /// Whose that is.
    #[schema(value_type = schemas::TenantName)]
    pub tenant: String,
    /// Who entered.
    pub by: SessionBy,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Names of the variables that were given; their values are not kept.
    pub env: Vec<String>,
    /// Whether the command or the names went on: only so much is kept.
    #[serde(default)]
    #[schema(required = true)]
    pub cut: bool,
    /// The directory that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub cwd: Option<String>,
    /// The user that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub user: Option<String>,
    /// With a terminal.
    pub tty: bool,
    /// The VM itself.
    pub vm: bool,
    /// With the step's secrets.
    pub with_secrets: bool,
    /// RFC 3339.
    #[schema(value_type = schemas::Time)]
    pub started_at: String,
    /// RFC 3339; absent while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub ended_at: Option<String>,
    /// `exited`, `client_lost`, `timed_out`, `vm_ended`, `server_stopped`, `revoked`, `refused` or `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::SessionEnd, required = false)]
    pub how: Option<String>,
    /// What the client was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub exit_code: Option<u8>,
    /// Why, where the command did not end by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
}

/// Who entered: a token, as it was then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionBy {
    /// The token's public id.
    pub token: String,
    /// The token's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// The token's role.
    #[schema(value_type = schemas::RoleName)]
    pub role: String,
    /// The token's tenant.
    #[schema(value_type = schemas::TenantName)]
    pub tenant: String,
}

impl Session {
    /// The shape of a session.
    pub fn new(session: &StoredSession) -> Self {
        let (build, instance) = match &session.subject {
            Subject::Build(id) => (Some(id.to_string()), None),
            Subject::Instance(id) => (None, Some(id.to_string())),
        };
        let who = &session.who;
        let end = session.end.as_ref();
        Self {
            id: session.id.clone(),
            build,
            instance,
            tenant: session.tenant.to_string(),
            by: SessionBy {
                token: who.token_id.clone(),
                name: who.token_name.clone(),
                role: who.role.to_string(),
                tenant: who.tenant.to_string(),
            },
            command: session.command.clone(),
            env: session.env.clone(),
            cut: session.cut,
            cwd: session.directory.clone(),
            user: session.user.clone(),
            tty: session.tty,
            vm: session.vm,
            with_secrets: session.with_secrets,
            started_at: rfc3339(session.started_at),
            ended_at: end.map(|end| rfc3339(end.at)),
            how: end.map(|end| end.how.as_str().to_owned()),
            exit_code: end.and_then(|end| end.exit_code),
            error: end.and_then(|end| end.why.clone()),
        }
    }
}

/// The names of roles, for messages.
pub(super) fn role_names() -> String {
    Role::ALL.map(Role::as_str).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_is_named_with_its_exit_code() {
        let failure = |message: &str| Failure {
            step: Some(2),
            exit_code: Some(7),
            ..Failure::new(FailureKind::StepFailed, message)
        };
        assert_eq!(error_text(&failure("make failed")), "make failed (step 2, exit code 7)");
        let complete = "step 2 ended with exit code 7";
        assert_eq!(error_text(&failure(complete)), complete);
        assert_eq!(error_text(&Failure::new(FailureKind::VmLost, "gone")), "gone");
    }

    #[test]
    fn times_are_rfc_3339_whatever_they_are() {
        assert_eq!(rfc3339(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(i64::MAX), "1970-01-01T00:00:00.000Z");
    }
}
