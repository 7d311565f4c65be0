//! Extended attributes: which of a layer's are kept, and in which form a disk has them.

use std::borrow::Cow;

/// What fits beside each other in one block of ext4: its length without header and end mark.
const MAX_BYTES: usize = 4096 - 32 - 4;
/// An entry without name and value.
const ENTRY: usize = 16;
/// XATTR_NAME_MAX.
const MAX_NAME: usize = 255;

/// Names that a disk can have and that mean something to Linux.
const KEPT: &[&str] = &["user.", "trusted.", "security."];
const ACLS: &[&str] = &["system.posix_acl_access", "system.posix_acl_default"];
/// The notes of an overlay file system on the machine that made the layer. They are no content, and on the lower
/// side of a VM's own overlay they would redirect or hide.
const OVERLAY: &[&str] = &["trusted.overlay.", "user.overlay."];

/// Why attributes are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XattrProblem {
    /// More than ext4 has room for.
    #[error("its extended attributes take {0} bytes; a disk has room for {MAX_BYTES}")]
    TooMany(usize),
    /// A name that Linux cannot have.
    #[error("it has an extended attribute whose name is not valid")]
    Name,
    /// An ACL in another form than Linux's.
    #[error("its access control list {0} is malformed")]
    Acl(&'static str),
}

/// By name; the values as system calls have them.
pub type Xattrs = Vec<(Box<str>, Box<[u8]>)>;

/// What is kept, sorted by name. Attributes of other systems (macOS adds `com.apple.…`) cannot be set on Linux,
/// so every tool leaves them out.
pub(super) fn kept(raw: &[(Vec<u8>, Vec<u8>)]) -> Result<Xattrs, XattrProblem> {
    let mut kept = Xattrs::new();
    for (name, value) in raw {
        let name = str::from_utf8(name).map_err(|_| XattrProblem::Name)?;
        if OVERLAY.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        if let Some(acl) = ACLS.iter().find(|acl| **acl == name) {
            disk_acl(value).ok_or(XattrProblem::Acl(acl))?;
            kept.push((name.into(), value.as_slice().into()));
        } else if let Some(prefix) = KEPT.iter().find(|prefix| name.starts_with(**prefix)) {
            if name.len() == prefix.len() || name.len() > MAX_NAME || name.contains('\0') {
                return Err(XattrProblem::Name);
            }
            kept.push((name.into(), value.as_slice().into()));
        }
    }
    kept.sort();
    let padded = |n: usize| n.next_multiple_of(4);
    let bytes = kept.iter().map(|(n, v)| ENTRY + padded(n.len()) + padded(v.len())).sum();
    if bytes > MAX_BYTES { Err(XattrProblem::TooMany(bytes)) } else { Ok(kept) }
}

/// The value as ext4 has it on disk: an ACL has another form there.
pub(super) fn on_ext4<'a>(name: &str, value: &'a [u8]) -> Cow<'a, [u8]> {
    let acl = if ACLS.contains(&name) { disk_acl(value) } else { None };
    acl.map_or(Cow::Borrowed(value), Cow::Owned)
}

/// From the form of system calls (`linux/posix_acl_xattr.h`, version 2: 8 bytes an entry) to the form on disk
/// (`fs/ext4/acl.h`, version 1: an id only where the tag has one).
fn disk_acl(value: &[u8]) -> Option<Vec<u8>> {
    const CALL_VERSION: [u8; 4] = 2_u32.to_le_bytes();
    const DISK_VERSION: [u8; 4] = 1_u32.to_le_bytes();
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    const WITHOUT_ID: [u16; 4] = [0x01, 0x04, 0x10, 0x20];
    let entries = value.strip_prefix(&CALL_VERSION)?;
    if entries.is_empty() || entries.len() % 8 != 0 {
        return None;
    }
    let mut disk = DISK_VERSION.to_vec();
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        match tag {
            USER | GROUP => disk.extend_from_slice(entry),
            _ if WITHOUT_ID.contains(&tag) => disk.extend_from_slice(&entry[..4]),
            _ => return None,
        }
    }
    Some(disk)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn raw(list: &[(&str, &[u8])]) -> Vec<(Vec<u8>, Vec<u8>)> {
        list.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.to_vec())).collect()
    }

    #[test]
    fn what_linux_knows_is_kept_and_an_overlays_notes_are_not() {
        let list = raw(&[
            ("user.b", b"2"),
            ("security.capability", b"\x01\0"),
            ("user.a", b""),
            ("trusted.overlay.redirect", b"/etc"),
            ("user.overlay.opaque", b"y"),
            ("com.apple.quarantine", b"x"),
            ("trusted.x", b"t"),
        ]);
        let kept = kept(&list).unwrap();
        let names: Vec<&str> = kept.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["security.capability", "trusted.x", "user.a", "user.b"]);
    }

    #[test]
    fn names_and_room_have_bounds() {
        for name in ["user.", "security.", "user.a\0b"] {
            assert_eq!(kept(&raw(&[(name, b"")])), Err(XattrProblem::Name), "{name:?}");
        }
        let fits = vec![0; MAX_BYTES - ENTRY - 8];
        assert!(kept(&raw(&[("user.abc", &fits)])).is_ok());
        let more = vec![0; fits.len() + 1];
        assert_eq!(kept(&raw(&[("user.abc", &more)])), Err(XattrProblem::TooMany(MAX_BYTES + 4)));
    }

    #[test]
    fn an_acl_gets_its_form_on_disk() {
        // user::rw-, user:1000:r--, group::r--, mask::r--, other::---
        let entry = |tag: u16, perm: u16, id: u32| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let none = u32::MAX;
        let call = [
            2_u32.to_le_bytes().to_vec(),
            entry(1, 6, none),
            entry(2, 4, 1000),
            entry(4, 4, none),
            entry(0x10, 4, none),
            entry(0x20, 0, none),
        ]
        .concat();
        let disk = disk_acl(&call).unwrap();
        let expected =
            [&[1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 4, 0][..], &1000_u32.to_le_bytes(), &[4, 0, 4, 0]]
                .concat();
        assert_eq!(disk, [&expected[..], &[0x10, 0, 4, 0, 0x20, 0, 0, 0]].concat());
        for bad in
            [&call[1..], &call[..3], &call[..7], &call[..4], &[2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]]
        {
            assert_eq!(disk_acl(bad), None);
        }
    }
}
