//! Whom a request is for, taken from its URI alone.

use std::net::IpAddr;

use http::Uri;
use http::uri::{Authority, Scheme};

use super::Refusal;

/// A name has at most so many characters (RFC 1035, section 2.3.4, as text).
const MAX_HOST: usize = 253;

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Without an IPv6 literal's brackets.
    host: String,
    port: u16,
    literal: Option<IpAddr>,
}

impl Target {
    /// `CONNECT host:port`.
    pub(super) fn of_connect(uri: &Uri) -> Result<Self, Refusal> {
        let no = || Refusal::bad("CONNECT needs a host and a port");
        let authority = uri.authority().ok_or_else(no)?;
        Self::new(authority, port_of(authority)?.ok_or_else(no)?)
    }

    /// `GET http://host[:port]/…`.
    pub(super) fn of_absolute(uri: &Uri) -> Result<Self, Refusal> {
        match (uri.scheme(), uri.authority()) {
            (Some(scheme), Some(authority)) if *scheme == Scheme::HTTP => {
                let port = port_of(authority)?.unwrap_or(80);
                Self::new(authority, port)
            }
            (Some(_), Some(_)) => {
                Err(Refusal::bad("only http:// can be asked for like this; use CONNECT"))
            }
            _ => Err(Refusal::bad("this is a proxy: ask for http://HOST/…, or use CONNECT")),
        }
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// The address, where the host is one and no name.
    pub(super) fn literal(&self) -> Option<IpAddr> {
        self.literal
    }

    /// As a `Host` header has it.
    pub(super) fn authority(&self) -> String {
        let host = match self.literal {
            Some(IpAddr::V6(ip)) => format!("[{ip}]"),
            _ => self.host.clone(),
        };
        if self.port == 80 { host } else { format!("{host}:{}", self.port) }
    }

    fn new(authority: &Authority, port: u16) -> Result<Self, Refusal> {
        if authority.as_str().contains('@') {
            return Err(Refusal::bad("credentials do not belong in a host"));
        }
        if port == 0 {
            return Err(Refusal::bad("there is no port 0"));
        }
        let host = authority.host();
        let literal = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(inside) => Some(IpAddr::V6(
                inside.parse().map_err(|_| Refusal::bad("the IPv6 address is malformed"))?,
            )),
            None => host.parse().ok().map(IpAddr::V4),
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if literal.is_none() && !((1..=MAX_HOST).contains(&host.len()) && host.bytes().all(plain)) {
            return Err(Refusal::bad("the host is not a name"));
        }
        let host = literal.map_or_else(|| host.to_ascii_lowercase(), |ip| ip.to_string());
        Ok(Self { host, port, literal })
    }
}

/// The port, if any. One that is there and is no port is an error, where `Authority::port` would see none.
fn port_of(authority: &Authority) -> Result<Option<u16>, Refusal> {
    let malformed = || Refusal::bad("the port is malformed");
    // Where there are credentials before the host, `Target::new` refuses them.
    let after_host = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
    if after_host.is_empty() {
        return Ok(None);
    }
    let digits =
        after_host.strip_prefix(':').filter(|port| port.bytes().all(|b| b.is_ascii_digit()));
    digits.and_then(|port| port.parse().ok()).map(Some).ok_or_else(malformed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn absolute(uri: &str) -> Result<(String, u16, String), String> {
        let uri = uri.parse::<Uri>().map_err(|e| e.to_string())?;
        Target::of_absolute(&uri)
            .map(|t| (t.host.clone(), t.port, t.authority()))
            .map_err(|r| r.reason)
    }

    #[test]
    fn whom_a_uri_is_for() {
        let of =
            |host: &str, port, authority: &str| Ok((host.to_owned(), port, authority.to_owned()));
        assert_eq!(absolute("http://Example.ORG/x"), of("example.org", 80, "example.org"));
        assert_eq!(absolute("http://example.org:80"), of("example.org", 80, "example.org"));
        assert_eq!(
            absolute("http://example.org.:8080/"),
            of("example.org.", 8080, "example.org.:8080")
        );
        assert_eq!(absolute("http://192.0.2.1/"), of("192.0.2.1", 80, "192.0.2.1"));
        assert_eq!(absolute("http://[2001:db8::1]:81/"), of("2001:db8::1", 81, "[2001:db8::1]:81"));
        // Odd spellings of addresses are names here, and what they resolve to is judged.
        assert_eq!(absolute("http://2130706433/"), of("2130706433", 80, "2130706433"));
        assert_eq!(absolute("http://0x7f.1/"), of("0x7f.1", 80, "0x7f.1"));
    }

    #[test]
    fn what_is_for_nobody() {
        let long = format!("http://{}/", "a".repeat(MAX_HOST + 1));
        for uri in [
            "/path",
            "https://example.org/",
            "ftp://example.org/",
            "http://user@example.org/",
            "http://user:pw@example.org/",
            "http://example.org:0/",
            "http://example.org:65536/",
            "http://example.org:+1/",
            "http://1:65537/",
            "http://[::1]:99999/",
            "http://[::1%25eth0]/",
            "http://[1.2.3.4]/",
            "http://exa!mple/",
            "http://a%00b/",
            "*",
            &long,
        ] {
            assert!(absolute(uri).is_err(), "{uri}");
        }
        assert!(absolute(&format!("http://{}/", "a".repeat(MAX_HOST))).is_ok());
    }

    #[test]
    fn connect_needs_a_port() {
        let connect =
            |uri: &str| Target::of_connect(&uri.parse().unwrap()).map(|t| (t.host, t.port)).ok();
        assert_eq!(connect("example.org:443"), Some(("example.org".to_owned(), 443)));
        assert_eq!(connect("[::1]:1"), Some(("::1".to_owned(), 1)));
        assert_eq!(connect("1:1"), Some(("1".to_owned(), 1)));
        assert_eq!(connect("example.org"), None);
        assert_eq!(connect("example.org:65536"), None);
        assert_eq!(connect("user@example.org:443"), None);
        assert_eq!(connect("example.org:0"), None);
    }
}
