//! Extended headers (POSIX.1-2017 `pax`, "pax Extended Header"): `LENGTH KEY=VALUE\n`, again and again.

/// Most extended attributes of an entry. ext4 has room for some dozens.
const MAX_XATTRS: usize = 256;

/// Why extended headers are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PaxError {
    /// Not of the form.
    #[error("an extended header is malformed")]
    Malformed,
    /// A value that the key cannot have.
    #[error("the extended header {0} has a value that is not valid")]
    Value(&'static str),
    /// A file with holes.
    #[error("sparse files are not taken; pack the layer without them (tar without --sparse)")]
    Sparse,
    /// A header for all entries that follow changes what they are; readers disagree on those.
    #[error("a global extended header sets {0}")]
    Global(String),
    /// More attributes than a file can sensibly have: each is looked for among the others.
    #[error("an entry has more than {MAX_XATTRS} extended attributes")]
    Attributes,
}

/// What an extended header says of the entry behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    /// Seconds and nanoseconds.
    pub(super) mtime: Option<(i64, u32)>,
    /// By name; the last value of a name counts.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The prefix of keys that stand for extended attributes, as star began it and all container tools do.
const XATTR: &[u8] = b"SCHILY.xattr.";

impl Pax {
    pub(super) fn parse(data: &[u8]) -> Result<Self, PaxError> {
        let mut pax = Self::default();
        for record in records(data) {
            let (key, value) = record?;
            pax.take(key, value)?;
        }
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
        match key {
            b"path" => self.path = Some(name(value, "path")?),
            b"linkpath" => self.link = Some(name(value, "linkpath")?),
            b"size" => self.size = Some(decimal(value).ok_or(PaxError::Value("size"))?),
            b"uid" => self.uid = Some(decimal(value).ok_or(PaxError::Value("uid"))?),
            b"gid" => self.gid = Some(decimal(value).ok_or(PaxError::Value("gid"))?),
            b"mtime" => self.mtime = Some(time(value).ok_or(PaxError::Value("mtime"))?),
            _ if key.starts_with(b"GNU.sparse.") => return Err(PaxError::Sparse),
            _ => {
                if let Some(attribute) = key.strip_prefix(XATTR) {
                    self.xattrs.retain(|(known, _)| known != attribute);
                    if self.xattrs.len() == MAX_XATTRS {
                        return Err(PaxError::Attributes);
                    }
                    self.xattrs.push((attribute.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

/// Checks a global header, which is then forgotten: a comment (git writes the commit) is harmless.
pub(super) fn check_global(data: &[u8]) -> Result<(), PaxError> {
    const TELLING: &[&[u8]] = &[b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"];
    for record in records(data) {
        let (key, _) = record?;
        if TELLING.contains(&key) || key.starts_with(XATTR) || key.starts_with(b"GNU.sparse.") {
            return Err(PaxError::Global(String::from_utf8_lossy(key).into_owned()));
        }
    }
    Ok(())
}

fn records(mut data: &[u8]) -> impl Iterator<Item = Result<(&[u8], &[u8]), PaxError>> {
    std::iter::from_fn(move || {
        if data.is_empty() {
            return None;
        }
        let found = record(data);
        data = found.as_ref().map_or(&[][..], |(_, _, rest)| rest);
        Some(found.map(|(key, value, _)| (key, value)).ok_or(PaxError::Malformed))
    })
}

type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Key, value and what follows.
fn record(data: &[u8]) -> Option<Record<'_>> {
    /// Longer lengths than any header that is read can have.
    const MAX_DIGITS: usize = 8;
    let blank = data.iter().take(MAX_DIGITS + 1).position(|b| *b == b' ')?;
    let length = usize::try_from(decimal(&data[..blank])?).ok()?;
    let record = data.get(blank + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|b| *b == b'=')?;
    let key = &record[..equals];
    (!key.is_empty() && !key.contains(&0)).then_some((key, &record[equals + 1..], &data[length..]))
}

fn name(value: &[u8], key: &'static str) -> Result<Vec<u8>, PaxError> {
    if value.is_empty() || value.contains(&0) {
        Err(PaxError::Value(key))
    } else {
        Ok(value.into())
    }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(digits).ok()?.parse().ok()
}

/// `[-]SECONDS[.FRACTION]`; of the fraction nine digits count.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    const NANOS: u32 = 1_000_000_000;
    const DIGITS: usize = 9;
    let (negative, value) = value.strip_prefix(b"-").map_or((false, value), |rest| (true, rest));
    let mut parts = value.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut fraction = parts.next().unwrap_or_default().to_vec();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    fraction.resize(DIGITS, b'0');
    let nanos = u32::try_from(decimal(&fraction)?).ok()?;
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        // Nanoseconds count upwards.
        (true, _) => (-seconds - 1, NANOS - nanos),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_taken_and_the_last_value_of_a_key_wins() {
        let data = b"12 path=abc\n14 linkpath=l\n9 size=7\n12 path=xyz\n16 mtime=1.0000\n25 SCHILY.xattr.user.a=1\n2\n21 SCHILY.xattr.u.b=\n";
        // Lengths that a person counted are checked first.
        let fixed: Vec<u8> = [
            ("path", "abc"),
            ("linkpath", "l"),
            ("size", "7"),
            ("path", "xyz"),
            ("mtime", "1.5"),
            ("SCHILY.xattr.user.a", "1\n2\0="),
            ("SCHILY.xattr.user.b", ""),
            ("comment", "x"),
        ]
        .iter()
        .flat_map(|(k, v)| written(k, v.as_bytes()))
        .collect();
        assert!(Pax::parse(data).is_err());
        let pax = Pax::parse(&fixed).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"xyz"[..]));
        assert_eq!(pax.link.as_deref(), Some(&b"l"[..]));
        assert_eq!((pax.size, pax.mtime), (Some(7), Some((1, 500_000_000))));
        assert_eq!(
            pax.xattrs,
            [(b"user.a".to_vec(), b"1\n2\0=".to_vec()), (b"user.b".to_vec(), Vec::new())]
        );
    }

    pub(crate) fn written(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"x"[..],
            b"7 a=b\n",
            b"5 a=b\n",
            b"6 a=b.",
            b"6 aXb\n",
            b"5 =b\n",
            b" 6 a=b\n",
            b"-6 a=b\n",
            b"+6 a=b\n",
            b"0 a=b\n",
            b"18446744073709551615 a=b\n",
            b"99999999 a=b\n",
            b"6 a=b\n\0",
        ] {
            assert_eq!(Pax::parse(bad), Err(PaxError::Malformed), "{bad:?}");
        }
        for (key, value) in [
            ("path", "a\0b"),
            ("path", ""),
            ("size", "-1"),
            ("size", ""),
            ("mtime", "x"),
            ("uid", "1.5"),
        ] {
            let error = Pax::parse(&written(key, value.as_bytes())).unwrap_err();
            assert!(matches!(error, PaxError::Value(k) if k == key), "{key}={value:?}: {error}");
        }
        let sparse = written("GNU.sparse.realsize", b"1");
        assert_eq!(Pax::parse(&sparse), Err(PaxError::Sparse));
    }

    #[test]
    fn times_have_nanoseconds_and_may_lie_before_1970() {
        assert_eq!(time(b"0"), Some((0, 0)));
        assert_eq!(time(b"12.000000001999"), Some((12, 1)));
        assert_eq!(time(b"-1"), Some((-1, 0)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"9223372036854775807"), Some((i64::MAX, 0)));
        for bad in [&b""[..], b".", b".5", b"1.x", b"--1", b"9223372036854775808"] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_global_header_may_comment_and_no_more() {
        check_global(&written("comment", b"0123abc")).unwrap();
        for key in ["path", "size", "SCHILY.xattr.user.x", "GNU.sparse.name"] {
            let error = check_global(&written(key, b"1")).unwrap_err();
            assert_eq!(error, PaxError::Global(key.to_owned()));
        }
    }
}
