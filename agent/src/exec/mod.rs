//! Sessions: commands that people run in the VM while it does its job, and in a build's failed step; and files that they
//! copy in and out.
//!
//! ```text
//! host ─ port 5002 ─▶ server ─ Open ─▶ launch ─▶ crun exec ─▶ the command, in the step or the instance
//!                                      │    └──▶ leader ────▶ the command, in the VM itself
//!                       session ◀──────┘ pipes or a terminal
//!                       │    ▲
//! host ◀─ output, end ──┘    └── input, signals, sizes ◀─ host
//! ```
//! A session's processes end with it, whichever way it ends: [`processes`] knows them by the kernel's session, which
//! is one for each of ours. What enters a container gets what its processes have, and no more: the same root, user,
//! capabilities, seccomp profile and cgroup.
//!
//! [`process`] is pure.

mod copy;
mod launch;
pub mod leader;
mod process;
mod processes;
mod server;
mod session;
mod spot;
mod sys;
mod taken;
mod target;
mod terminal;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

pub use self::server::{Server, listen};
pub use self::target::{Enterable, Target, Wanted};
