//! What a VM is told to do for a build.

use kiln_protocol::job::{BuildJob, Dockerfile, Job, Limits, Role, StepNetwork};

use super::GIB;
use crate::build::{Build, NetworkMode};
use crate::queue::Workshop;

/// Processes of one step at one time.
const MAX_PROCESSES: u32 = 4096;

/// Files and directories of one source.
const MAX_SOURCE_ENTRIES: u64 = 1_000_000;

/// Of the disk, how much an unpacked source may fill; the rest is for the build.
const SOURCE_SHARE: u64 = 2;

/// The job of a build, as the agent takes it.
pub(super) fn job(workshop: &Workshop, build: &Build) -> Job {
    let request = &build.request;
    let dockerfile = match &request.dockerfile {
        Some(content) => Dockerfile::Inline(content.clone().into_bytes()),
        None => Dockerfile::InSource("Dockerfile".into()),
    };
    let job = BuildJob {
        dockerfile,
        target: request.target.clone(),
        build_args: request.build_args.clone().into_iter().collect(),
        network: match request.network {
            NetworkMode::None => StepNetwork::None,
            NetworkMode::Allowlist | NetworkMode::Open => StepNetwork::Proxy,
        },
        base_digest: request.base_image_digest.clone(),
        egress_ca: workshop.egress.ca.clone(),
        secrets: request.secrets.clone(),
        keep_failed: request.keep_failed_seconds > 0 && workshop.kept.is_open(),
        upstreams: workshop.upstreams.hosts(),
    };
    let limits = Limits {
        timeout_ms: u64::from(request.timeout_seconds) * 1000,
        spent_ms: 0,
        log_bytes: workshop.log_limit,
        processes: MAX_PROCESSES,
        source_bytes: u64::from(request.disk_gb) * GIB / SOURCE_SHARE,
        source_entries: MAX_SOURCE_ENTRIES,
    };
    Job { build: build.id.clone(), role: Role::Build(job), limits }
}
