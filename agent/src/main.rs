//! Kiln's agent: PID 1 of a VM; the OCI runtime's wrapper, or process 1 of an instance's container, when called as
//! one.
//!
//! | room | what |
//! |---|---|
//! | [`init`] | from the kernel's first process to an agent that can dial; reaping; power-off |
//! | [`session`] | Hello, job, events, outcome, resume |
//! | [`source`] | unpacks the source |
//! | [`engine`] | runs the Dockerfile |
//! | [`runtime`] | sees and confines every step |
//! | [`secrets`] | asks for a build's secrets, keeps and wipes them |
//! | [`exec`] | commands that people run in here |
//! | [`run`] | the role of an instance: an image's program in a container |
//! | [`tunnel`], [`vsock`] | the ways to the host |
//! | [`names`] | tells which names steps ask for |
//! | [`accept`] | a listener's connections |

mod accept;
mod dockerfile;
mod engine;
mod events;
mod exec;
mod init;
mod names;
mod run;
mod runtime;
mod secrets;
mod session;
mod source;
mod tunnel;
mod vsock;

use std::ffi::OsStr;
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use kiln_protocol::hello::TOKEN_LEN;
use kiln_protocol::job::{Job, Role, StepNetwork};
use kiln_protocol::port;
use kiln_protocol::preamble::Channel;
use tokio_util::sync::CancellationToken;

use crate::engine::{Buildah, Prepared};
use crate::events::Reporter;
use crate::exec::Enterable;
use crate::init::net::Networks;
use crate::init::{Booted, clock};
use crate::names::Names;
use crate::runtime::CurrentStep;
use crate::session::{Identity, Places, Session};
use crate::tunnel::Tunnel;
use crate::vsock::Vsock;

const NAME: &str = concat!("kiln-agent ", env!("CARGO_PKG_VERSION"));

/// Threads for tasks beside the one of the session with the host; the engine's programs want the CPUs. On a single CPU two
/// would only hand tasks to each other.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(2)
}

fn main() -> ExitCode {
    let called_as = std::env::args_os().next().unwrap_or_default();
    if runtime::is_wrapper_call(OsStr::new(&called_as)) {
        return runtime::wrapper_main();
    }
    // Before the next, for it is a process 1 too.
    if run::inside::is_init_call(OsStr::new(&called_as)) {
        return run::inside::init_main();
    }
    if runtime::is_holder_call(OsStr::new(&called_as)) {
        return runtime::holder_main();
    }
    if exec::leader::is_leader_call(OsStr::new(&called_as)) {
        return exec::leader::leader_main();
    }
    if std::process::id() == 1 {
        init::heap::keep();
        return init::run(agent);
    }
    eprintln!(
        "{NAME} is the first process of a Kiln VM and does nothing elsewhere. \
         Builds are started with `kiln build`."
    );
    ExitCode::from(2)
}

fn agent(booted: Booted) -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).without_time().init();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(workers()).enable_all().build();
    let served = runtime.context("no runtime").and_then(|runtime| {
        let served = runtime.block_on(serve(booted));
        // The VM is about to go: no task is worth waiting for.
        runtime.shutdown_background();
        served
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("the session failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(booted: Booted) -> anyhow::Result<()> {
    let enterable = Enterable::default();
    let step = CurrentStep::default();
    let identity = Identity { agent: NAME.to_owned(), image: booted.image.clone() };
    // Hello says that the VM is ready for a job.
    let (networks, engine) = tokio::task::spawn_blocking({
        let (enterable, step) = (enterable.clone(), step.clone());
        || ready(booted, enterable, step)
    })
    .await??;
    let session = Session::open(Arc::new(Vsock), identity).await?;
    clock::take_from(session.welcome()).context("the clock and the entropy of Welcome")?;
    let nonce = session.welcome().nonce;
    let tunnels = CancellationToken::new();
    let sessions = exec::Server::new(nonce, enterable.clone());
    let listener = exec::listen().context("no port for sessions")?;
    tokio::spawn(sessions.serve(listener, tunnels.clone()));
    let cancel = tunnels.clone();
    let _until_the_end = tunnels.drop_guard();
    let places = Places {
        source: "/var/lib/kiln/source".into(),
        dockerfile: "/var/lib/kiln/Dockerfile".into(),
        certificates: "/var/lib/kiln/certificates.pem".into(),
        secrets: "/run/kiln/secrets".into(),
        instance: run::Places { enterable, ..run::Places::default() },
    };
    // Without the networks' sockets, an instance has every port of its loopback.
    let prepare = move |job: &Job, reporter: &Reporter| {
        let ways = Ways { nonce, networks: &networks, step: &step, reporter, cancel: &cancel };
        ways.open(job).map_err(|error| format!("no way to the host: {error}"))
    };
    session.run(engine, places, prepare).await?;
    Ok(())
}

/// Waits until the VM is ready for a job. It blocks.
fn ready(
    booted: Booted,
    enterable: Enterable,
    step: CurrentStep,
) -> anyhow::Result<(Networks, Prepared)> {
    let networks = booted.wait().context("the VM did not boot")?;
    let engine = Buildah { enterable, step, ..Buildah::default() }
        .prepare()
        .context("the engine's files, cgroup and socket cannot be made")?;
    Ok((networks, engine))
}

/// The ways to the host that a job's engine and steps have.
struct Ways<'a> {
    nonce: [u8; TOKEN_LEN],
    networks: &'a Networks,
    step: &'a CurrentStep,
    reporter: &'a Reporter,
    cancel: &'a CancellationToken,
}

impl Ways<'_> {
    fn open(&self, job: &Job) -> std::io::Result<()> {
        let Role::Build(build) = &job.role else { return Ok(()) };
        let engine = Tunnel::new(Arc::new(Vsock), port::REGISTRY, Channel::Registry, self.nonce);
        self.serve(engine, self.networks.listen_for_engine()?)?;
        if build.network == StepNetwork::Proxy {
            let steps = Tunnel::new(Arc::new(Vsock), port::EGRESS, Channel::Egress, self.nonce)
                .of_steps(self.step.clone());
            self.serve(steps, self.networks.listen_for_steps()?)?;
            Names::new(self.reporter.clone(), self.step.clone())
                .serve(self.networks.listen_for_names()?, self.cancel.clone())?;
        }
        Ok(())
    }

    fn serve(&self, tunnel: Tunnel<Vsock>, listener: TcpListener) -> std::io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tokio::spawn(tunnel.serve(listener, self.cancel.clone()));
        Ok(())
    }
}
