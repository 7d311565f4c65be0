//! One task owns one claimed build: it starts the VM, holds its session, publishes, and records
//! the end. Whatever happens, the VM is gone before the build is final: also when a part of the driver panics,
//! and when the end cannot be stored at once.

mod egress;
mod job;
mod retry;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::preamble::Channel;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::egress::Egress;
use self::egress::WayOut;
use self::job::job;
use self::retry::Tries;
use super::base;
use super::capacity::Memory;
use super::egress_log::AllSeen;
use super::leaks::{self, Searched};
use super::live::Entry;
use super::outcome::{self, Next};
use super::sink::BuildSink;
use super::workshop::Workshop;
use crate::build::{Build, Change, Failure, FailureKind, Refused};
use crate::events::payload;
use crate::exec::Doorway;
use crate::gateway::guests::{self, GuestContext};
use crate::kept::Guest;
use crate::publish;
use crate::secrets::Masker;
use crate::session::{self, End};
use crate::staging::{self, Staging};
use crate::store::{Claimed, Fence, NewEvent, StoreError};
use crate::tunnel;
use crate::vmm::{Vm, VmSpec};

/// How long a VM may take to say Hello, and then to begin its job. Generous: under software emulation on
/// a busy host a boot takes up to 12 s, and a VM that dies is noticed at once anyway.
const BOOT_DEADLINE: Duration = Duration::from_secs(45);

/// How many VMs are booted for a build before it fails for want of one. Under software emulation
/// and load a boot can hang: once in sixty on the worst day that was seen, never in 150 on another.
const BOOTS: u32 = 2;

/// How much later than the guest's own deadline the host's is, so that the guest's report, with
/// the step that ran, arrives.
const DEADLINE_MARGIN: Duration = Duration::from_secs(15);

