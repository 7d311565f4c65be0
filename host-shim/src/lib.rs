//! The host side of Kiln.
//!
//! ```text
//! client ─▶ api ─▶ store ─▶ queue::dispatcher ─▶ queue::driver ─▶ vmm (a VM)
//!                    ▲                              │  session   ⇄ control 5001
//!           events ──┘                              │  tunnel    ◀ registry 5003 ─▶ gateway::guests, staging
//!                                                   │  tunnel    ◀ egress   5004 ─▶ egress
//!                                                   └─▶ publish ─▶ the registry
//! client ─▶ api ─▶ instances ─▶ a task that owns one instance ─▶ vmm, session
//! retention (once a day, POST /gc) ─▶ store: what is old goes
//! client ⇄ api::exec ⇄ exec (a session, recorded) ⇄ a running VM's entrance, 5002
//! ```

pub mod api;
pub mod build;
mod causes;
pub mod cli;
pub mod clock;
pub mod config;
pub mod egress;
pub mod events;
pub mod exec;
pub mod gateway;
pub mod instances;
pub mod kept;
pub mod lock;
pub mod metrics;
mod points;
pub mod publish;
pub mod queue;
pub mod random;
pub mod retention;
pub mod secrets;
pub mod serve;
pub mod session;
pub mod sources;
pub mod staging;
pub mod store;
pub mod token;
pub mod traces;
pub mod tunnel;
pub mod vmm;
