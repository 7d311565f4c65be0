//! One 512-byte header block (POSIX.1-2017 `pax`, "ustar Interchange Format"; GNU's and star's variants).
//!
//! Pure, and strict: where two readers might understand a header differently, it is refused.

/// A header, all headers and the padding of data have multiples of this.
pub(super) const BLOCK: usize = 512;

/// Why a header is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The sum of its bytes is not the one that it states: not tar, or damaged.
    #[error("this is no tar header: its checksum is wrong")]
    Checksum,
    /// A field that is neither octal nor GNU's base-256.
    #[error("the header's field {0:?} is not a number in range")]
    Number(&'static str),
}

/// The fields of a header as they stand there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u64,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) kind: u8,
    pub(super) major: u64,
    pub(super) minor: u64,
}

impl Header {
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self, HeaderError> {
        check_sum(block)?;
        // "ustar\0" is POSIX's; GNU's has a blank there and other things in place of the prefix.
        let posix = &block[257..263] == b"ustar\0";
        let prefix = match (posix, &block[508..512] == b"tar\0") {
            (true, false) => text(&block[345..500]),
            // star keeps times behind a shorter prefix.
            (true, true) => text(&block[345..476]),
            (false, _) => &[],
        };
        let mut name = prefix.to_vec();
        if !name.is_empty() {
            name.push(b'/');
        }
        name.extend_from_slice(text(&block[..100]));
        let ustar = &block[257..262] == b"ustar";
        let device = |field: &[u8], what| if ustar { unsigned(field, what) } else { Ok(0) };
        Ok(Self {
            name,
            link: text(&block[157..257]).to_vec(),
            mode: unsigned(&block[100..108], "mode")?,
            uid: unsigned(&block[108..116], "uid")?,
            gid: unsigned(&block[116..124], "gid")?,
            size: unsigned(&block[124..136], "size")?,
            mtime: signed(&block[136..148], "mtime")?,
            kind: block[156],
            major: device(&block[329..337], "devmajor")?,
            minor: device(&block[337..345], "devminor")?,
        })
    }
}

fn check_sum(block: &[u8; BLOCK]) -> Result<(), HeaderError> {
    const FIELD: std::ops::Range<usize> = 148..156;
    let stated = unsigned(&block[FIELD], "checksum").map_err(|_| HeaderError::Checksum)?;
    let blanks = u64::from(b' ') * FIELD.len() as u64;
    let other = block[..FIELD.start].iter().chain(&block[FIELD.end..]);
    let sum = blanks + other.map(|b| u64::from(*b)).sum::<u64>();
    if sum == stated { Ok(()) } else { Err(HeaderError::Checksum) }
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())]
}

fn unsigned(field: &[u8], what: &'static str) -> Result<u64, HeaderError> {
    u64::try_from(signed(field, what)?).map_err(|_| HeaderError::Number(what))
}

fn signed(field: &[u8], what: &'static str) -> Result<i64, HeaderError> {
    let number = if field[0] & 0x80 == 0 { octal(field) } else { base256(field) };
    number.ok_or(HeaderError::Number(what))
}

/// Digits, blanks before and blanks or NULs behind; nothing at all is zero.
fn octal(field: &[u8]) -> Option<i64> {
    let field = field.trim_ascii_start();
    let end = field.iter().position(|b| !b.is_ascii_digit()).unwrap_or(field.len());
    if !field[end..].iter().all(|b| matches!(b, 0 | b' ')) {
        return None;
    }
    field[..end].iter().try_fold(0_i64, |number, digit| {
        let digit = i64::from(digit - b'0');
        (digit < 8).then_some(())?;
        number.checked_mul(8)?.checked_add(digit)
    })
}

/// GNU's: two's complement, big-endian, with the first bit of the field set as a mark.
fn base256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    let first = if negative { field[0] } else { field[0] & 0x3f };
    let fill = if negative { 0xff } else { 0 };
    let (high, low) = field.split_at(field.len() - 8);
    // What does not fit into 64 bits may only repeat the sign.
    let mut head = high.to_vec();
    let mut low: [u8; 8] = low.try_into().ok()?;
    *head.first_mut().unwrap_or(&mut low[0]) = first;
    if head.iter().any(|b| *b != fill) {
        return None;
    }
    let number = i64::from_be_bytes(low);
    ((number < 0) == negative).then_some(number)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sealed(mut block: [u8; BLOCK]) -> [u8; BLOCK] {
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }

    fn sample() -> [u8; BLOCK] {
        let mut header = ::tar::Header::new_ustar();
        header.set_path("a/b").unwrap();
        header.set_mode(0o4755);
        header.set_uid(7);
        header.set_gid(8);
        header.set_size(9);
        header.set_mtime(10);
        header.set_cksum();
        *header.as_bytes()
    }

    #[test]
    fn a_header_of_another_writer_is_read() {
        let header = Header::parse(&sample()).unwrap();
        assert_eq!(header.name, b"a/b");
        assert_eq!((header.mode, header.uid, header.gid), (0o4755, 7, 8));
        assert_eq!((header.size, header.mtime, header.kind), (9, 10, 0));
    }

    #[test]
    fn every_changed_byte_is_seen() {
        let good = sample();
        for at in 0..BLOCK {
            let mut bad = good;
            bad[at] ^= 0x01;
            assert_ne!(Header::parse(&bad).ok(), Header::parse(&good).ok(), "byte {at}");
        }
        assert_eq!(Header::parse(&[0; BLOCK]), Err(HeaderError::Checksum));
    }

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(octal(b"0000644\0"), Some(0o644));
        assert_eq!(octal(b"   644 \0"), Some(0o644));
        assert_eq!(octal(b"77777777777\0"), Some(0o777_7777_7777));
        assert_eq!(octal(b"\0\0\0\0\0\0\0\0"), Some(0));
        for bad in [&b"-1\0"[..], b"9\0", b"0x1\0", b"6 4\0", b"6\x004\0", b"+1\0", b"1e1\0"] {
            assert_eq!(octal(bad), None, "{bad:?}");
        }
        let wide = |number: i64| {
            let mut field = [if number < 0 { 0xff } else { 0 }; 12];
            field[4..].copy_from_slice(&number.to_be_bytes());
            field[0] |= 0x80;
            field
        };
        for number in [0, 1, i64::MAX, -1, -62_135_596_800, i64::MIN] {
            assert_eq!(signed(&wide(number), "x"), Ok(number), "{number}");
        }
        let mut too_wide = wide(1);
        too_wide[3] = 1;
        assert!(signed(&too_wide, "x").is_err());
        assert!(unsigned(&wide(-1), "x").is_err());
        assert_eq!(signed(b"\x80\0\0\0\0\x10\0\0", "x"), Ok(0x10_0000), "eight bytes, as uid has");
    }

    #[test]
    fn only_posix_headers_have_a_prefix() {
        let mut block = sample();
        block[345..348].copy_from_slice(b"pre");
        assert_eq!(Header::parse(&sealed(block)).unwrap().name, b"pre/a/b");
        block[257..265].copy_from_slice(b"ustar  \0");
        assert_eq!(Header::parse(&sealed(block)).unwrap().name, b"a/b");
    }
}
