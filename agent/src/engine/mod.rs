//! The seam to the program that executes a Dockerfile.

use std::future::Future;
use std::path::PathBuf;

use kiln_protocol::event::Outcome;
use kiln_protocol::job::StepNetwork;
use tokio_util::sync::CancellationToken;

use crate::events::Reporter;

/// What an engine is to build.
#[derive(Clone, Debug)]
pub struct Work {
    /// The directory of the source.
    pub context: PathBuf,
    /// The Dockerfile.
    pub dockerfile: PathBuf,
    /// The stage to build; the last one otherwise.
    pub target: Option<String>,
    /// `--build-arg`, in order.
    pub build_args: Vec<(String, String)>,
    /// What steps may reach.
    pub network: StepNetwork,
    /// Processes of one step at one time.
    pub processes: u32,
}

/// Builds an image and pushes it to the host's staging.
pub trait Engine {
    /// Runs to the end, or until it is cancelled. Every report is made before it returns.
    fn run(
        &self,
        work: Work,
        reporter: Reporter,
        cancel: CancellationToken,
    ) -> impl Future<Output = Outcome> + Send;
}

/// buildah, from Debian.
#[derive(Debug, Default)]
pub struct Buildah {}

impl Engine for Buildah {
    async fn run(&self, _: Work, _: Reporter, _: CancellationToken) -> Outcome {
        Outcome::Failed(kiln_protocol::event::Failure {
            kind: kiln_protocol::event::FailureKind::EngineCrashed,
            message: "this agent was built without its engine".into(),
            step: None,
            exit_code: None,
            detail: None,
        })
    }
}
