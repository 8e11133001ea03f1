//! Over real sockets on loopback.

use std::net::UdpSocket;

use super::*;
use crate::sys::listen::{self, Options};

fn socket(address: &str) -> UdpSocket {
    UdpSocket::bind(address).unwrap()
}

fn plain<'a>(bytes: &'a [u8], to: Option<SocketAddr>) -> Outgoing<'a> {
    Outgoing { head: &[], bytes, to, from: None, segment: None }
}

#[test]
fn a_batch_arrives_in_order_with_its_senders() {
    let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
    let texts: Vec<String> = (0..150).map(|i| format!("datagram {i}")).collect();
    let mut done = 0;
    let to_address = to.local_addr().unwrap();
    Sender::default().send(
        &from,
        texts.iter().map(|t| plain(t.as_bytes(), Some(to_address))),
        |number, result| {
            assert_eq!((number, result.is_ok()), (done, true));
            done += 1;
        },
    );
    assert_eq!(done, 150);
    let mut arena = Arena::new(64, 2048);
    let mut got = Vec::new();
    for expected in [64, 64, 22] {
        assert_eq!(arena.receive(&to, 0, 64).unwrap(), expected);
        for place in 0..expected {
            let received = arena.get(place);
            assert_eq!(received.from, Some(from.local_addr().unwrap()));
            got.push(String::from_utf8(received.bytes.to_vec()).unwrap());
        }
    }
    assert_eq!(got, texts);
    assert_eq!(arena.receive(&to, 0, 64).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_datagram_that_is_too_long_for_its_place_says_so() {
    let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
    from.send_to(&[7; 100], to.local_addr().unwrap()).unwrap();
    from.send_to(&[7; 64], to.local_addr().unwrap()).unwrap();
    let mut arena = Arena::new(2, 64);
    assert_eq!(arena.receive(&to, 0, 2).unwrap(), 2);
    assert_eq!((arena.get(0).truncated, arena.get(1).truncated), (true, false));
}

#[test]
fn one_datagram_at_a_time_is_as_good_as_a_batch() {
    let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
    to.connect(from.local_addr().unwrap()).unwrap();
    let mut arena = Arena::new(4, 64);
    for size in [100, 64, 0, 5] {
        from.send_to(&[size as u8; 128][..size], to.local_addr().unwrap()).unwrap();
    }
    for (place, size) in [100, 64, 0, 5].into_iter().enumerate() {
        arena.receive_one(&to, place).unwrap();
        let received = arena.get(place);
        assert_eq!(received.bytes, vec![size as u8; size.min(64)]);
        assert_eq!((received.truncated, received.count()), (size > 64, 1));
        assert_eq!((received.from, received.local, received.segment), (None, None, None));
    }
    assert_eq!(arena.receive_one(&to, 0).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn joined_datagrams_are_cut_again() {
    if !crate::sys::host::udp_offloads().is_ok_and(|can| can == (true, true)) {
        println!("SKIPPED: this kernel has no UDP offloads");
        return;
    }
    let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
    assert!(join_received(&to));
    let bytes: Vec<u8> = (0..3500u32).map(|i| i as u8).collect();
    let datagram = Outgoing { segment: Some(1000), ..plain(&bytes, Some(to.local_addr().unwrap())) };
    Sender::default().send(&from, [datagram], |_, result| result.unwrap());
    let mut arena = Arena::new(4, 65_536);
    assert_eq!(arena.receive(&to, 0, 4).unwrap(), 1);
    let received = arena.get(0);
    assert_eq!((received.bytes, received.segment, received.count()), (&bytes[..], Some(1000), 4));
}

#[test]
fn a_reply_leaves_from_the_address_that_was_asked() {
    for (bind, ask) in [("0.0.0.0:0", "127.0.0.3"), ("[::]:0", "::1")] {
        let listener = UdpSocket::from(listen::udp(bind.parse().unwrap(), &Options::default()).unwrap());
        prepare_listener(&listener).unwrap();
        let asked = SocketAddr::new(ask.parse().unwrap(), listener.local_addr().unwrap().port());
        let client = socket(if asked.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" });
        client.send_to(b"?", asked).unwrap();
        let mut arena = Arena::new(2, 100);
        assert_eq!(arena.receive(&listener, 0, 2).unwrap(), 1);
        let received = arena.get(0);
        assert_eq!(received.local, Some(asked.ip()));
        assert!(received.stamp.is_some_and(|stamp| stamp.as_secs() > 1_000_000_000));
        let reply = Outgoing { from: received.local, head: b"he", ..plain(b"llo", received.from) };
        Sender::default().send(&listener, [reply], |_, result| result.unwrap());
        let mut buffer = [0; 10];
        assert_eq!(client.recv_from(&mut buffer).unwrap(), (5, asked));
        assert_eq!(&buffer[..5], b"hello");
    }
}

#[test]
fn a_port_that_nobody_has_is_an_error_of_the_connected_socket() {
    let nobody = socket("127.0.0.1:0").local_addr().unwrap();
    let flow = connect(nobody, LocalEnd::Any).unwrap();
    send(&flow, b"?").unwrap();
    let error = Arena::new(1, 10).receive(&flow, 0, 1).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
    send(&flow, b"?").unwrap();
    assert!(take_error(&flow).is_some());
    assert!(take_error(&flow).is_none());
}

#[test]
fn a_full_receive_buffer_is_counted_by_the_kernel() {
    let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
    SockRef::from(&to).set_recv_buffer_size(4096).unwrap();
    for _ in 0..100 {
        from.send_to(&[0; 1000], to.local_addr().unwrap()).unwrap();
    }
    let drops = kernel_drops(&to).unwrap();
    assert!((90..100).contains(&drops), "{drops}");
    let (first, last) = crate::sys::local_end::local_ports().unwrap();
    assert!(first < last);
}
