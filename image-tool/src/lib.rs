//! Builds, checks and publishes the images that Kiln's VMs run.
//!
//! A *recipe* is a directory with a `recipe.toml`. From it `build` makes
//! - a **builder bundle**: kernel, initrd (agent and modules), root disk, `bundle.json`, and an OCI
//!   image layout of the same, or
//! - a **base image**: an OCI image layout with one layer, for `FROM` lines.
//!
//! ```text
//! recipe ─▶ rootfs (mmdebstrap) ─▶ root.erofs ─┐
//!        ─▶ kernel, modules ─────▶ initrd ─────┼▶ bundle ─▶ layout ─▶ place (atomic) ─▶ publish
//!                      agent ─────────┘        │
//!                                     inputs: what need not be made again
//! ```
//!
//! `kiln serve` uses [`bundle::Bundle`] to open what it boots, [`pull::pull_bundle`] to get one from
//! a registry, [`publish::push_layout`] to publish, and [`disk`] to make disks of images for instances. Functions that talk to a registry need a
//! TLS provider: the program that calls them has called its `install_default()`.

pub mod build;
pub mod bundle;
pub mod cli;
pub mod credentials;
pub mod digest;
pub mod disk;
pub mod elf;
pub mod file;
pub mod initrd;
pub mod inputs;
pub mod kernel;
pub mod layout;
pub mod modules;
pub mod place;
pub mod publish;
pub mod pull;
pub mod recipe;
pub mod registry;
pub mod rootfs;
pub mod text;
pub mod tools;
pub mod verify;
