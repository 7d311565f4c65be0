//! Tar archives: those of strangers, unpacked into one directory and nowhere else, and those of files that change while
//! they are read.
//!
//! ```text
//! a path ─ spot ─┬▶ landing ─▶ tree ◀─ unpack ◀─ guard ◀─ bytes
//!                └▶ pack ─▶ bytes
//! ```
//! - Names are relative and have no `..`; names that are not UTF-8 are kept as they are.
//! - Symbolic links are made as they are and never followed out of the tree; hard links only
//!   join files of the tree. Devices, FIFOs and unknown kinds are refused.
//! - A later entry of a name replaces an earlier one.
//! - Permissions, the sticky bit and times are kept. **Set-user-id and set-group-id bits are dropped**, owners and
//!   extended attributes too.
//! - Sparse files (GNU's old form) are filled with zeros and count with their whole size.
//! - Headers, names, depth and what follows the end are bounded; bytes and entries where [`Limits`] say so.
//!
//! On a refusal what was unpacked before it stays.

mod guard;
mod left_out;
mod pack;
mod problem;
mod spot;
mod tree;
mod unpack;

pub use self::guard::MAX_HEADERS;
pub use self::left_out::LeftOut;
pub use self::pack::Packing;
pub use self::problem::{Place, Problem, shown};
pub use self::spot::{LandError, Landing, land};
pub use self::tree::{MAX_COMPONENT, MAX_DEPTH, MAX_PATH, Rules, Tree};
pub use self::unpack::{ArchiveError, Limits, MAX_PADDING, unpack};
