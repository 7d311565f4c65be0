//! The engine: what executes a Dockerfile. buildah now, another one later.
//!
//! An engine reports while it works and gives one outcome. What decides about a step comes from
//! the runtime's wrapper ([`crate::runtime`]), not from what an engine prints.

mod buildah;
mod command;
mod failure;
mod files;
mod output;
mod parse;
mod process;

use std::future::Future;
use std::path::PathBuf;

use kiln_protocol::event::Outcome;
use kiln_protocol::job::StepNetwork;
use tokio_util::sync::CancellationToken;

pub use buildah::{Buildah, Prepared, step_memory};

use crate::events::Reporter;
use crate::secrets::Secret;

/// What an engine is to do.
#[derive(Clone)]
pub struct Work {
    /// The unpacked source.
    pub context: PathBuf,
    /// The Dockerfile.
    pub dockerfile: PathBuf,
    /// Its own list of what is left out of the context, which then counts alone.
    pub ignore_file: Option<PathBuf>,
    /// The stage to build; the last one otherwise.
    pub target: Option<String>,
    /// Whether a step that fails stays, to be entered.
    pub keep_failed: bool,
    /// Ends the processes of the step that runs, so that it fails.
    pub end_step: CancellationToken,
    /// Build arguments, in order. Never to be logged.
    pub build_args: Vec<(String, String)>,
    /// Certificates that steps trust, where they are not their image's own.
    pub certificates: Option<PathBuf>,
    /// What steps may reach.
    pub network: StepNetwork,
    /// The most processes of one step.
    pub processes: u32,
    /// The other registries that the gateway leads to.
    pub upstreams: Vec<String>,
    /// What steps may mount, or have as a variable.
    pub secrets: Vec<Secret>,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work")
            .field("context", &self.context)
            .field("dockerfile", &self.dockerfile)
            .field("ignore_file", &self.ignore_file)
            .field("certificates", &self.certificates)
            .field("target", &self.target)
            .field("keep_failed", &self.keep_failed)
            .field("build_args", &format_args!("{} of them", self.build_args.len()))
            .field("network", &self.network)
            .field("processes", &self.processes)
            .field("upstreams", &self.upstreams)
            .field("secrets", &self.secrets)
            .finish_non_exhaustive()
    }
}

/// Executes a Dockerfile and pushes the image to the build's staging.
pub trait Engine {
    /// Works until the image is in staging, something fails, or it is cancelled. All its processes
    /// are killed by then.
    fn run(
        self,
        work: Work,
        reporter: Reporter,
        cancel: CancellationToken,
    ) -> impl Future<Output = Outcome> + Send;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_arguments_are_not_in_debug_output() {
        let work = Work {
            context: "/c".into(),
            dockerfile: "/c/Dockerfile".into(),
            ignore_file: None,
            certificates: None,
            target: None,
            build_args: vec![("KEY".into(), "hunter2".into())],
            network: StepNetwork::None,
            processes: 1,
            upstreams: vec![],
            secrets: vec![],
            keep_failed: false,
            end_step: CancellationToken::new(),
        };
        let shown = format!("{work:?}");
        assert!(
            shown.contains("1 of them") && !shown.contains("hunter2") && !shown.contains("KEY")
        );
    }
}
