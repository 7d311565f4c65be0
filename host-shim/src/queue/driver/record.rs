//! What a driver stores of its build: tried until it is stored.

use super::Driver;
use super::retry::Tries;
use crate::build::{Build, Change, Refused};
use crate::events::payload;
use crate::store::{NewEvent, StoreError};

impl Driver {
    /// Changes the state and tells it, in one transaction: tried until it is stored.
    pub(super) async fn change(
        &mut self,
        change: Change,
        first: &[NewEvent],
    ) -> Result<(), StoreError> {
        let mut tries = Tries::new(self.abandon.clone(), self.workshop.reserve.clone());
        loop {
            let now = crate::clock::now();
            let next = self.build.apply(change.clone(), now)?;
            let mut events = first.to_vec();
            if next.status != self.build.status {
                events.push(payload::of_host(now, payload::status(next.status, None)));
            }
            let id = &self.build.id;
            let change = change.clone();
            let error =
                match self.workshop.events.change(id, self.fence, change, now, &events).await {
                    Ok(build) => {
                        self.build = build;
                        return Ok(());
                    }
                    // The try before was stored, though its answer was not heard.
                    Err(StoreError::Refused(refused))
                        if tries.have_failed() && is_done(&refused, &next) =>
                    {
                        self.workshop.events.wake(id);
                        self.build = next;
                        return Ok(());
                    }
                    Err(error) => error,
                };
            self.place = None;
            tries.after(error).await?;
        }
    }

    /// Stores what is known of the build besides its state: tried until it is stored.
    pub(super) async fn annotate(&mut self) -> Result<(), StoreError> {
        let mut tries = Tries::new(self.abandon.clone(), self.workshop.reserve.clone());
        while let Err(error) = self.workshop.store.annotate(&self.build, self.fence).await {
            self.place = None;
            tries.after(error).await?;
        }
        Ok(())
    }
}

/// Whether a change was refused because the build is already what it would become.
fn is_done(refused: &Refused, next: &Build) -> bool {
    matches!(refused, Refused::Final(status) | Refused::From(status) if *status == next.status)
}
