//! The registry gateway: between guests, clients, and the real registry behind Kiln.
//!
//! ```text
//! a VM ──vsock──▶ guests ──▶ pulls: backing, upstream  pushes: staging
//! client ──/v2──▶ clients ─▶ rights by token ─▶ backing
//!                               backing ──▶ managed (docker-registry on a Unix socket), or external
//!                                              └▶ gate: who counts on what is there ◀─ garbage, what nobody needs
//! ```
//!
//! **Invariant**: a repository and an action are decided from the parsed [`path`] alone, and what
//! goes to the backing registry is written anew from what was parsed. The backing's credential is
//! added here and seen by nobody outside.

pub mod backing;
pub mod clients;
mod credential;
pub(crate) mod error;
pub mod gate;
pub mod guests;
pub mod managed;
mod mapping;
pub mod path;
pub(crate) mod relay;
pub mod request;
pub mod rights;
pub mod token;
mod token_endpoint;
pub mod upstream;

pub use backing::{Backing, BackingError};
pub use clients::{GatewayState, router};
pub use guests::{GuestContext, serve};
pub use managed::{Garbage, Managed, ManagedError};
pub use rights::{Authorizer, Caller};
pub use token::TokenKeys;
pub use upstream::Upstreams;
