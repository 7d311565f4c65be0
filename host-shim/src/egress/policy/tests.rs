use super::*;

fn judge(ip: &str) -> Verdict {
    verdict(ip.parse().unwrap(), &[], &[])
}

/// Written down apart from the policy's own table: first, last and some address between.
const REFUSED: &[(Class, &str)] = &[
    (Class::Unspecified, "0.0.0.0 0.0.0.1 0.1.2.3 0.255.255.255 :: ::ffff:0.0.0.0"),
    (Class::Private, "10.0.0.0 10.0.0.1 10.1.2.3 10.127.0.1 10.255.255.254 10.255.255.255"),
    (Class::Private, "172.16.0.0 172.16.0.1 172.17.0.1 172.20.10.2 172.31.255.254 172.31.255.255"),
    (Class::Private, "192.168.0.0 192.168.0.1 192.168.1.1 192.168.122.1 192.168.255.255"),
    (
        Class::Private,
        "fc00:: fc00::1 fd00::1 fd00:ec2::254 fd12:3456:789a::1 fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    ),
    (
        Class::Private,
        "::ffff:10.0.0.1 ::ffff:172.16.0.1 ::ffff:192.168.1.1 ::ffff:a00:1 ::ffff:c0a8:101",
    ),
    (
        Class::Private,
        "64:ff9b::10.0.0.1 64:ff9b::172.31.0.1 64:ff9b::c0a8:101 64:ff9b::192.168.255.255",
    ),
    (Class::CarrierNat, "100.64.0.0 100.64.0.1 100.100.100.200 100.127.255.254 100.127.255.255"),
    (Class::CarrierNat, "::ffff:100.64.0.1 64:ff9b::100.100.100.200"),
    (
        Class::Loopback,
        "127.0.0.0 127.0.0.1 127.0.1.1 127.1.2.3 127.255.255.255 ::1 ::ffff:127.0.0.1 ::ffff:7f00:1",
    ),
    (Class::Loopback, "64:ff9b::127.0.0.1 64:ff9b::7f00:1 64:ff9b::127.255.255.255"),
    (
        Class::LinkLocal,
        "169.254.0.0 169.254.0.1 169.254.169.254 169.254.170.2 169.254.169.123 169.254.255.255",
    ),
    (
        Class::LinkLocal,
        "::ffff:169.254.169.254 ::ffff:a9fe:a9fe 64:ff9b::169.254.169.254 64:ff9b::a9fe:a9fe",
    ),
    (
        Class::LinkLocal,
        "fe80:: fe80::1 fe80::a9fe:a9fe febf::1 febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff fec0::1 feff::1",
    ),
    (Class::Metadata, "168.63.129.16 ::ffff:168.63.129.16 64:ff9b::168.63.129.16"),
    (Class::Reserved, "192.0.0.0 192.0.0.8 192.0.0.9 192.0.0.170 192.0.0.192 192.0.0.255"),
    (Class::Reserved, "240.0.0.0 240.0.0.1 247.1.2.3 250.1.2.3 255.255.255.254 64:ff9b::240.0.0.1"),
    (
        Class::Reserved,
        "2001:1::1 2001:2::1 2001:2:0:ffff::1 2001:10::1 2001:20::1 2001:1ff:ffff::1",
    ),
    (
        Class::Reserved,
        "100::1 100:0:0:1::1 200::1 400::1 1000::1 1fff:ffff::1 4000::1 5f00::1 8000::1 c000::1 e000::1 fe00::1",
    ),
    (
        Class::Reserved,
        "::1:0:0:1 ::ffff:0:7f00:1 ::ffff:0:0:1 64:ff9a::1 64:ff9b:0:0:0:1::1 64:ff9b:2::1 64:ff9c::1",
    ),
    (
        Class::Documentation,
        "192.0.2.0 192.0.2.1 192.0.2.255 198.51.100.0 198.51.100.7 198.51.100.255",
    ),
    (
        Class::Documentation,
        "203.0.113.0 203.0.113.9 203.0.113.255 198.18.0.0 198.18.0.1 198.19.0.1 198.19.255.255",
    ),
    (
        Class::Documentation,
        "2001:db8:: 2001:db8::1 2001:db8:ffff:ffff:ffff:ffff:ffff:ffff 3fff:: 3fff::1 3fff:fff:ffff::1",
    ),
    (Class::Documentation, "233.252.0.0 233.252.0.255 ::ffff:192.0.2.1 64:ff9b::203.0.113.1"),
    (
        Class::Multicast,
        "224.0.0.0 224.0.0.1 224.0.0.251 232.1.2.3 239.255.255.250 239.255.255.255 255.255.255.255",
    ),
    (
        Class::Multicast,
        "ff00:: ff01::1 ff02::1 ff02::fb ff05::2 ff0e::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    ),
    (
        Class::Multicast,
        "::ffff:224.0.0.1 ::ffff:255.255.255.255 64:ff9b::224.0.0.1 64:ff9b::255.255.255.255",
    ),
    (Class::Tunnel, "192.88.99.0 192.88.99.1 192.88.99.255"),
    (
        Class::Tunnel,
        "::2 ::7f00:1 ::127.0.0.1 ::10.0.0.1 ::8.8.8.8 ::169.254.169.254 ::255.255.255.255",
    ),
    (
        Class::Tunnel,
        "2002:: 2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe::1 2002:c0a8:101::1 2002:808:808::1 2002:ffff:ffff::1",
    ),
    (
        Class::Tunnel,
        "2001:: 2001:0:7f00:1::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:0:ffff:ffff:ffff:ffff:ffff:ffff",
    ),
    (
        Class::Tunnel,
        "64:ff9b:1:: 64:ff9b:1::7f00:1 64:ff9b:1:a00:0:100:: 64:ff9b:1:ffff:ffff:ffff:ffff:ffff",
    ),
];

/// The neighbours of what is refused, and well-known public addresses.
const ALLOWED: &str = "\
1.0.0.0 1.1.1.1 8.8.8.8 9.9.9.9 9.255.255.255 11.0.0.0 11.0.0.1 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 \
151.101.2.132 168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 172.64.0.1 \
191.255.255.255 192.0.1.0 192.0.1.255 192.0.3.0 192.31.196.1 192.52.193.1 192.88.98.255 192.88.100.0 192.167.255.255 \
192.169.0.0 192.175.48.1 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 \
223.255.255.255 \
2000::1 2001:200::1 2001:4860:4860::8888 2001:db7:ffff::1 2001:db9::1 2003::1 2400::1 2606:4700::1111 2620:4f:8000::1 \
2620:fe::fe 2a00:1450::1 2a04:4e42::644 3ffe:ffff::1 3fff:1000::1 3fff:ffff::1 2001:ffff::1 \
::ffff:8.8.8.8 ::ffff:1.1.1.1 ::ffff:9.255.255.255 64:ff9b::8.8.8.8 64:ff9b::1.1.1.1 64:ff9b::172.32.0.1";

#[test]
fn what_is_not_public_is_refused_as_what_it_is() {
    let mut judged = 0;
    for (class, addresses) in REFUSED {
        for ip in addresses.split(' ') {
            assert_eq!(judge(ip), Verdict::Refused(*class), "{ip}");
            judged += 1;
        }
    }
    assert!(judged > 170, "{judged}");
}

#[test]
fn what_is_public_is_allowed() {
    for ip in ALLOWED.split(' ') {
        assert_eq!(judge(ip), Verdict::Allowed, "{ip}");
    }
}

#[test]
fn every_mapped_form_is_judged_as_the_address_inside() {
    for step in 0..=u32::from(u16::MAX) {
        // A prime that is no divisor of 2^32 visits all of the space.
        let inner = Ipv4Addr::from(step.wrapping_mul(65_537 * 3 + 2));
        let plain = verdict(inner.into(), &[], &[]);
        assert_eq!(verdict(inner.to_ipv6_mapped().into(), &[], &[]), plain, "{inner}");
        let nat64 = Ipv6Addr::from((0x0064_ff9b_u128 << 96) | u128::from(u32::from(inner)));
        assert_eq!(verdict(nat64.into(), &[], &[]), plain, "{inner}");
    }
}

#[test]
fn what_the_operator_permits_comes_first() {
    let permitted: Vec<IpNet> = ["10.1.0.0/16", "169.254.169.254/32", "fd00:1::/32", "127.0.0.0/8"]
        .iter()
        .map(|range| range.parse().unwrap())
        .collect();
    let own = ["10.1.0.1".parse().unwrap(), "93.184.216.34".parse().unwrap()];
    let with = |ip: &str| verdict(ip.parse().unwrap(), &permitted, &own);
    for ip in [
        "10.1.0.0",
        "10.1.255.255",
        "::ffff:10.1.2.3",
        "64:ff9b::10.1.2.3",
        "169.254.169.254",
        "fd00:1::9",
        "127.0.0.1",
        "10.1.0.1",
    ] {
        assert_eq!(with(ip), Verdict::Allowed, "{ip}");
    }
    for ip in [
        "10.0.255.255",
        "10.2.0.0",
        "169.254.169.253",
        "fd00:2::1",
        "::1",
        "::127.0.0.1",
        "2002:a01:1::",
    ] {
        assert!(matches!(with(ip), Verdict::Refused(_)), "{ip}");
    }
    for ip in ["93.184.216.34", "::ffff:93.184.216.34", "64:ff9b::93.184.216.34"] {
        assert_eq!(with(ip), Verdict::Refused(Class::Host), "{ip}");
    }
}

#[test]
fn the_hosts_addresses_are_known() {
    let own = own_addresses().unwrap();
    assert!(own.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)), "{own:?}");
}
