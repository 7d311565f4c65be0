//! Going on with a build whose VM has outlived an earlier server.

use std::sync::Arc;

use super::attend::Beginning;
use super::{Driver, Worked};
use crate::queue::journal::{Journal, Notes};
use crate::vmm::Vm;

impl Driver {
    /// What is written down when a VM begins.
    pub(super) fn first_notes(&self, nonce: [u8; kiln_protocol::hello::TOKEN_LEN]) -> Notes {
        Notes {
            nonce,
            tokens: None,
            source_sent: false,
            busy: false,
            seen: crate::gateway::guests::Seen::default(),
            reached: vec![],
            usage: self.build.usage,
            builder_digest: self.workshop.builder_digest.clone(),
            kernel_digest: self.workshop.kernel_digest.clone(),
        }
    }

    /// The session goes on from the last event that is stored. What only the earlier server knew (how much was logged, the
    /// most memory of the steps so far) counts from here.
    pub(super) async fn go_on(&mut self, vm: Vm, notes: Notes) -> Worked {
        tracing::info!("goes on in its VM");
        let (context, way_out) = match self.ways() {
            Ok(ways) => ways,
            Err(why) => return Worked::not(why),
        };
        let context = Arc::new(context.having_seen(notes.seen.clone()));
        self.build.usage = notes.usage;
        self.build.provenance.builder_digest = Some(notes.builder_digest.clone());
        self.build.provenance.kernel_digest = Some(notes.kernel_digest.clone());
        let before = notes.reached.clone();
        let begin = Beginning { nonce: notes.nonce, tokens: notes.tokens.clone(), source: None };
        let journal = Journal::new(vm.dir(), notes);
        let worked = self.in_vm(vm, begin, context, way_out, journal).await;
        let reached = &mut self.build.reached;
        reached.extend(before);
        let mut known = std::collections::HashSet::new();
        reached.retain(|one| known.insert(one.clone()));
        worked
    }
}
