//! Two networks that have nothing but a loopback: the VM's own, and the steps'.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::Context;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, socket};

use super::sys;

/// The steps' network namespace, as `--network ns:…` names it.
pub const STEPS: &str = "/run/netns/steps";

/// The network namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// The port of the steps' loopback that leads to the egress proxy.
pub const EGRESS_PORT: u16 = 3128;
/// The port of the VM's loopback that leads to the registry.
pub const REGISTRY_PORT: u16 = 5000;

/// The port of the steps' loopback where names are asked for.
const NAMES_PORT: u16 = 53;

/// Sockets of each network, each on its port. Nothing listens there until a job says so, and what it does not use is
/// closed with this.
#[derive(Debug)]
pub struct Networks {
    engine: OwnedFd,
    steps: OwnedFd,
    names: OwnedFd,
    names_udp: OwnedFd,
}

/// What the steps' name server listens on.
#[derive(Debug)]
pub struct NameSockets {
    /// For datagrams.
    pub udp: UdpSocket,
    /// For connections.
    pub tcp: TcpListener,
}

impl Networks {
    /// Listens on the VM's own loopback: for the engine.
    pub fn listen_for_engine(&self) -> io::Result<TcpListener> {
        listen(&self.engine)
    }

    /// Listens on the steps' loopback.
    pub fn listen_for_steps(&self) -> io::Result<TcpListener> {
        listen(&self.steps)
    }

    /// Listens for questions for names on the steps' loopback.
    pub fn listen_for_names(&self) -> io::Result<NameSockets> {
        let udp = self.names_udp.try_clone()?.into();
        Ok(NameSockets { udp, tcp: listen(&self.names)? })
    }
}

/// Brings the VM's loopback up and makes the steps' network. The calling thread, and it alone, goes
/// there and comes back: a socket stays in the network that it was made in.
pub fn prepare() -> anyhow::Result<Networks> {
    sys::loopback_up().context("the loopback cannot be brought up")?;
    let engine = bind(SockType::Stream, REGISTRY_PORT).context("no socket for the engine")?;
    let own = File::open(OWN).context("the network namespace cannot be opened")?;
    fs::create_dir_all("/run/netns").context("/run/netns cannot be made")?;
    File::create(STEPS).with_context(|| format!("{STEPS} cannot be made"))?;
    unshare(CloneFlags::CLONE_NEWNET).context("the steps' network cannot be made")?;
    sys::loopback_up().context("the steps' loopback cannot be brought up")?;
    let steps = bind(SockType::Stream, EGRESS_PORT).context("no socket for the steps")?;
    let names = bind(SockType::Stream, NAMES_PORT).context("no socket for the steps' names")?;
    let names_udp =
        bind(SockType::Datagram, NAMES_PORT).context("no socket for the steps' names")?;
    mount(Some(OWN), STEPS, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("the steps' network cannot be kept at {STEPS}"))?;
    setns(own, CloneFlags::CLONE_NEWNET).context("the way back from the steps' network")?;
    Ok(Networks { engine, steps, names, names_udp })
}

/// A socket on a port of the calling thread's loopback.
fn bind(kind: SockType, port: u16) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet, kind, flags, None)?;
    let address = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    socket::bind(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

fn listen(bound: &OwnedFd) -> io::Result<TcpListener> {
    let listener = bound.try_clone()?;
    socket::listen(&listener, Backlog::MAXCONN)?;
    Ok(listener.into())
}
