use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;

use super::*;

fn ends(source: &str, destination: &str) -> Ends {
    Ends { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

fn any_ends() -> impl Strategy<Value = Ends> {
    let v4 = (any::<[u8; 4]>(), any::<[u8; 4]>()).prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b)));
    let v6 = (any::<[u8; 16]>(), any::<[u8; 16]>()).prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b)));
    (prop_oneof![v4, v6], any::<u16>(), any::<u16>()).prop_map(|((source, destination), from, to)| Ends {
        source: (source, from).into(),
        destination: (destination, to).into(),
    })
}

#[test]
fn headers_are_as_the_specification_draws_them() {
    let v4 = ends("192.0.2.1:4660", "198.51.100.2:53");
    assert_eq!(Header::version_1(&v4).as_bytes(), b"PROXY TCP4 192.0.2.1 198.51.100.2 4660 53\r\n");
    let expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\xc0\0\x02\x01\xc6\x33\x64\x02\x12\x34\0\x35";
    assert_eq!(Header::version_2(&v4, Transport::Datagram).as_bytes(), expected);
    let v6 = ends("[2001:db8::1]:1", "[::1]:2");
    assert_eq!(Header::version_1(&v6).as_bytes(), b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n");
    let header = Header::version_2(&v6, Transport::Stream);
    let bytes = header.as_bytes();
    let parts = (bytes.len(), &bytes[12..16], &bytes[48..]);
    assert_eq!(parts, (52, &[0x21, 0x21, 0, 36][..], &[0, 1, 0, 2][..]));
}

#[test]
fn two_families_are_unknown_in_version_1_and_mapped_in_version_2() {
    let mixed = ends("192.0.2.1:4660", "[2001:db8::1]:53");
    assert_eq!(Header::version_1(&mixed).as_bytes(), b"PROXY UNKNOWN\r\n");
    let header = Header::version_2(&mixed, Transport::Stream);
    let Ok(Decoded::Header { ends: Some(read), .. }) = decode(header.as_bytes()) else {
        panic!("{header:?}")
    };
    assert_eq!(read, ends("[::ffff:192.0.2.1]:4660", "[2001:db8::1]:53"));
}

#[test]
fn the_longest_line_has_room() {
    let longest = ends(
        "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
        "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
    );
    assert_eq!(Header::version_1(&longest).as_bytes().len(), 104);
}

#[test]
fn lines_that_are_not_quite_headers_are_refused() {
    let refused = [
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
        "PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8  \r\n",
        "PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP4 ::1 ::1 1 2\r\n",
        "PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
        "PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY UNKNOWNx\r\n",
        "PROXY \r\n",
        "PROXY \u{fffd}\r\n",
    ];
    for line in refused {
        assert_eq!(decode(line.as_bytes()), Err(Malformed::V1), "{line:?}");
    }
    for rubbish in ["GET / HTTP/1.1\r\n", "PROXYTCP4", "proxy ", "\r\n\r\n\r\n", "Q"] {
        assert_eq!(decode(rubbish.as_bytes()), Err(Malformed::NoHeader), "{rubbish:?}");
    }
}

#[test]
fn a_line_of_107_bytes_is_taken_and_one_of_108_is_not() {
    let line = |length: usize| format!("PROXY UNKNOWN {}\r\n", "x".repeat(length - 16)).into_bytes();
    assert_eq!(decode(&line(107)), Ok(Decoded::Header { length: 107, ends: None }));
    assert_eq!(decode(&line(108)), Err(Malformed::V1TooLong));
    assert_eq!(decode(&line(108)[..106]), Ok(Decoded::Incomplete));
}

/// A header of version 2 with any kind and body.
fn version_2(command: u8, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = V2_SIGNATURE.to_vec();
    bytes.extend([command, kind]);
    bytes.extend((body.len() as u16).to_be_bytes());
    bytes.extend(body);
    bytes
}

#[test]
fn what_names_no_tcp_connection_leaves_the_real_ends() {
    let real = |bytes: &[u8]| decode(bytes) == Ok(Decoded::Header { length: bytes.len(), ends: None });
    assert!(real(b"PROXY UNKNOWN\r\n"));
    assert!(real(b"PROXY UNKNOWN 1.2.3.4 5.6.7.8 1 2\r\n"));
    // LOCAL, whatever stands behind it; UNSPEC; Unix; a datagram.
    assert!(real(&version_2(0x20, 0x00, &[])));
    assert!(real(&version_2(0x20, 0x11, &[1, 2, 3])));
    assert!(real(&version_2(0x21, 0x00, &[9; 40])));
    assert!(real(&version_2(0x21, 0x31, &[0; 216])));
    assert!(real(&version_2(0x21, 0x12, &[0; 12])));
}

#[test]
fn lengths_that_do_not_agree_are_refused() {
    let lengths = |bytes: Vec<u8>| decode(&bytes) == Err(Malformed::V2Lengths);
    assert!(lengths(version_2(0x21, 0x11, &[0; 11])));
    assert!(lengths(version_2(0x21, 0x21, &[0; 35])));
    assert!(lengths(version_2(0x21, 0x31, &[0; 215])));
    // A TLV that is longer than what is left, and one that ends in its head.
    assert!(lengths(version_2(0x21, 0x11, &[&[0; 12][..], &[4, 0, 2, 7]].concat())));
    assert!(lengths(version_2(0x21, 0x11, &[&[0; 12][..], &[4, 0]].concat())));
    assert_eq!(decode(&version_2(0x21, 0x41, &[])), Err(Malformed::V2Kind));
    assert_eq!(decode(&version_2(0x22, 0x11, &[])), Err(Malformed::V2Kind));
    assert_eq!(decode(&version_2(0x11, 0x11, &[])), Err(Malformed::V2Kind));
}

#[test]
fn a_header_of_4096_bytes_is_taken_and_a_longer_one_refused_at_once() {
    // A TLV that fills it.
    let with = |length: u16| {
        let tlv = [&[0xe0][..], &length.to_be_bytes(), &vec![7; usize::from(length)]].concat();
        version_2(0x21, 0x11, &[&[10; 12][..], &tlv].concat())
    };
    let longest = with((V2_BYTES - V2_FIXED - 12 - 3) as u16);
    assert!(matches!(decode(&longest), Ok(Decoded::Header { length: V2_BYTES, ends: Some(_) })));
    let longer = with((V2_BYTES - V2_FIXED - 12 - 2) as u16);
    assert_eq!(decode(&longer[..V2_FIXED]), Err(Malformed::V2TooLong));
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(ends in any_ends(), after in prop::collection::vec(any::<u8>(), 0..50)) {
        for header in [Header::version_1(&ends), Header::version_2(&ends, Transport::Stream)] {
            let bytes = [header.as_bytes(), &after].concat();
            let length = header.as_bytes().len();
            prop_assert_eq!(decode(&bytes), Ok(Decoded::Header { length, ends: Some(ends) }));
            for cut in 0..length {
                prop_assert_eq!(decode(&bytes[..cut]), Ok(Decoded::Incomplete), "cut at {}", cut);
            }
        }
    }

    #[test]
    fn no_bytes_make_it_panic_and_more_bytes_change_no_verdict(
        begin in prop_oneof![Just(vec![]), Just(V1_BEGIN.to_vec()), Just(V2_SIGNATURE.to_vec())],
        rest in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let bytes = [begin, rest].concat();
        let whole = decode(&bytes);
        for cut in 0..bytes.len() {
            let part = decode(&bytes[..cut]);
            prop_assert!(part == Ok(Decoded::Incomplete) || part == whole, "{:?} at {}", part, cut);
            if let Ok(Decoded::Header { length, .. }) = part {
                prop_assert!(length <= cut && length <= V2_BYTES);
            }
        }
    }

    #[test]
    fn a_changed_byte_is_read_or_refused(ends in any_ends(), at: prop::sample::Index, byte: u8, second: bool) {
        let header = if second { Header::version_2(&ends, Transport::Stream) } else { Header::version_1(&ends) };
        let mut bytes = header.as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = decode(&bytes);
    }

    #[test]
    fn every_sane_header_of_version_2_is_taken_whole(
        ends in any_ends(),
        tlvs in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..90)), 0..20),
    ) {
        let plain = Header::version_2(&ends, Transport::Stream);
        let mut bytes = plain.as_bytes().to_vec();
        for (kind, value) in &tlvs {
            bytes.push(*kind);
            bytes.extend((value.len() as u16).to_be_bytes());
            bytes.extend(value);
        }
        let length = (bytes.len() - V2_FIXED) as u16;
        bytes[14..16].copy_from_slice(&length.to_be_bytes());
        let expected = Decoded::Header { length: bytes.len(), ends: Some(ends) };
        prop_assert_eq!(decode(&bytes), Ok(expected));
    }
}

#[test]
fn a_scope_does_not_travel() {
    let mut source: SocketAddr = "[fe80::1]:7".parse().unwrap();
    if let SocketAddr::V6(v6) = &mut source {
        v6.set_scope_id(3);
    }
    let header = Header::version_1(&Ends { source, destination: "[fe80::2]:8".parse().unwrap() });
    assert_eq!(header.as_bytes(), b"PROXY TCP6 fe80::1 fe80::2 7 8\r\n");
}
