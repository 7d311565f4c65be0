//! The domains of a build's allow-list. Pure.
//!
//! ```text
//! host        that name, at ports 80 and 443        *.host        names below it, not itself
//! host:port   that name, at that port               *.host:port   both
//! ```
//! A list is of names. An address is never on it: what a name leads to is for [`super::policy`] to judge.

use std::fmt;

/// Most entries of one list.
pub const MAX_DOMAINS: usize = 256;

/// Longest entry, in bytes: a wildcard, the longest name with its dot, and a port.
pub const MAX_DOMAIN: usize = 2 + MAX_NAME + 1 + 6;

/// A name has at most so many characters (RFC 1035, section 2.3.4, as text).
const MAX_NAME: usize = 253;

/// A part of a name between dots.
const MAX_LABEL: usize = 63;

/// What is reached where an entry names no port.
const PORTS: [u16; 2] = [80, 443];

/// One entry of a list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Domain {
    /// In lower case, without a dot at its end.
    host: String,
    /// It stands for the names below.
    wildcard: bool,
    port: Option<u16>,
}

/// Why a text is no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDomain {
    /// An IP address, in whatever spelling.
    #[error("is an address; a list is of names")]
    Address,
    /// Everything.
    #[error("is everything; network_mode open is for that")]
    Everything,
    /// Not a host, or a port that is none.
    #[error(
        "must be HOST or *.HOST, with :PORT or without: names of letters, digits, '-' and '_' between dots, \
         in their ASCII form (xn--…)"
    )]
    Form,
}

