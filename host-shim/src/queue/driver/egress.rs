//! What the steps of a build may reach.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::build::Build;
use crate::egress::{EgressContext, Reach};
use crate::queue::egress_log::LogEgress;

/// What the steps of every build may reach beyond what is public, and never.
#[derive(Clone, Debug)]
pub struct Egress {
    /// The operator's ranges.
    pub permitted: Vec<IpNet>,
    /// The host's own addresses.
    pub own: Vec<IpAddr>,
    /// Certificates, as PEM, that steps trust besides the public ones.
    pub ca: Vec<u8>,
}

impl Egress {
    /// For the steps of one build.
    pub(super) fn context(&self, build: &Build) -> EgressContext {
        let Self { permitted, own, ca: _ } = self.clone();
        let log = Arc::new(LogEgress::new(build.id.clone()));
        EgressContext::new(Reach::Public, permitted, own, log)
    }
}
