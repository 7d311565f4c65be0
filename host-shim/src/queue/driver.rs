//! One task owns one claimed build: it starts the VM, holds its session, publishes, and records
//! the end. Whatever happens, the VM is gone before the build is final: also when a part of the driver panics,
//! and when the end cannot be stored at once.

mod attend;
mod egress;
mod go_on;
mod job;
mod record;
mod retry;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use self::attend::{Attended, Beginning};
pub use self::egress::Egress;
use self::egress::WayOut;
use super::base;
use super::capacity::Memory;
use super::journal::{Journal, Notes};
use super::leaks::{self, Searched};
use super::lease;
use super::live::Entry;
use super::outcome::{self, Next};
use super::workshop::Workshop;
use crate::build::{Build, Change, Failure, FailureKind};
use crate::events::payload;
use crate::gateway::guests::GuestContext;
use crate::publish;
use crate::secrets::Masker;
use crate::staging::{self, Staging};
use crate::store::{Claimed, Fence, StoreError};
use crate::vmm::{Vm, VmSpec};

/// How many VMs are booted for a build before it fails for want of one. Under software emulation
/// and load a boot can hang: once in sixty on the worst day that was seen, never in 150 on another.
const BOOTS: u32 = 2;

/// Layers and configs that one build may stage. An image has at most some hundred.
const MAX_STAGED_BLOBS: usize = 1024;

const GIB: u64 = 1 << 30;

/// The owner of one build.
pub struct Driver {
    workshop: Arc<Workshop>,
    build: Build,
    fence: Fence,
    entry: Entry,
    /// The server ends: builds that are not being published are given up.
    abandon: CancellationToken,
    /// Given back at the end, and as soon as there is nothing left to do but to store it.
    place: Option<Place>,
    /// The VM of an earlier server, where the build has one.
    going_on: Option<(Vm, Notes)>,
}

/// What a build takes of the host's room, until this is dropped.
pub type Place = (OwnedSemaphorePermit, Memory);

/// What is left of a VM's work once the VM is gone.
struct Worked {
    next: Next,
    /// Knows the secrets that the guest was given.
    masker: Masker,
    context: Option<Arc<GuestContext>>,
    /// The VM hung before it reported anything of the build.
    hung: bool,
}

impl Worked {
    /// Nothing, for a fault of the host's.
    fn not(why: String) -> Self {
        let next = Next::Fail(Failure::new(FailureKind::Internal, why));
        Self { next, masker: Masker::default(), context: None, hung: false }
    }
}

impl Driver {
    /// For a build that was just claimed, in its place.
    pub fn new(
        workshop: Arc<Workshop>,
        claimed: Claimed,
        entry: Entry,
        place: Place,
        abandon: CancellationToken,
    ) -> Self {
        let Claimed { build, fence } = claimed;
        Self { workshop, build, fence, entry, abandon, place: Some(place), going_on: None }
    }

    /// Goes on with a VM that runs the build already.
    #[must_use]
    pub fn going_on(self, vm: Vm, notes: Notes) -> Self {
        Self { going_on: Some((vm, notes)), ..self }
    }

    /// Drives the build to its end.
    #[tracing::instrument(name = "build", skip_all, fields(build = %self.build.id, tenant = %self.build.tenant))]
    pub async fn run(mut self) {
        let (workshop, id, fence) = (Arc::clone(&self.workshop), self.build.id.clone(), self.fence);
        let driven = tokio::select! {
            biased;
            // What a panic leaves half done is the VM's, which goes with it: the build itself is changed as a whole.
            driven = AssertUnwindSafe(self.drive()).catch_unwind() => driven,
            () = lease::hold(&workshop, &id, fence) => Ok(Err(StoreError::Fenced)),
        };
        let ended = match driven {
            Ok(ended) => ended,
            Err(_) => self.broke_down().await,
        };
        match ended {
            Ok(()) => {}
            // Somebody else owns the build now: it is theirs to end.
            Err(StoreError::Fenced) => {
                tracing::warn!("the claim was taken over; leaving the build");
            }
            Err(error) => {
                let error = crate::causes::chain(&error);
                tracing::error!(error, "the build's end is not stored; the next start ends it");
            }
        }
    }

    async fn drive(&mut self) -> Result<(), StoreError> {
        tracing::info!("building");
        let Worked { mut next, masker, context, hung: _ } = self.work().await;
        self.annotate().await?;
        if let Next::Publish { digest, guest: _ } = next {
            next = match context {
                Some(context) => match self.publish(digest, context, masker).await? {
                    None => return self.end(Change::Finish).await,
                    Some(instead) => instead,
                },
                None => Next::Fail(Failure::new(
                    FailureKind::Internal,
                    "an image was reported but nothing was staged",
                )),
            };
        }
        match next {
            Next::Fail(failure) => self.end(Change::Fail(failure)).await,
            Next::Cancel => self.end(Change::Cancel).await,
            Next::Abandoned => match outcome::gone_with_its_server(&self.build) {
                Change::Requeue => self.requeue().await,
                change => self.end(change).await,
            },
            // Was published above.
            Next::Publish { .. } => Ok(()),
        }
    }

