//! The few system calls that have no safe wrapper. The only unsafe code of PID 1.
#![allow(unsafe_code, reason = "fork, ioctl and the environment have no safe interface")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{ForkResult, fork as nix_fork};

/// A new process. The caller has one thread: see [`super`].
pub fn fork() -> nix::Result<ForkResult> {
    // SAFETY: boot runs in one thread, so that the child inherits no lock that somebody else
    // holds, and may go on as any process.
    unsafe { nix_fork() }
}

/// What the kernel does not give PID 1, and every program expects. The caller has one thread.
pub fn set_environment() {
    // SAFETY: boot runs in one thread: nobody reads the environment meanwhile.
    unsafe {
        std::env::set_var("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        std::env::set_var("HOME", "/root");
    }
}

nix::ioctl_read_bad!(get_interface_flags, libc::SIOCGIFFLAGS, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, libc::ifreq);

/// Brings `lo` of the current network namespace up.
pub fn loopback_up() -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all zeros is a valid ifreq: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: the descriptor is open, and `request` is an ifreq that the kernel may fill in; the
    // call sets its flags, the part of the union that is then read.
    unsafe {
        get_interface_flags(socket.as_raw_fd(), &raw mut request)?;
        let up = libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
        request.ifr_ifru.ifru_flags |= up;
        set_interface_flags(socket.as_raw_fd(), &raw const request)?;
    }
    Ok(())
}

/// `struct rand_pool_info` of linux/random.h with room for one Welcome's entropy.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    buffer_bytes: libc::c_int,
    buffer: [u8; ENTROPY],
}

const ENTROPY: usize = kiln_protocol::hello::TOKEN_LEN;

// Their numbers carry the size of the fixed part, two ints, and not of what follows it.
nix::ioctl_write_ptr!(add_to_pool, b'R', 0x03, [libc::c_int; 2]);
nix::ioctl_none!(reseed, b'R', 0x07);

/// Adds to the kernel's pool of randomness, counted in full, and makes its generator use it.
pub fn add_entropy(entropy: &[u8; ENTROPY]) -> io::Result<()> {
    let pool = File::options().write(true).open("/dev/urandom")?;
    let bytes = libc::c_int::try_from(ENTROPY).map_err(io::Error::other)?;
    let info = PoolInfo { entropy_bits: bytes * 8, buffer_bytes: bytes, buffer: *entropy };
    // SAFETY: the descriptor is open; `info` is a rand_pool_info whose buffer has as many bytes as
    // it says, and the kernel only reads it.
    unsafe {
        add_to_pool(pool.as_raw_fd(), (&raw const info).cast())?;
        reseed(pool.as_raw_fd())?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn a_new_network_gets_a_loopback_that_works() {
        // Its own thread, and under nextest its own process: nothing else is touched.
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(std::net::TcpListener::bind("127.0.0.1:0").is_ok());
        let connect = |address| std::net::TcpStream::connect(address);
        let before = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(connect(before.local_addr().unwrap()).is_err());
        loopback_up().unwrap();
        loopback_up().unwrap();
        connect(before.local_addr().unwrap()).unwrap();
    }

    #[test]
    fn the_kernel_takes_entropy() {
        match add_entropy(&[7; ENTROPY]) {
            // A container may not be allowed to; the call itself was understood.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            taken => taken.unwrap(),
        }
    }
}
