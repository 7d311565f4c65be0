//! What the agent itself costs.

use std::time::Duration;

use kiln_protocol::message::AgentUsage;

/// As far as the kernel says.
pub fn usage(engine_spawn: Option<Duration>) -> AgentUsage {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    AgentUsage {
        memory_peak_bytes: memory_peak(&status).unwrap_or(0),
        engine_spawn_us: engine_spawn.and_then(|spawn| u64::try_from(spawn.as_micros()).ok()),
    }
}

/// The most resident memory, by `/proc/PID/status`.
fn memory_peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_peak_is_given_in_bytes() {
        assert_eq!(memory_peak("VmPeak:\t 9 kB\nVmHWM:\t    1234 kB\n"), Some(1234 * 1024));
        assert_eq!(memory_peak("VmHWM:\tmuch\n"), None);
        let own = usage(Some(Duration::from_millis(2)));
        assert!(own.memory_peak_bytes > 64 * 1024, "{own:?}");
        assert_eq!(own.engine_spawn_us, Some(2000));
    }
}
