//! What an image may cost. Its layers are unpacked bytes of somebody who may mean harm: every count has
//! an end, and what is kept in memory is charged before it is kept.

/// Bounds on an image. The defaults take every image that we know of; a server that serves tenants
/// sets what it can bear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Layers of the manifest. Docker makes no more than 127.
    pub layers: usize,
    /// Bytes of all layers as they are stored or transferred.
    pub compressed_bytes: u64,
    /// Bytes of one layer's tar archive, unpacked. Bounds what one compressed layer can grow to.
    pub layer_bytes: u64,
    /// Bytes of all layers' tar archives together, unpacked. Bounds the temporary file beside the disk, and
    /// with it the disk: at most this much again, its metadata aside.
    pub total_bytes: u64,
    /// Entries of all layers together.
    pub entries: u64,
    /// Bytes of memory for names, attributes and the disk's own metadata: about 1.5 KB for a file and 7 KB for
    /// a directory; again 1.5 KB for each layer that repeats it.
    pub metadata_bytes: u64,
}

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;

impl Default for Limits {
    fn default() -> Self {
        Self {
            layers: 512,
            compressed_bytes: 32 * GIB,
            layer_bytes: 32 * GIB,
            total_bytes: 64 * GIB,
            entries: 1_000_000,
            metadata_bytes: 2 * GIB,
        }
    }
}

/// A limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the image is larger than allowed: more than {limit} {what}")]
pub struct TooLarge {
    /// What there is too much of.
    pub what: &'static str,
    /// How much there may be.
    pub limit: u64,
}

/// What of the limits is left while an image is read.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    limits: Limits,
    entries: u64,
    metadata: u64,
    bytes: u64,
}

impl Budget {
    /// Nothing is used yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, entries: 0, metadata: 0, bytes: 0 }
    }

    /// One entry of a layer.
    pub fn entry(&mut self) -> Result<(), TooLarge> {
        charge(&mut self.entries, 1, self.limits.entries, "entries in all layers")
    }

    /// Memory that is about to be used.
    pub fn memory(&mut self, bytes: u64) -> Result<(), TooLarge> {
        let limit = self.limits.metadata_bytes;
        charge(&mut self.metadata, bytes, limit, "bytes of names and attributes in memory")
    }

    /// How many unpacked bytes the next layer may have.
    pub fn next_layer(&self) -> u64 {
        self.limits.layer_bytes.min(self.limits.total_bytes.saturating_sub(self.bytes))
    }

    /// A layer had so many unpacked bytes.
    pub fn layer(&mut self, bytes: u64) -> Result<(), TooLarge> {
        charge(&mut self.bytes, bytes, self.limits.total_bytes, "bytes in all layers, unpacked")
    }
}

fn charge(used: &mut u64, more: u64, limit: u64, what: &'static str) -> Result<(), TooLarge> {
    *used = used.saturating_add(more);
    if *used > limit { Err(TooLarge { what, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_holds_at_and_above_it() {
        let limits = Limits {
            entries: 2,
            metadata_bytes: 10,
            total_bytes: 5,
            layer_bytes: 4,
            ..Limits::default()
        };
        let mut budget = Budget::new(limits);
        assert!(budget.entry().is_ok() && budget.entry().is_ok() && budget.entry().is_err());
        assert!(budget.memory(10).is_ok() && budget.memory(1).is_err());
        assert!(budget.memory(u64::MAX).is_err(), "no overflow");
        assert_eq!(budget.next_layer(), 4);
        assert!(budget.layer(4).is_ok());
        assert_eq!(budget.next_layer(), 1);
        assert!(budget.layer(1).is_ok() && budget.layer(1).is_err());
    }
}
