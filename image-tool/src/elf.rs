//! Is the agent a static program? The initrd has no loader and no libraries: a dynamic one would
//! make the kernel panic at boot, long after the mistake.
//!
//! Format: System V ABI, ELF-64 object files (`e_phoff` at 32, `e_phentsize` at 54, `e_phnum` at 56).

use std::path::{Path, PathBuf};

/// Why a file cannot be `/init`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAnAgent {
    /// No 64-bit little-endian ELF program.
    #[error("{} is not a 64-bit ELF program", .0.display())]
    NotElf(PathBuf),
    /// It asks for a loader.
    #[error(
        "{} is dynamically linked; the agent must be static \
         (RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static' and an explicit --target)",
        .0.display()
    )]
    Dynamic(PathBuf),
}

const MAGIC_64_LE: &[u8] = b"\x7fELF\x02\x01";
const PT_INTERP: u32 = 3;

/// Checks the bytes of the program at `path` (the path is for the message only).
pub fn check_static(path: &Path, bytes: &[u8]) -> Result<(), NotAnAgent> {
    let types = segment_types(bytes).ok_or_else(|| NotAnAgent::NotElf(path.to_owned()))?;
    if types.contains(&PT_INTERP) {
        return Err(NotAnAgent::Dynamic(path.to_owned()));
    }
    Ok(())
}

fn segment_types(bytes: &[u8]) -> Option<Vec<u32>> {
    if !bytes.starts_with(MAGIC_64_LE) {
        return None;
    }
    let offset = u64::from_le_bytes(bytes.get(32..40)?.try_into().ok()?);
    let entry = u16::from_le_bytes(bytes.get(54..56)?.try_into().ok()?);
    let count = u16::from_le_bytes(bytes.get(56..58)?.try_into().ok()?);
    (0..u64::from(count))
        .map(|i| {
            let at = usize::try_from(offset.checked_add(i * u64::from(entry))?).ok()?;
            Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn elf(segments: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0u8; 64 + segments.len() * 56];
        bytes[..6].copy_from_slice(MAGIC_64_LE);
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&u16::try_from(segments.len()).unwrap().to_le_bytes());
        for (i, kind) in segments.iter().enumerate() {
            bytes[64 + i * 56..68 + i * 56].copy_from_slice(&kind.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_static_program_passes_and_a_dynamic_one_does_not() {
        let path = Path::new("a");
        assert_eq!(check_static(path, &elf(&[1, 1, 6])), Ok(()));
        assert_eq!(check_static(path, &elf(&[1, PT_INTERP])), Err(NotAnAgent::Dynamic("a".into())));
    }

    #[test]
    fn scripts_and_truncated_files_are_refused() {
        let path = Path::new("a");
        let cut = &elf(&[1, 1])[..70];
        for bad in [&b"#!/bin/sh"[..], b"", cut, &MAGIC_64_LE[..4]] {
            assert_eq!(check_static(path, bad), Err(NotAnAgent::NotElf("a".into())));
        }
    }

    #[test]
    fn this_test_program_is_seen_as_what_it_is() {
        let own = std::env::current_exe().unwrap();
        let bytes = std::fs::read(&own).unwrap();
        assert!(!matches!(check_static(&own, &bytes), Err(NotAnAgent::NotElf(_))));
    }
}
