//! What a request may ask for: on this host, and of these what a tenant may.

use serde::{Deserialize, Deserializer};

use crate::build::NetworkMode;

/// What a request may ask for, and what it gets where it does not ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of a source as it is sent, in bytes.
    pub max_source_bytes: u64,
    /// Of a build, in seconds.
    pub max_timeout_seconds: u32,
    /// Of a build's VM, in MiB.
    pub max_memory_mb: u32,
    /// Of a build's VM.
    pub max_cpus: u32,
    /// Of a build's scratch disk, in GiB.
    pub max_disk_gb: u32,
    /// Queued builds of one tenant.
    pub max_queued: u32,
    /// Sources that are received at one time; half of them of one tenant.
    pub max_uploads: usize,
    /// Requests of one token.
    pub max_requests_per_second: u32,
    /// For builds that do not say.
    pub network_default: NetworkMode,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_source_bytes: 4096 * 1024 * 1024,
            max_timeout_seconds: 24 * 60 * 60,
            max_memory_mb: 64 * 1024,
            max_cpus: 64,
            max_disk_gb: 500,
            max_queued: 1000,
            max_uploads: 64,
            max_requests_per_second: 1000,
            network_default: NetworkMode::Open,
        }
    }
}

impl Limits {
    /// These, and no more than those.
    #[must_use]
    pub fn within(self, maxima: &Maxima) -> Self {
        let least = |host: u32, tenant: Option<u32>| tenant.map_or(host, |most| host.min(most));
        let source = maxima.max_source_mb.map_or(u64::MAX, |mb| u64::from(mb) * 1024 * 1024);
        Self {
            max_source_bytes: self.max_source_bytes.min(source),
            max_timeout_seconds: least(self.max_timeout_seconds, maxima.max_timeout_seconds),
            max_memory_mb: least(self.max_memory_mb, maxima.max_memory_mb),
            max_cpus: least(self.max_cpus, maxima.max_cpus),
            max_disk_gb: least(self.max_disk_gb, maxima.max_disk_gb),
            max_queued: least(self.max_queued, maxima.max_queued),
            ..self
        }
    }
}

/// What one tenant may ask for: a table of the configuration file. What it does not say is the host's, and nothing is more than that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Maxima {
    /// Of a source, in MiB.
    #[serde(deserialize_with = "at_least::<1, _>")]
    pub max_source_mb: Option<u32>,
    /// Of a build, in seconds.
    #[serde(deserialize_with = "at_least::<1, _>")]
    pub max_timeout_seconds: Option<u32>,
    /// Of the VM of a build or an instance, in MiB.
    #[serde(deserialize_with = "at_least::<256, _>")]
    pub max_memory_mb: Option<u32>,
    /// Of the VM of a build or an instance.
    #[serde(deserialize_with = "at_least::<1, _>")]
    pub max_cpus: Option<u32>,
    /// Of a build's scratch disk, in GiB.
    #[serde(deserialize_with = "at_least::<1, _>")]
    pub max_disk_gb: Option<u32>,
    /// Builds that wait.
    #[serde(deserialize_with = "at_least::<1, _>")]
    pub max_queued: Option<u32>,
}

fn at_least<'de, const LEAST: u32, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let value = u32::deserialize(from)?;
    if value < LEAST {
        return Err(serde::de::Error::custom(format!(
            "{value} is too small; it must be {LEAST} or more"
        )));
    }
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_has_the_least_of_what_it_and_the_host_say() {
        let host = Limits { max_cpus: 4, max_memory_mb: 1000, ..Limits::default() };
        assert_eq!(host.within(&Maxima::default()), host);
        let maxima = Maxima {
            max_source_mb: Some(1),
            max_timeout_seconds: Some(60),
            max_memory_mb: Some(512),
            max_cpus: Some(64),
            max_disk_gb: Some(2),
            max_queued: Some(3),
        };
        let expected = Limits {
            max_source_bytes: 1 << 20,
            max_timeout_seconds: 60,
            max_memory_mb: 512,
            max_disk_gb: 2,
            max_queued: 3,
            ..host
        };
        assert_eq!(host.within(&maxima), expected);
    }
}
