//! From queued to finished.
//!
//! ```text
//! api ──wake──▶ dispatcher ──claims, one permit a VM──▶ driver (one task owns one build)
//!      ──cancel─▶ live ──token──────────────────────────┘
//! ```
//!
//! **Invariant**: only a build's driver changes it once it is claimed; everybody else asks the
//! driver through [`live::Live`].

mod admission;
mod base;
mod capacity;
mod dispatcher;
mod driver;
mod egress_log;
mod expiry;
mod journal;
mod leaks;
mod lease;
mod live;
mod outcome;
mod recover;
mod reserve;
mod sink;
mod workshop;

pub use recover::{Adopted, adopt, recover};

pub use capacity::{Capacity, Memory};
pub use dispatcher::{Dispatcher, Scheduling};
pub use driver::{Driver, Egress};
pub use lease::BEAT;
pub use live::Live;
pub use reserve::Reserve;
pub use workshop::Workshop;