    /// Ends a build whose driver panicked. The panic itself is in the log already.
    async fn broke_down(&mut self) -> Result<(), StoreError> {
        // It was dropped on the way here, and is removed by a thread of its own.
        self.workshop.vmm.wait_for_removals().await;
        let message = "the host's own program broke down while it ran the build; submit it again, and tell the host's operator if it happens again";
        self.end(Change::Fail(Failure::new(FailureKind::Internal, message))).await
    }

    /// Runs the build in a VM, which is gone when this returns.
    ///
    /// A VM that hangs before it began is replaced: nothing of the build has run in it. One that ends is
    /// not: somebody or something ended it.
    async fn work(&mut self) -> Worked {
        if let Some((vm, notes)) = self.going_on.take() {
            return self.go_on(vm, notes).await;
        }
        for _ in 1..BOOTS {
            let worked = self.work_once().await;
            match &worked.next {
                Next::Fail(failure) if failure.kind == FailureKind::VmLost && worked.hung => {
                    let console = failure.detail.as_deref().unwrap_or("nothing");
                    tracing::warn!(
                        why = failure.message,
                        console,
                        "a VM did not begin; trying another"
                    );
                }
                _ => return worked,
            }
        }
        self.work_once().await
    }

    async fn work_once(&mut self) -> Worked {
        let dir = self.workshop.build_dir(&self.build);
        let source = match tokio::fs::File::open(dir.join("source")).await {
            Ok(source) => source,
            Err(error) => {
                return Worked::not(format!("the build's source cannot be read: {error}"));
            }
        };
        let (context, way_out) = match self.ways() {
            Ok(ways) => ways,
            Err(why) => return Worked::not(why),
        };
        let cancel = self.entry.cancel.clone();
        let spec = VmSpec {
            id: self.build.id.to_string(),
            memory_mb: self.build.request.memory_mb,
            cpus: self.build.request.cpus,
            disk_gb: self.build.request.disk_gb,
            image: None,
        };
        let started = cancel.run_until_cancelled(self.workshop.start(spec)).await;
        let vm = match started {
            None => {
                // What had started was dropped: who is told of the cancel may count on its end.
                self.workshop.vmm.wait_for_removals().await;
                let masker = Masker::default();
                return Worked { next: Next::Cancel, masker, context: None, hung: false };
            }
            Some(Err(error)) => {
                tracing::error!(error = %crate::causes::chain(&error), "cannot start a VM");
                return Worked::not(format!("the host could not start a VM: {error}"));
            }
            Some(Ok(vm)) => vm,
        };
        self.build.provenance.builder_digest = Some(self.workshop.builder_digest.clone());
        self.build.provenance.kernel_digest = Some(self.workshop.kernel_digest.clone());
        let since_submit = crate::clock::now() - self.build.created_at;
        let running = i64::try_from(vm.started().elapsed().as_millis()).unwrap_or(i64::MAX);
        self.build.usage.vm_start_ms = u64::try_from(since_submit - running).ok();
        crate::points::point("started");
        let nonce = crate::random::bytes();
        let journal = Journal::new(vm.dir(), self.first_notes(nonce));
        let begin = Beginning { nonce, tokens: None, source: Some(source) };
        self.in_vm(vm, begin, Arc::new(context), way_out, journal).await
    }

    /// Where the VM's ways lead to.
    fn ways(&self) -> Result<(GuestContext, Option<WayOut>), String> {
        let dir = self.workshop.build_dir(&self.build);
        let staging = Staging::new(dir.join("staging"), self.staging_limits())
            .map_err(|error| format!("the build's staging cannot be made: {error}"))?;
        let way_out = self
            .workshop
            .egress
            .way_out(&self.build, &self.workshop.events)
            .map_err(|error| format!("the host's own addresses cannot be listed: {error}"))?;
        let context = GuestContext::new(
            self.build.id.clone(),
            self.build.tenant.clone(),
            Arc::new(staging),
            self.workshop.backing.clone(),
            self.workshop.upstreams.clone(),
        );
        Ok((context, way_out))
    }

    /// Serves the VM to its end, which is the end of its work, too.
    async fn in_vm(
        &mut self,
        vm: Vm,
        begin: Beginning,
        context: Arc<GuestContext>,
        way_out: Option<WayOut>,
        journal: Arc<Journal>,
    ) -> Worked {
        let Attended { next, masker, hung, .. } =
            self.attend(vm, begin, Arc::clone(&context), way_out, journal).await;
        crate::points::point("outcome");
        self.build.pulled = context.pulled();
        self.workshop.events.metrics().staged(context.staging().used_bytes());
        let next = match &self.build.request.base_image_digest {
            Some(pin) => {
                let next = outcome::pinned(next, pin, &self.build.pulled);
                self.check_base(next, pin, &context).await
            }
            None => next,
        };
        if let Next::Publish { guest, .. } = &next {
            self.build.provenance.guest = Some(guest.clone());
        }
        Worked { next, masker, context: Some(context), hung }
    }

