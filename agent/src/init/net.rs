//! Two networks that have nothing but a loopback: the VM's own, and the steps'.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};

use anyhow::Context;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use super::sys;

/// The steps' network namespace, as `--network ns:…` names it.
pub const STEPS: &str = "/run/netns/steps";

/// The port of the steps' loopback that leads to the egress proxy.
pub const EGRESS_PORT: u16 = 3128;
/// The port of the VM's loopback that leads to the registry.
pub const REGISTRY_PORT: u16 = 5000;

/// Brings the VM's loopback up and makes the steps' network. The process has one thread yet, so
/// that it can go into the new namespace and come back.
pub fn prepare() -> anyhow::Result<()> {
    sys::loopback_up().context("the loopback cannot be brought up")?;
    let own = File::open("/proc/self/ns/net").context("the network namespace cannot be opened")?;
    fs::create_dir_all("/run/netns").context("/run/netns cannot be made")?;
    File::create(STEPS).with_context(|| format!("{STEPS} cannot be made"))?;
    unshare(CloneFlags::CLONE_NEWNET).context("the steps' network cannot be made")?;
    sys::loopback_up().context("the steps' loopback cannot be brought up")?;
    mount(Some("/proc/self/ns/net"), STEPS, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("the steps' network cannot be kept at {STEPS}"))?;
    setns(own, CloneFlags::CLONE_NEWNET).context("the way back from the steps' network")
}

/// Listens on the VM's own loopback.
pub fn listen_for_engine() -> io::Result<TcpListener> {
    listen(REGISTRY_PORT)
}

/// Listens on the steps' loopback. A thread goes there, opens the socket, and ends: a socket stays
/// in the namespace that it was made in.
pub fn listen_for_steps() -> io::Result<TcpListener> {
    let there = std::thread::spawn(|| {
        setns(File::open(STEPS)?, CloneFlags::CLONE_NEWNET)?;
        listen(EGRESS_PORT)
    });
    there.join().unwrap_or_else(|_| Err(io::Error::other("the thread that listens broke down")))
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
