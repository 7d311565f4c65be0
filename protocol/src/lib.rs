//! What Kiln's agent (inside a VM) and host say to each other.
//!
//! This crate opens no sockets: it holds message types, their bounds, and a codec over any
//! [`tokio::io::AsyncRead`] and [`tokio::io::AsyncWrite`].
//!
//! # Connections
//! All run over vsock. The guest dials the host for control, registry and egress; the host dials
//! the guest for exec. See [`port`].
//!
//! # Frames on the control connection
//! A frame is a 4-byte big-endian length and then exactly one [postcard] value of that many bytes.
//! A length over [`frame::MAX_FRAME`] is refused before anything is allocated; bytes left over
//! after the value are an error.
//!
//! | order | direction | frame |
//! |---|---|---|
//! | first | guest → host | [`hello::Hello`] |
//! | second | host → guest | [`hello::HelloReply`]: `Welcome` or `Reject` |
//! | then | host → guest | [`message::HostToAgent`] |
//! | then | guest → host | [`message::AgentToHost`] |
//!
//! A session's connection has frames of the same form after its [`preamble`]: [`exec`] says which.
//!
//! # Rules for change
//! postcard is not self-describing: a field added to a struct changes the bytes of every message
//! that holds it.
//! - `Hello`, `Welcome` and `Reject` are frozen since the first commit.
//! - The rest of version 1 freezes at the first release tag. From then on structs are frozen, enum
//!   variants are only appended, and a golden file under `tests/golden` is never edited.
//! - What a version does not have must not be sent: a sender checks [`version::Version`] first.
//!
//! [postcard]: https://postcard.jamesmunns.com/wire-format

pub mod event;
pub mod exec;
pub mod frame;
pub mod hello;
pub mod job;
pub mod message;
pub mod preamble;
pub mod run;
pub mod secret;
pub mod version;

/// The vsock ports that both sides know.
pub mod port {
    /// Control: guest dials host. Hello, job, source, events, outcome.
    pub const CONTROL: u32 = 5001;
    /// Exec and file copy: host dials guest.
    pub const EXEC: u32 = 5002;
    /// Registry: guest dials host; a preamble, then HTTP of the distribution API.
    pub const REGISTRY: u32 = 5003;
    /// Egress: guest dials host; a preamble, then HTTP of a forward proxy.
    pub const EGRESS: u32 = 5004;
    /// The context id of the host, as a guest dials it (`VMADDR_CID_HOST`).
    pub const HOST_CID: u32 = 2;
}

/// Names that both sides agree on.
pub mod name;