    /// Holds an image that is to be published to the base that the build asks for.
    async fn check_base(&self, next: Next, pin: &str, context: &GuestContext) -> Next {
        let Next::Publish { digest, .. } = &next else { return next };
        let pulled = &self.build.pulled;
        match base::is_built_on(context, &self.workshop.backing, pulled, pin, digest).await {
            Ok(true) => next,
            Ok(false) => Next::Fail(Failure::new(
                FailureKind::BaseDigestMismatch,
                format!("the image is not built on {pin}, which the build asks for"),
            )),
            Err(error) => {
                tracing::error!(error = %crate::causes::chain(&error), "cannot check a build's base");
                let message = format!("the host could not check the image's base: {error}");
                Next::Fail(Failure::new(FailureKind::Internal, message))
            }
        }
    }

    /// Checks what was staged, records its digest, and pushes it. `None` when it is published.
    async fn publish(
        &mut self,
        digest: String,
        context: Arc<GuestContext>,
        masker: Masker,
    ) -> Result<Option<Next>, StoreError> {
        let checked = match publish::check(&context, &digest).await {
            Ok(checked) => checked,
            Err(error) => return Ok(Some(Next::Fail(publish_failure(&error)))),
        };
        let disk = u64::from(self.build.request.disk_gb) * GIB;
        let stops = vec![self.entry.cancel.clone(), self.abandon.clone()];
        match leaks::search(&context, &checked, masker, disk, stops).await {
            Searched::Clean => {}
            Searched::Refused(failure) => return Ok(Some(Next::Fail(failure))),
            Searched::Stopped if self.abandon.is_cancelled() => {
                return Ok(Some(Next::Abandoned));
            }
            Searched::Stopped => return Ok(Some(Next::Cancel)),
        }
        if self.build.status != crate::build::Status::Pushing {
            self.change(Change::Push, &[]).await?;
        }
        if self.entry.cancel.is_cancelled() {
            return Ok(Some(Next::Cancel));
        }
        self.change(Change::Publish(digest.clone()), &[]).await?;
        self.entry.settle();
        crate::points::point("publishing");
        tracing::info!(digest, "publishing");
        let (repository, tag) = (self.build.repository(), self.build.tag().to_owned());
        let Workshop { backing, upstreams, .. } = &*self.workshop;
        match publish::push(&checked, backing, upstreams, &repository, &tag).await {
            Ok(()) => {
                crate::points::point("pushed");
                Ok(None)
            }
            Err(error) => Ok(Some(Next::Fail(publish_failure(&error)))),
        }
    }

    /// Removes what was made for the build, then makes its end known.
    async fn end(&mut self, change: Change) -> Result<(), StoreError> {
        let dir = self.workshop.build_dir(&self.build);
        if let Err(error) = tokio::fs::remove_dir_all(&dir).await {
            tracing::warn!(%error, dir = %dir.display(), "cannot remove the build's directory");
        }
        let first = match &change {
            Change::Fail(failure) => {
                vec![payload::of_host(crate::clock::now(), payload::failure(failure))]
            }
            _ => vec![],
        };
        self.change(change, &first).await?;
        crate::points::point("ended");
        tracing::info!(status = %self.build.status, cause = ?self.build.failure.as_ref().map(|f| f.kind), "finished");
        Ok(())
    }

    /// Gives it back to the queue, for the next server. Its source stays.
    async fn requeue(&mut self) -> Result<(), StoreError> {
        let staging = self.workshop.build_dir(&self.build).join("staging");
        if let Err(error) = tokio::fs::remove_dir_all(&staging).await {
            tracing::debug!(%error, dir = %staging.display(), "no staging to remove");
        }
        let first = [payload::of_host(crate::clock::now(), payload::kiln_log(AGAIN))];
        self.change(Change::Requeue, &first).await?;
        tracing::info!("back in the queue");
        Ok(())
    }

    fn staging_limits(&self) -> staging::Limits {
        let max_bytes = u64::from(self.build.request.disk_gb) * GIB;
        staging::Limits { max_bytes, max_blobs: MAX_STAGED_BLOBS }
    }
}

/// What the log of a build says whose VM went with a server.
pub(super) const AGAIN: &str =
    "the host was restarted while the build ran: it is built again, from the beginning";

/// The failure of a build whose image was not published.
pub(super) fn publish_failure(error: &publish::PublishError) -> Failure {
    Failure::new(error.failure_kind(), error.to_string()).with_detail(error.detail())
}
