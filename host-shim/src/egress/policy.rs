//! Which addresses a build may reach. Pure.
//!
//! Ranges are from IANA's special-purpose registries (RFC 6890 and its updates). IPv6 is allowed by what is global
//! unicast; what carries an IPv4 address inside is judged by that, or refused where nobody should use it any more.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Whether an address may be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allowed,
    /// It may not, being this.
    Refused(Class),
}

/// What an address is, that a build may not reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// One of the host's own.
    Host,
    /// Loopback.
    Loopback,
    /// Of a private network.
    Private,
    /// Of the local link, cloud metadata services among them.
    LinkLocal,
    /// A cloud's service for its machines, at a public address.
    Metadata,
    /// Shared by a carrier's customers.
    CarrierNat,
    /// Multicast or broadcast.
    Multicast,
    /// No address, or of "this network".
    Unspecified,
    /// For documentation or benchmarks.
    Documentation,
    /// An IPv6 transition mechanism that reaches IPv4 addresses by a detour.
    Tunnel,
    /// Otherwise reserved.
    Reserved,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "an address of the host itself",
            Self::Loopback => "a loopback address",
            Self::Private => "a private address",
            Self::LinkLocal => "a link-local address",
            Self::Metadata => "a cloud metadata service",
            Self::CarrierNat => "a carrier's shared address",
            Self::Multicast => "a multicast or broadcast address",
            Self::Unspecified => "an unspecified address",
            Self::Documentation => "an address for documentation or benchmarks",
            Self::Tunnel => "an address of an IPv6 tunnel",
            Self::Reserved => "a reserved address",
        })
    }
}

/// Judges an address. `permitted` comes before everything else: the operator said so.
pub fn verdict(ip: IpAddr, permitted: &[IpNet], own: &[IpAddr]) -> Verdict {
    // ::ffff:a.b.c.d is a.b.c.d to the kernel, so it is that here.
    let ip = ip.to_canonical();
    if permitted.iter().any(|range| range.contains(&ip)) {
        return Verdict::Allowed;
    }
    if own.iter().any(|address| address.to_canonical() == ip) {
        return Verdict::Refused(Class::Host);
    }
    let class = match ip {
        IpAddr::V4(ip) => class_v4(ip),
        IpAddr::V6(ip) => match nat64(ip) {
            Some(inner) => return verdict(IpAddr::V4(inner), permitted, own),
            None => class_v6(ip),
        },
    };
    class.map_or(Verdict::Allowed, Verdict::Refused)
}

/// The addresses of the host's interfaces, now.
pub fn own_addresses() -> std::io::Result<Vec<IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    let addresses = interfaces.filter_map(|interface| interface.address).filter_map(|address| {
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    });
    Ok(addresses.collect())
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

/// The first that matches counts.
const V4: [(Ipv4Net, Class); 18] = [
    (v4(0, 0, 0, 0, 8), Class::Unspecified),
    (v4(10, 0, 0, 0, 8), Class::Private),
    (v4(100, 64, 0, 0, 10), Class::CarrierNat),
    (v4(127, 0, 0, 0, 8), Class::Loopback),
    // Azure's, reachable from every machine in it.
    (v4(168, 63, 129, 16, 32), Class::Metadata),
    (v4(169, 254, 0, 0, 16), Class::LinkLocal),
    (v4(172, 16, 0, 0, 12), Class::Private),
    (v4(192, 0, 0, 0, 24), Class::Reserved),
    (v4(192, 0, 2, 0, 24), Class::Documentation),
    // The 6to4 relays' anycast.
    (v4(192, 88, 99, 0, 24), Class::Tunnel),
    (v4(192, 168, 0, 0, 16), Class::Private),
    (v4(198, 18, 0, 0, 15), Class::Documentation),
    (v4(198, 51, 100, 0, 24), Class::Documentation),
    (v4(203, 0, 113, 0, 24), Class::Documentation),
    (v4(233, 252, 0, 0, 24), Class::Documentation),
    (v4(224, 0, 0, 0, 4), Class::Multicast),
    (v4(255, 255, 255, 255, 32), Class::Multicast),
    (v4(240, 0, 0, 0, 4), Class::Reserved),
];

fn class_v4(ip: Ipv4Addr) -> Option<Class> {
    V4.iter().find(|(range, _)| range.contains(&ip)).map(|(_, class)| *class)
}

const fn v6(a: u16, b: u16, c: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), prefix)
}

/// The first that matches counts; what none matches is reserved unless it is [`GLOBAL_V6`].
const V6: [(Ipv6Net, Class); 12] = [
    (Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128), Class::Unspecified),
    (Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128), Class::Loopback),
    // IPv4-compatible, deprecated.
    (v6(0, 0, 0, 96), Class::Tunnel),
    // NAT64 of a network's own choosing: its layout is unknown, so what is inside is too.
    (v6(0x64, 0xff9b, 1, 48), Class::Tunnel),
    // Teredo, then the rest of the protocol assignments, ORCHID and benchmarks among them.
    (v6(0x2001, 0, 0, 32), Class::Tunnel),
    (v6(0x2001, 0, 0, 23), Class::Reserved),
    (v6(0x2001, 0xdb8, 0, 32), Class::Documentation),
    // 6to4.
    (v6(0x2002, 0, 0, 16), Class::Tunnel),
    (v6(0x3fff, 0, 0, 20), Class::Documentation),
    (v6(0xfc00, 0, 0, 7), Class::Private),
    // Link-local, and site-local as it once was beside it.
    (v6(0xfe80, 0, 0, 9), Class::LinkLocal),
    (v6(0xff00, 0, 0, 8), Class::Multicast),
];

/// Global unicast (RFC 4291, as assigned by IANA).
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 0, 3);

fn class_v6(ip: Ipv6Addr) -> Option<Class> {
    match V6.iter().find(|(range, _)| range.contains(&ip)) {
        Some((_, class)) => Some(*class),
        None if GLOBAL_V6.contains(&ip) => None,
        None => Some(Class::Reserved),
    }
}

/// The IPv4 address inside one of NAT64's well-known prefix, `64:ff9b::/96` (RFC 6052): networks without IPv4 reach
/// everything by it.
fn nat64(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let well_known = v6(0x64, 0xff9b, 0, 96);
    let [.., a, b, c, d] = ip.octets();
    well_known.contains(&ip).then(|| Ipv4Addr::new(a, b, c, d))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
