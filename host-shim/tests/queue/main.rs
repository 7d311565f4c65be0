//! The queue and its drivers over a real store, real processes for VMs, and an agent that is a real peer over the
//! protocol. Only the guest's kernel is missing.

#![allow(clippy::unwrap_used, missing_docs)]

mod again;
mod cancel;
mod ends;
mod faulty;
mod guest;
mod house;
mod kept;
mod lease;
mod waiting;
