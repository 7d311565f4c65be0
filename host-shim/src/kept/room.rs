//! Whether the host has memory for another VM.

use std::fs;

/// What is to be left for the host itself, in MiB.
const RESERVE_MB: u64 = 512;

/// Whether the host has so much memory free. One that cannot be asked is taken to have it.
pub(super) fn has_room_for(memory_mb: u32) -> bool {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available_mb(&meminfo).is_none_or(|free| free >= u64::from(memory_mb) + RESERVE_MB)
}

fn available_mb(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_read() {
        let meminfo = "MemTotal:       24567890 kB\nMemAvailable:    2097152 kB\n";
        assert_eq!(available_mb(meminfo), Some(2048));
        assert_eq!(available_mb("MemTotal: 1 kB\n"), None);
        assert!(has_room_for(0));
        assert!(!has_room_for(u32::MAX));
    }
}