impl Domain {
    /// Reads one entry.
    pub fn parse(text: &str) -> Result<Self, BadDomain> {
        if text.len() > MAX_DOMAIN {
            return Err(BadDomain::Form);
        }
        let is_v6 = |text: &str| text.parse::<std::net::Ipv6Addr>().is_ok();
        if text.starts_with('[') || is_v6(text) {
            return Err(BadDomain::Address);
        }
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(parse_port(port).ok_or(BadDomain::Form)?)),
            None => (text, None),
        };
        if matches!(name, "*" | "*.") {
            return Err(BadDomain::Everything);
        }
        let (name, wildcard) = match name.strip_prefix("*.") {
            Some(below) => (below, true),
            None => (name, false),
        };
        let host = plain(name);
        if host.len() > MAX_NAME || !host.split('.').all(is_label) {
            return Err(BadDomain::Form);
        }
        if is_number(host.rsplit('.').next().unwrap_or_default()) {
            return Err(BadDomain::Address);
        }
        Ok(Self { host, wildcard, port })
    }

    /// Whether a name may be reached at a port.
    pub fn allows(&self, host: &str, port: u16) -> bool {
        let fits = self.port.map_or_else(|| PORTS.contains(&port), |own| own == port);
        fits && self.names(host)
    }

    /// Whether a name is meant, at whatever port.
    pub fn names(&self, host: &str) -> bool {
        let host = plain(host);
        if !self.wildcard {
            return host == self.host;
        }
        let below = host.strip_suffix(&self.host).and_then(|below| below.strip_suffix('.'));
        below.is_some_and(|below| !below.is_empty())
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let below = if self.wildcard { "*." } else { "" };
        write!(f, "{below}{}", self.host)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// A name as names are compared: in lower case, without the dot that only says that it is whole.
pub fn plain(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn parse_port(text: &str) -> Option<u16> {
    let is_plain = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|port| is_plain && *port != 0)
}

fn is_label(label: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = label.as_bytes();
    bytes.len() <= MAX_LABEL
        && bytes.first().copied().is_some_and(word)
        && bytes.last().copied().is_some_and(word)
        && bytes.iter().all(|b| word(*b) || *b == b'-')
}

/// A name that ends in one is read as an IPv4 address by some: `127.1`, `0x7f.1`, `2130706433`.
fn is_number(label: &str) -> bool {
    let is_hex = |digits: &str| digits.bytes().all(|b| b.is_ascii_hexdigit());
    label.bytes().all(|b| b.is_ascii_digit()) || label.strip_prefix("0x").is_some_and(is_hex)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn allows(entry: &str, host: &str, port: u16) -> bool {
        Domain::parse(entry).unwrap().allows(host, port)
    }

    #[test]
    fn an_entry_is_one_name_or_what_is_below_it() {
        assert!(allows("example.com", "example.com", 443));
        assert!(allows("Example.COM.", "eXample.com.", 80));
        assert!(!allows("example.com", "www.example.com", 443));
        assert!(!allows("example.com", "badexample.com", 443));
        assert!(allows("*.example.com", "www.example.com", 443));
        assert!(allows("*.example.com", "a.b.example.com.", 443));
        assert!(!allows("*.example.com", "example.com", 443));
        assert!(!allows("*.example.com", ".example.com", 443));
        assert!(!allows("*.example.com", "badexample.com", 443));
        assert!(!allows("*.example.com", "example.com.evil.test", 443));
        assert!(allows("mirror", "mirror", 80) && allows("_a._b.test", "_a._b.test", 80));
    }

    #[test]
    fn without_a_port_it_is_80_and_443_and_with_one_that_alone() {
        for (port, without, with) in
            [(80, true, false), (443, true, false), (8080, false, true), (22, false, false)]
        {
            assert_eq!(allows("a.test", "a.test", port), without, "{port}");
            assert_eq!(allows("a.test:8080", "a.test", port), with, "{port}");
            assert_eq!(allows("*.test:8080", "a.test", port), with, "{port}");
        }
        assert!(allows("a.test:443", "a.test", 443) && !allows("a.test:443", "a.test", 80));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for address in [
            "127.0.0.1",
            "127.0.0.1:80",
            "127.1",
            "0x7f.1",
            "2130706433",
            "a.0x",
            "*.0.0.1",
            "::1",
            "[::1]",
            "[::1]:80",
            "1.2.3.4.",
        ] {
            assert_eq!(Domain::parse(address), Err(BadDomain::Address), "{address}");
        }
        for everything in ["*", "*.", "*:443"] {
            assert_eq!(Domain::parse(everything), Err(BadDomain::Everything), "{everything}");
        }
        let long_label = format!("{}.test", "a".repeat(MAX_LABEL + 1));
        let long = format!("{}a", "a.".repeat(MAX_NAME / 2 + 1));
        for bad in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a..",
            "*a.test",
            "a.*.test",
            "*.*.test",
            "a b",
            "a/b",
            "http://a.test",
            "a@b",
            "-a.test",
            "a-.test",
            "a.test:",
            "a.test:0",
            "a.test:65536",
            "a.test:+1",
            "a.test:80:80",
            "bücher.test",
            "a\n",
            "a,b",
            &long_label,
            &long,
        ] {
            assert_eq!(Domain::parse(bad), Err(BadDomain::Form), "{bad:?}");
        }
        assert!(Domain::parse(&format!("{}.test", "a".repeat(MAX_LABEL))).is_ok());
        let longest = format!("{}a", "a.".repeat(MAX_NAME / 2));
        assert_eq!(longest.len(), MAX_NAME);
        assert!(Domain::parse(&format!("*.{longest}.:65535")).is_ok());
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        for (text, written) in
            [("A.test.", "a.test"), ("*.A.test.:80", "*.a.test:80"), ("a.test:0443", "a.test:443")]
        {
            assert_eq!(Domain::parse(text).unwrap().to_string(), written);
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics_and_writing_goes_back(text in "(\\*\\.)?[aZ0._*:\\[\\]x-]{0,20}(:[0-9]{1,6})?") {
            if let Ok(domain) = Domain::parse(&text) {
                prop_assert_eq!(Domain::parse(&domain.to_string()), Ok(domain));
            }
        }

        #[test]
        fn no_entry_allows_an_address(entry in "(\\*\\.)?[a0x.]{1,8}", ip in any::<std::net::IpAddr>()) {
            if let Ok(domain) = Domain::parse(&entry) {
                prop_assert!(!domain.names(&ip.to_string()));
            }
        }
    }
}
