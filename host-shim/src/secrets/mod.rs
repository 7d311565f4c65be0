//! Secrets on the host: sealed under the key file, opened only for the VM of a build that declared them.
//!
//! ```text
//! PUT /secrets/{id} ─▶ seal ─▶ store (tenant's) ─┐
//! POST /builds, parts secret.<id> ─▶ seal ─▶ store (the build's own, until it ends) ─┤
//!                                                                                    ▼
//! agent: SecretRequest ─▶ session ─▶ Vault::answer: declared? own, else tenant's ─▶ open ─▶ SecretAnswer
//! ```
//! **Invariant**: a value is in the database only sealed, and bound to whose it is: copied to another row it does not
//! open. No value is ever shown again by the API.

mod answer;
mod cut;
mod forms;
mod key;
mod known;
pub mod leak;
mod mask;
mod samples;
mod search;
mod vault;
mod weight;
mod wrapped;

pub use answer::{AnswerError, answer};
pub use key::{KEY_FILE, KeyError, load_or_make};
pub use known::Unmasked;
pub use mask::Masker;
pub use vault::{Owner, Sealed, Vault, VaultError};
