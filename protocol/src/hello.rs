//! The first frames of a control connection. **Their bytes are frozen**: an agent and a host of
//! any two releases must be able to say who they are and why they do not fit.

use serde::{Deserialize, Serialize};

use crate::version::{Features, Version, VersionRange};

/// The first bytes of every Hello, so that a stray peer is told apart from an old one.
pub const MAGIC: [u8; 4] = *b"KILN";

/// Longest accepted identity text (agent version, image digest, reject message), in bytes.
pub const MAX_TEXT: usize = 512;

/// Length of a resume token and of a VM's nonce, in bytes.
pub const TOKEN_LEN: usize = 32;

/// Guest → host: who dials, what it speaks, and where it left off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Always [`MAGIC`].
    pub magic: [u8; 4],
    /// What the agent speaks.
    pub versions: VersionRange,
    /// What the agent can do beyond the version.
    pub features: Features,
    /// The agent's own version, for people: `kiln-agent 0.1.0`.
    pub agent: String,
    /// The builder image's identity as its initrd states it; empty when unknown.
    pub image: String,
    /// Set when this connection continues an earlier one of the same VM.
    pub resume: Option<Resume>,
}

/// The claim to continue a session.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The token of the latest [`Welcome`].
    pub token: [u8; TOKEN_LEN],
    /// The highest event number whose acknowledgement the agent has seen.
    pub acknowledged: u64,
}

/// Host → guest: the answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HelloReply {
    /// Go on.
    Welcome(Welcome),
    /// Go away, and why.
    Reject(Reject),
}

/// Host → guest: the session is open.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that both sides use from here on.
    pub version: Version,
    /// The abilities that both sides have.
    pub features: Features,
    /// Shown in [`Resume`] by the next connection; replaced at every Welcome.
    pub resume_token: [u8; TOKEN_LEN],
    /// The VM's nonce, for the preambles of its other connections.
    pub nonce: [u8; TOKEN_LEN],
    /// The host's clock, in milliseconds since the Unix epoch. A VM may not know the time.
    pub time_ms: u64,
    /// Fresh randomness for the guest's pool. A VM may have been restored from a snapshot.
    pub entropy: [u8; TOKEN_LEN],
    /// The highest event number that the host has stored; 0 for none.
    pub acknowledged: u64,
}

/// Host → guest: the session is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    /// Why, for programs.
    pub reason: RejectReason,
    /// Why, for people. At most [`MAX_TEXT`] bytes.
    pub message: String,
}

/// Why a Hello was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RejectReason {
    /// Not a Hello of this protocol.
    NotKiln,
    /// No version in common.
    Version,
    /// The resume token is not the current one.
    Resume,
    /// The VM's session is already open and this connection shows no token.
    Taken,
}

impl Hello {
    /// Whether the magic and the bounds hold.
    pub fn check(&self) -> Result<(), RejectReason> {
        if self.magic != MAGIC || self.agent.len() > MAX_TEXT || self.image.len() > MAX_TEXT {
            return Err(RejectReason::NotKiln);
        }
        Ok(())
    }
}

// Tokens open doors: they are never printed.
impl std::fmt::Debug for Resume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resume").field("acknowledged", &self.acknowledged).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Welcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Welcome")
            .field("version", &self.version)
            .field("features", &self.features)
            .field("acknowledged", &self.acknowledged)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::version::SUPPORTED;

    fn hello() -> Hello {
        Hello {
            magic: MAGIC,
            versions: SUPPORTED,
            features: Features::NONE,
            agent: "a".repeat(MAX_TEXT),
            image: "i".repeat(MAX_TEXT),
            resume: None,
        }
    }

    #[test]
    fn texts_at_the_bound_are_accepted_and_over_it_refused() {
        assert_eq!(hello().check(), Ok(()));
        let long_agent = Hello { agent: "a".repeat(MAX_TEXT + 1), ..hello() };
        let long_image = Hello { image: "i".repeat(MAX_TEXT + 1), ..hello() };
        assert_eq!(long_agent.check(), Err(RejectReason::NotKiln));
        assert_eq!(long_image.check(), Err(RejectReason::NotKiln));
    }

    #[test]
    fn another_magic_is_refused() {
        assert_eq!(Hello { magic: *b"HTTP", ..hello() }.check(), Err(RejectReason::NotKiln));
    }

    #[test]
    fn debug_output_holds_no_token() {
        let resume = Resume { token: [0xAB; TOKEN_LEN], acknowledged: 7 };
        let shown = format!("{resume:?}");
        assert!(!shown.contains("171") && !shown.to_lowercase().contains("ab, "), "{shown}");
    }
}
