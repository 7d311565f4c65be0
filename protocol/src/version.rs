//! The version table: what this build of the crate can speak, and how two sides agree.

use serde::{Deserialize, Serialize};

/// A version of the control protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u16);

/// An inclusive range of versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// The oldest version that is spoken.
    pub min: Version,
    /// The newest version that is spoken.
    pub max: Version,
}

/// What this crate speaks. A bundle carries its agent's range, so that the host refuses a
/// mismatch before it boots a VM.
pub const SUPPORTED: VersionRange = VersionRange { min: Version(1), max: Version(1) };

impl VersionRange {
    /// The newest version that both ranges hold; `None` where they do not meet.
    pub fn agree(self, other: Self) -> Option<Version> {
        let newest = self.max.min(other.max);
        (newest >= self.min && newest >= other.min).then_some(newest)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "v{}", self.0)
    }
}

impl std::fmt::Display for VersionRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.min == self.max {
            self.min.fmt(f)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// Optional abilities, as bits. Both sides use only what the other one has named too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Features(pub u64);

impl Features {
    /// No optional abilities.
    pub const NONE: Self = Self(0);
    /// The control connection can be resumed with a token after it broke.
    pub const RESUME: Self = Self(1);

    /// The abilities that both sides have.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other`'s abilities are in this set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(min: u16, max: u16) -> VersionRange {
        VersionRange { min: Version(min), max: Version(max) }
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(range(1, 3).agree(range(2, 5)), Some(Version(3)));
        assert_eq!(range(2, 5).agree(range(1, 3)), Some(Version(3)));
        assert_eq!(range(1, 1).agree(range(1, 1)), Some(Version(1)));
    }

    #[test]
    fn ranges_that_do_not_meet_have_no_version() {
        assert_eq!(range(1, 2).agree(range(3, 4)), None);
        assert_eq!(range(3, 4).agree(range(1, 2)), None);
    }

    #[test]
    fn a_reversed_range_agrees_with_nothing() {
        assert_eq!(range(4, 1).agree(range(1, 9)), None);
    }

    #[test]
    fn features_are_intersected() {
        assert_eq!(Features(0b101).common(Features(0b110)), Features(0b100));
        assert!(Features::RESUME.has(Features::NONE));
        assert!(!Features::NONE.has(Features::RESUME));
    }
}