/// How long a session may take to read what a VM that ended had still sent.
const LAST_WORDS: Duration = Duration::from_secs(1);

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
        Self { workshop, build, fence, entry, abandon, place: Some(place) }
    }

    /// Drives the build to its end.
    #[tracing::instrument(name = "build", skip_all, fields(build = %self.build.id, tenant = %self.build.tenant))]
    pub async fn run(mut self) {
        // What a panic leaves half done is the VM's, which goes with it: the build itself is changed as a whole.
        let ended = match AssertUnwindSafe(self.drive()).catch_unwind().await {
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
        let fail = |kind, message: String| Worked {
            next: Next::Fail(Failure::new(kind, message)),
            masker: Masker::default(),
            context: None,
            hung: false,
        };
        let dir = self.workshop.build_dir(&self.build);
        let source = match tokio::fs::File::open(dir.join("source")).await {
            Ok(source) => source,
            Err(error) => {
                return fail(
                    FailureKind::Internal,
                    format!("the build's source cannot be read: {error}"),
                );
            }
        };
        let staging = match Staging::new(dir.join("staging"), self.staging_limits()) {
            Ok(staging) => Arc::new(staging),
            Err(error) => {
                return fail(
                    FailureKind::Internal,
                    format!("the build's staging cannot be made: {error}"),
                );
            }
        };
        let way_out = match self.workshop.egress.way_out(&self.build, &self.workshop.events) {
            Ok(way_out) => way_out,
            Err(error) => {
                return fail(
                    FailureKind::Internal,
                    format!("the host's own addresses cannot be listed: {error}"),
                );
            }
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
                let masker = Masker::default();
                return Worked { next: Next::Cancel, masker, context: None, hung: false };
            }
            Some(Err(error)) => {
                tracing::error!(error = %crate::causes::chain(&error), "cannot start a VM");
                return fail(
                    FailureKind::Internal,
                    format!("the host could not start a VM: {error}"),
                );
            }
            Some(Ok(vm)) => vm,
        };
        self.build.provenance.builder_digest = Some(self.workshop.builder_digest.clone());
        self.build.provenance.kernel_digest = Some(self.workshop.kernel_digest.clone());
        let since_submit = crate::clock::now() - self.build.created_at;
        let running = i64::try_from(vm.started().elapsed().as_millis()).unwrap_or(i64::MAX);
        self.build.usage.vm_start_ms = u64::try_from(since_submit - running).ok();
        let context = Arc::new(GuestContext::new(
            self.build.id.clone(),
            self.build.tenant.clone(),
            staging,
            self.workshop.backing.clone(),
            self.workshop.upstreams.clone(),
        ));
        let (next, masker, hung) = self.attend(vm, source, Arc::clone(&context), way_out).await;
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

    /// Serves a VM until its session ends, and destroys it. Tells besides whether it hung before it began.
    async fn attend(
        &mut self,
        vm: Vm,
        source: tokio::fs::File,
        context: Arc<GuestContext>,
        way_out: Option<WayOut>,
    ) -> (Next, Masker, bool) {
        let nonce: [u8; TOKEN_LEN] = crate::random::bytes();
        let gone = CancellationToken::new();
        // A failed step that is entered may go on to fetch what it needs.
        let offline = CancellationToken::new();
        // Neither outlives the VM, whatever becomes of this.
        let (_registry, egress) = (gone.clone().drop_guard(), offline.clone().drop_guard());
        let tunnels = TaskTracker::new();
        {
            let (context, stop) = (Arc::clone(&context), gone.clone());
            tunnels.spawn(tunnel::accept(
                Arc::clone(&vm.registry),
                Channel::Registry,
                nonce,
                gone.clone(),
                move |stream, _| guests::serve(stream, Arc::clone(&context), stop.clone()),
            ));
        }
        let record = way_out.as_ref().map(|way_out| Arc::clone(&way_out.record));
        if let Some(WayOut { context, record: _ }) = way_out {
            let stop = offline.clone();
            tokio::spawn(tunnel::accept(
                Arc::clone(&vm.egress),
                Channel::Egress,
                nonce,
                offline.clone(),
                move |stream, preamble| {
                    let by = preamble.step.map(|number| number.get().into());
                    crate::egress::serve(stream, by, Arc::clone(&context), stop.clone())
                },
            ));
        }
        let started = vm.started().into();
        let params = session::Params {
            job: job(&self.workshop, &self.build),
            started,
            source: Some(source),
            nonce,
            boot_deadline: BOOT_DEADLINE,
            cancel_grace: session::CANCEL_GRACE,
        };
        let doorway = Doorway::new(self.entry.door.clone(), vm.dialer(), nonce);
        let mut sink =
            BuildSink::new(&self.workshop, &mut self.build, self.fence, context, started, doorway)
                .with_egress(record.clone());
        let allowed = sink.timeout();
        // A VM that hangs before it begins is told by then, however short the timeout is.
        let deadline = started + (allowed + DEADLINE_MARGIN).max(2 * BOOT_DEADLINE);
        let cancel = self.entry.cancel.clone();
        let (mut ended, mut kept) = (false, false);
        let next = {
            let session = session::run(Arc::clone(&vm.control), &mut sink, params, cancel);
            tokio::pin!(session);
            tokio::select! {
                biased;
                () = self.abandon.cancelled() => Next::Fail(abandoned()),
                end = &mut session => {
                    kept = matches!(end, End::Kept(_));
                    outcome::next(end)
                }
                exit = vm.exited() => {
                    ended = true;
                    // What the VM had sent before it ended is still in the sockets.
                    match timeout(LAST_WORDS, &mut session).await {
                        Ok(end @ (End::Outcome(_) | End::Cancelled(_))) => outcome::next(end),
                        _ => Next::Fail(Failure::new(
                            FailureKind::VmLost,
                            format!("the VM was lost: {exit}. If it happens again, ask the host's operator"),
                        )),
                    }
                }
                () = tokio::time::sleep_until(deadline) => {
                    let seconds = allowed.as_secs();
                    Next::Fail(Failure::new(
                        FailureKind::TimedOut,
                        format!("the build ran longer than its timeout of {seconds} s, and its VM did not say where"),
                    ))
                }
            }
        };
        let begun = sink.begun();
        let mut masker = sink.into_masker();
        masker.prepare().await;
        let next = match next {
            Next::Fail(failure) if failure.kind == FailureKind::VmLost => {
                let console = vm.console_tail().await;
                Next::Fail(match console {
                    Some(tail) if failure.detail.is_none() => failure.with_detail(tail),
                    _ => failure,
                })
            }
            next => next,
        };
        let next = match next {
            Next::Fail(failure) => Next::Fail(masked(failure, &masker)),
            next => next,
        };
        gone.cancel();
        tunnels.close();
        tunnels.wait().await;
        if !kept {
            offline.cancel();
        }
        let seen = match record {
            Some(record) => record.close().await,
            None => AllSeen::default(),
        };
        let next = outcome::denied(next, &seen.wanted);
        self.build.reached = seen.reached;
        if kept {
            let guest = self.lodger(nonce, Box::new(egress));
            self.workshop.kept.keep(vm, guest).await;
        } else if let Err(error) = vm.destroy().await {
            tracing::error!(error = %crate::causes::chain(&error), "the VM was not removed completely");
        }
        (next, masker, !begun && !ended)
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
                return Ok(Some(Next::Fail(abandoned())));
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
        tracing::info!(digest, "publishing");
        let (repository, tag) = (self.build.repository(), self.build.tag().to_owned());
        let Workshop { backing, upstreams, .. } = &*self.workshop;
        match publish::push(&checked, backing, upstreams, &repository, &tag).await {
            Ok(()) => Ok(None),
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
        tracing::info!(status = %self.build.status, cause = ?self.build.failure.as_ref().map(|f| f.kind), "finished");
        Ok(())
    }

    /// Changes the state and tells it, in one transaction: tried until it is stored.
    async fn change(&mut self, change: Change, first: &[NewEvent]) -> Result<(), StoreError> {
        let mut tries = Tries::new(self.abandon.clone());
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
    async fn annotate(&mut self) -> Result<(), StoreError> {
        let mut tries = Tries::new(self.abandon.clone());
        while let Err(error) = self.workshop.store.annotate(&self.build, self.fence).await {
            self.place = None;
            tries.after(error).await?;
        }
        Ok(())
    }

    fn staging_limits(&self) -> staging::Limits {
        let max_bytes = u64::from(self.build.request.disk_gb) * GIB;
        staging::Limits { max_bytes, max_blobs: MAX_STAGED_BLOBS }
    }

    /// How a VM with the step that failed is kept.
    fn lodger(&self, nonce: [u8; TOKEN_LEN], with_it: Box<dyn Send + Sync>) -> Guest {
        let request = &self.build.request;
        Guest {
            id: self.build.id.clone(),
            tenant: self.build.tenant.clone(),
            memory_mb: request.memory_mb,
            seconds: request.keep_failed_seconds,
            nonce,
            with_it,
        }
    }
}

/// Whether a change was refused because the build is already what it would become.
fn is_done(refused: &Refused, next: &Build) -> bool {
    matches!(refused, Refused::Final(status) | Refused::From(status) if *status == next.status)
}

/// The failure of a build that the server's end gave up.
fn abandoned() -> Failure {
    let message = "the host was shut down while the build ran; submit it again";
    Failure::new(FailureKind::HostRestarted, message)
}

/// A failure without the build's secrets: it may quote what a step printed, or the step itself.
fn masked(failure: Failure, masker: &Masker) -> Failure {
    let Failure { kind, message, step, exit_code, detail } = failure;
    let detail = detail.map(|detail| masker.text(&detail));
    Failure { kind, message: masker.text(&message), step, exit_code, detail }
}

/// The failure of a build whose image was not published.
pub(super) fn publish_failure(error: &publish::PublishError) -> Failure {
    Failure::new(error.failure_kind(), error.to_string()).with_detail(error.detail())
}
