//! A VM of a build: what it asks of the host is served until its session ends; then it is destroyed, or kept.

use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::preamble::Channel;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::Driver;
use super::egress::WayOut;
use super::job::job;
use crate::build::{Failure, FailureKind};
use crate::exec::Doorway;
use crate::gateway::guests::{self, GuestContext};
use crate::kept::Guest;
use crate::queue::egress_log::{AllSeen, EgressRecord};
use crate::queue::journal::Journal;
use crate::queue::outcome::{self, Next};
use crate::queue::sink::BuildSink;
use crate::secrets::Masker;
use crate::session::{self, End, Tokens};
use crate::tunnel;
use crate::vmm::Vm;

/// How long a VM may take to say Hello, and then to begin its job. Generous: under software emulation on
/// a busy host a boot takes up to 12 s, and a VM that dies is noticed at once anyway.
const BOOT_DEADLINE: Duration = Duration::from_secs(45);

/// How much later than the guest's own deadline the host's is, so that the guest's report, with
/// the step that ran, arrives.
const DEADLINE_MARGIN: Duration = Duration::from_secs(15);

/// How long a session may take to read what a VM that ended had still sent.
const LAST_WORDS: Duration = Duration::from_secs(1);

type Nonce = [u8; TOKEN_LEN];

/// What became of a VM's session.
pub(super) struct Attended {
    pub(super) next: Next,
    /// Knows the secrets that the guest was given.
    pub(super) masker: Masker,
    /// The VM hung before it reported anything of the build.
    pub(super) hung: bool,
    /// The VM waits to be entered.
    kept: bool,
}

/// How a session begins.
pub(super) struct Beginning {
    /// For the preambles of the VM's other connections.
    pub(super) nonce: Nonce,
    /// What the agent shows where it had a session with an earlier server.
    pub(super) tokens: Option<Tokens>,
    /// What it is sent where it had none.
    pub(super) source: Option<tokio::fs::File>,
}

impl Driver {
    /// Serves a VM until its session ends, and destroys or keeps it.
    pub(super) async fn attend(
        &mut self,
        vm: Vm,
        begin: Beginning,
        context: Arc<GuestContext>,
        way_out: Option<WayOut>,
        journal: Arc<Journal>,
    ) -> Attended {
        let nonce = begin.nonce;
        let ways = Ways::open(&vm, nonce, Arc::clone(&context), way_out, &journal);
        let record = ways.record.clone();
        let mut attended = self.hold(&vm, begin, context, record, journal).await;
        if let Next::Fail(failure) = attended.next {
            attended.next = Next::Fail(told(failure, &vm, &attended.masker).await);
        }
        let (seen, way_out) = ways.close(attended.kept).await;
        attended.next = outcome::denied(attended.next, &seen.wanted);
        self.build.reached = seen.reached;
        if let Some(way_out) = way_out {
            let guest = self.lodger(nonce, Box::new(way_out));
            self.workshop.kept.keep(vm, guest).await;
        } else if let Err(error) = vm.destroy().await {
            tracing::error!(error = %crate::causes::chain(&error), "the VM was not removed completely");
        }
        attended
    }

    /// Holds the session until it, the VM, the build's time or the server's ends.
    async fn hold(
        &mut self,
        vm: &Vm,
        begin: Beginning,
        context: Arc<GuestContext>,
        record: Option<Arc<EgressRecord>>,
        journal: Arc<Journal>,
    ) -> Attended {
        let Beginning { nonce, tokens, source } = begin;
        let goes_on = tokens.is_some();
        let started = vm.started().into();
        let params = session::Params {
            job: job(&self.workshop, &self.build),
            started,
            source,
            nonce,
            boot_deadline: BOOT_DEADLINE,
            cancel_grace: session::CANCEL_GRACE,
            resumed: tokens,
        };
        let doorway = Doorway::new(self.entry.door.clone(), vm.dialer(), nonce);
        let mut sink = BuildSink::new(
            &self.workshop,
            &mut self.build,
            self.fence,
            context,
            started,
            doorway,
            journal,
        )
        .with_egress(record);
        if goes_on {
            sink = sink.begun_before();
        }
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
                () = self.abandon.cancelled() => Next::Abandoned,
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
        let hung = !sink.begun() && !ended;
        let mut masker = sink.into_masker();
        masker.prepare().await;
        Attended { next, masker, hung, kept }
    }

    /// How a VM with the step that failed is kept.
    fn lodger(&self, nonce: Nonce, with_it: Box<dyn Send + Sync>) -> Guest {
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

/// The ways from a VM to the registry and out. They end when this is dropped, whatever becomes of the build.
struct Ways {
    registry: DropGuard,
    /// Those to the registry.
    tunnels: TaskTracker,
    way_out: DropGuard,
    /// What goes out, where anything may.
    record: Option<Arc<EgressRecord>>,
}

impl Ways {
    fn open(
        vm: &Vm,
        nonce: Nonce,
        seen: Arc<GuestContext>,
        way_out: Option<WayOut>,
        journal: &Arc<Journal>,
    ) -> Self {
        let (gone, offline) = (CancellationToken::new(), CancellationToken::new());
        let tunnels = TaskTracker::new();
        let stop = gone.clone();
        tunnels.spawn(tunnel::accept(
            Arc::clone(&vm.registry),
            Channel::Registry,
            nonce,
            gone.clone(),
            {
                let (context, journal) = (Arc::clone(&seen), Arc::clone(journal));
                // Engines keep connections that they do not use, and open others when those are gone.
                move |stream, _| {
                    let (journal, seen) = (Arc::clone(&journal), Arc::clone(&context));
                    let begins = move || journal.tunnel(&seen, None);
                    guests::serve(stream, Arc::clone(&context), stop.clone(), begins)
                }
            },
        ));
        let record = way_out.as_ref().map(|way_out| Arc::clone(&way_out.record));
        if let Some(WayOut { context, record }) = way_out {
            let stop = offline.clone();
            let journal = Arc::clone(journal);
            tokio::spawn(tunnel::accept(
                Arc::clone(&vm.egress),
                Channel::Egress,
                nonce,
                offline.clone(),
                move |stream, preamble| {
                    let by = preamble.step.map(|number| number.get().into());
                    let open = journal.tunnel(&seen, Some(&record));
                    let served =
                        crate::egress::serve(stream, by, Arc::clone(&context), stop.clone());
                    async move {
                        served.await;
                        drop(open);
                    }
                },
            ));
        }
        Self { registry: gone.drop_guard(), tunnels, way_out: offline.drop_guard(), record }
    }

    /// Ends what belongs to the build, and gives what was seen of it. The way out of a VM that is kept goes on until what
    /// is given back is dropped: who enters a failed step may go on to fetch what it needs.
    async fn close(self, kept: bool) -> (AllSeen, Option<DropGuard>) {
        drop(self.registry);
        self.tunnels.close();
        self.tunnels.wait().await;
        let way_out = kept.then_some(self.way_out);
        let seen = match self.record {
            Some(record) => record.close().await,
            None => AllSeen::default(),
        };
        (seen, way_out)
    }
}

/// A failure with what the console of a lost VM said, and without the build's secrets: it may quote what a step
/// printed, or the step itself.
async fn told(failure: Failure, vm: &Vm, masker: &Masker) -> Failure {
    let Failure { kind, message, step, exit_code, mut detail } = failure;
    if kind == FailureKind::VmLost && detail.is_none() {
        detail = vm.console_tail().await;
    }
    let detail = detail.map(|detail| masker.text(&detail));
    Failure { kind, message: masker.text(&message), step, exit_code, detail }
}
