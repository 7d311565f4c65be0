//! What the steps of a build may reach.

use std::io;
use std::sync::Arc;

use ipnet::IpNet;

use crate::build::{Build, NetworkMode};
use crate::egress::domains::Domain;
use crate::egress::policy::own_addresses;
use crate::egress::{EgressContext, Reach};
use crate::events::EventLog;
use crate::queue::egress_log::EgressRecord;

/// What the steps of every build may reach beyond what is public.
#[derive(Clone, Debug)]
pub struct Egress {
    /// The operator's ranges.
    pub permitted: Vec<IpNet>,
    /// Certificates, as PEM, that steps trust besides the public ones.
    pub ca: Vec<u8>,
}

/// The way out of one build's steps.
pub(super) struct WayOut {
    pub(super) context: Arc<EgressContext>,
    pub(super) record: Arc<EgressRecord>,
}

impl Egress {
    /// For the steps of one build; `None` where they have no network.
    pub(super) fn way_out(&self, build: &Build, events: &EventLog) -> io::Result<Option<WayOut>> {
        let reach = match build.request.network {
            NetworkMode::None => return Ok(None),
            NetworkMode::Allowlist => Reach::Listed(listed(build)),
            NetworkMode::Open => Reach::Public,
        };
        // Each time: interfaces come and go while the server runs.
        let own = own_addresses()?;
        let record = EgressRecord::new(build.id.clone(), events.clone(), reach.clone());
        let observer = Arc::clone(&record);
        let context = EgressContext::new(reach, self.permitted.clone(), own, observer);
        Ok(Some(WayOut { context: Arc::new(context), record }))
    }
}

/// The build's list. Its entries were read when it was submitted; one that is none any more allows nothing.
fn listed(build: &Build) -> Arc<[Domain]> {
    let read = |entry: &String| {
        Domain::parse(entry)
            .inspect_err(|bad| tracing::error!(entry, %bad, "a domain of the build is not one"))
            .ok()
    };
    build.request.allowed_domains.iter().filter_map(read).collect()
}
