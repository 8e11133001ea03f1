//! The listeners of `sys::listen`, held against what the kernel then says.

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream, UdpSocket};

use evenkeel::sys::listen::{self, MulticastInterface, Options, Step};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{getsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use crate::scene::{Made, NOBODY, addr, become_user, elsewhere, ip, tcp};
use crate::support::{Test, eventually, skip};
use crate::tests;

pub fn tests() -> Vec<Test> {
    tests![
        a_tcp_listener_has_both_options_and_never_blocks_or_leaks,
        an_ipv6_wildcard_leaves_the_ipv4_one_free,
        a_udp_socket_has_reuseport_alone_and_tells_destinations,
        another_user_can_neither_join_a_tcp_listener_nor_steal_a_udp_port needs ["root"],
        two_listeners_of_one_user_share_the_connections,
        each_socket_of_a_group_gets_its_copy_and_nothing_of_other_groups,
        the_same_holds_for_groups_of_ipv6,
        a_member_hears_only_the_interface_that_it_joined_on,
        a_link_local_group_takes_its_scope_from_the_interface,
        a_failure_names_the_call_and_the_address,
        buffers_and_tcp_options_are_those_asked_for,
        a_probe_sees_our_own_listeners_and_takes_no_client,
        a_probe_and_a_restart_pass_over_what_a_listener_left,
    ]
}

const LOOPBACK: &str = "127.0.0.1:7000";

fn lo() -> MulticastInterface {
    MulticastInterface::Name("lo".into())
}

fn a_tcp_listener_has_both_options_and_never_blocks_or_leaks() {
    for address in [LOOPBACK, "[::1]:7000"] {
        let socket = Socket::from(listen::tcp(addr(address), &Options::default()).expect("a listener"));
        assert!(socket.reuse_address().expect("an option") && socket.reuse_port().expect("an option"));
        assert!(socket.is_listener().expect("an option"));
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL).expect("flags"));
        assert!(flags.contains(OFlag::O_NONBLOCK));
        let flags = FdFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFD).expect("flags"));
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }
}

fn an_ipv6_wildcard_leaves_the_ipv4_one_free() {
    let six = Socket::from(listen::tcp(addr("[::]:7000"), &Options::default()).expect("a listener"));
    assert!(six.only_v6().expect("an option"));
    // Without any option: only an address that is truly free will do.
    drop(tcp("0.0.0.0:7000", Made::default(), true));
}

fn a_udp_socket_has_reuseport_alone_and_tells_destinations() {
    let socket = Socket::from(listen::udp(addr(LOOPBACK), &Options::default()).expect("a socket"));
    assert!(socket.reuse_port().expect("an option"));
    assert!(!socket.reuse_address().expect("an option"), "any user could take the port");
    // Which address was asked is a question for wildcards alone.
    assert!(!getsockopt(&socket, sockopt::Ipv4PacketInfo).expect("an option"));
    let any = Socket::from(listen::udp(addr("0.0.0.0:7001"), &Options::default()).expect("a socket"));
    assert!(getsockopt(&any, sockopt::Ipv4PacketInfo).expect("an option"));
    let six = Socket::from(listen::udp(addr("[::]:7001"), &Options::default()).expect("a socket"));
    assert!(getsockopt(&six, sockopt::Ipv6RecvPacketInfo).expect("an option"));
}

fn another_user_can_neither_join_a_tcp_listener_nor_steal_a_udp_port() {
    let options = Options::default();
    let _tcp = listen::tcp(addr(LOOPBACK), &options).expect("a listener");
    let _udp = listen::udp(addr(LOOPBACK), &options).expect("a socket");
    let said = elsewhere(|| {
        become_user(NOBODY);
        let bind = |kind, address: &str| {
            let address = addr(address);
            let socket = Socket::new(Domain::IPV4, kind, None).expect("a socket");
            socket.set_reuse_address(true).expect("an option");
            socket.set_reuse_port(true).expect("an option");
            let bound = socket.bind(&address.into());
            bound.map_or_else(|e| format!("{:?} ", e.kind()), |()| "bound ".into())
        };
        [Type::STREAM, Type::DGRAM].map(|kind| bind(kind, LOOPBACK) + &bind(kind, "0.0.0.0:7000")).concat()
    });
    assert_eq!(said, "AddrInUse ".repeat(4));
}

fn two_listeners_of_one_user_share_the_connections() {
    let open = || TcpListener::from(listen::tcp(addr(LOOPBACK), &Options::default()).expect("a listener"));
    let listeners = [open(), open()];
    // All of 64 at one of two by the kernel's hash: 2 in 2^64.
    let _clients: Vec<_> = (0..64).map(|_| TcpStream::connect(LOOPBACK).expect("a connection")).collect();
    let counts = listeners.each_ref().map(|l| std::iter::from_fn(|| l.accept().ok()).count());
    assert_eq!(counts[0] + counts[1], 64);
    assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
}

fn each_socket_of_a_group_gets_its_copy_and_nothing_of_other_groups() {
    copies("239.255.77.1:7000", "239.255.77.2:7000", &lo(), |sender| {
        sender.set_multicast_if_v4(&[127, 0, 0, 1].into())
    });
}

fn the_same_holds_for_groups_of_ipv6() {
    // A loopback delivers no IPv6 groups.
    let made = ip("link add left0 type veth peer name right0")
        && ip("link set left0 up")
        && ip("link set right0 up")
        && ip("-6 address add 2001:db8::1/64 dev left0 nodad");
    if !made {
        skip("no virtual interface can be made here");
    }
    let left = MulticastInterface::Name("left0".into());
    let index = nix::net::if_::if_nametoindex("left0").expect("it was just made");
    copies("[ff05::7701]:7000", "[ff05::7702]:7000", &left, |sender| sender.set_multicast_if_v6(index));
}

fn a_member_hears_only_the_interface_that_it_joined_on() {
    if !ip("link add left0 type veth peer name right0") || !ip("link set left0 up") {
        skip("no virtual interface can be made here");
    }
    let group = "239.255.77.1:7000";
    let join = |interface| listen::multicast(addr(group), &interface, None, &Options::default());
    let here = UdpSocket::from(join(lo()).expect("a member"));
    let there = join(MulticastInterface::Name("left0".into())).expect("a member on the other interface");
    let there = UdpSocket::from(there);
    let sender = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a sender");
    sender.set_multicast_if_v4(&[127, 0, 0, 1].into()).expect("the sender's interface");
    sender.send_to(b"x", &addr(group).into()).expect("sent");
    eventually("the member on lo hears it", || here.recv_from(&mut [0; 1]).is_ok());
    let other = there.recv_from(&mut [0; 1]).expect_err("not for this member");
    assert_eq!(other.kind(), ErrorKind::WouldBlock);
}

/// Two members of one group and one of another on the same port: a datagram
/// to each group, and each member gets its own once.
fn copies(
    group: &str,
    other: &str,
    interface: &MulticastInterface,
    leave_by: impl Fn(&Socket) -> std::io::Result<()>,
) {
    let join = |at| listen::multicast(addr(at), interface, None, &Options::default()).map(UdpSocket::from);
    let members = [join(group).expect("a member"), join(group).expect("a second member")];
    let _other = join(other).expect("a member of the other group");
    let sender = Socket::new(Domain::for_address(addr(group)), Type::DGRAM, None).expect("a sender");
    leave_by(&sender).expect("the sender's interface");
    sender.send_to(b"other", &addr(other).into()).expect("sent");
    sender.send_to(b"ours", &addr(group).into()).expect("sent");
    for member in &members {
        let mut buffer = [0; 16];
        let mut got = 0;
        eventually("a copy", || member.peek_from(&mut [0; 16]).is_ok());
        while let Ok((length, _)) = member.recv_from(&mut buffer) {
            assert_eq!(&buffer[..length], b"ours");
            got += 1;
        }
        assert_eq!(got, 1);
    }
}

fn a_link_local_group_takes_its_scope_from_the_interface() {
    let group = addr("[ff02::7701]:7000");
    listen::multicast(group, &lo(), None, &Options::default()).expect("a member");
    let error =
        listen::multicast(group, &MulticastInterface::Any, None, &Options::default()).expect_err("no scope");
    assert_eq!((error.step, error.source.kind()), (Step::Bind, ErrorKind::InvalidInput));
}

fn a_failure_names_the_call_and_the_address() {
    let options = Options::default();
    let nowhere = listen::tcp(addr("192.0.2.1:7000"), &options).expect_err("not our address");
    assert_eq!(nowhere.step, Step::Bind);
    assert!(nowhere.to_string().starts_with("192.0.2.1:7000: bind: "), "{nowhere}");
    let freebind = Options { freebind: true, ..Options::default() };
    listen::tcp(addr("192.0.2.1:7000"), &freebind).expect("freebind takes it");
    let device = Options { interface: Some("nosuch0".into()), ..Options::default() };
    let device = listen::udp(addr(LOOPBACK), &device).expect_err("no such interface");
    assert_eq!(device.step, Step::Option("SO_BINDTODEVICE"));
    let unicast = listen::multicast(addr(LOOPBACK), &lo(), None, &options).expect_err("not a group");
    assert_eq!(unicast.step, Step::Join);
    let missing = MulticastInterface::Name("nosuch0".into());
    let missing =
        listen::multicast(addr("239.1.1.1:7000"), &missing, None, &options).expect_err("no interface");
    assert_eq!(missing.step, Step::Join);
}

fn buffers_and_tcp_options_are_those_asked_for() {
    let options = Options {
        receive_buffer: Some(65536),
        send_buffer: Some(65536),
        interface: Some("lo".into()),
        fast_open: true,
        defer_accept: true,
        ..Options::default()
    };
    let socket = Socket::from(listen::tcp(addr(LOOPBACK), &options).expect("a listener"));
    // The kernel doubles it, for its own book-keeping.
    assert_eq!(socket.recv_buffer_size().expect("an option"), 131072);
    assert_eq!(socket.send_buffer_size().expect("an option"), 131072);
    assert_eq!(socket.device().expect("an option").as_deref(), Some(&b"lo"[..]));
    // Deferred: a connection without a byte is not handed out.
    let listener = TcpListener::from(std::os::fd::OwnedFd::from(socket));
    let mut client = TcpStream::connect(LOOPBACK).expect("a connection");
    assert_eq!(listener.accept().expect_err("too early").kind(), ErrorKind::WouldBlock);
    std::io::Write::write_all(&mut client, b"x").expect("a byte");
    eventually("the connection comes with its byte", || listener.accept().is_ok());
}

fn a_probe_sees_our_own_listeners_and_takes_no_client() {
    let options = Options::default();
    assert!(listen::probe_tcp(addr(LOOPBACK), &options).is_ok());
    assert!(listen::probe_udp(addr(LOOPBACK), &options).is_ok());
    let listener = TcpListener::from(listen::tcp(addr(LOOPBACK), &options).expect("a listener"));
    let _udp = listen::udp(addr(LOOPBACK), &options).expect("a socket");
    for address in [LOOPBACK, "0.0.0.0:7000"] {
        let taken = |result: std::io::Result<()>| result.is_err_and(|e| e.kind() == ErrorKind::AddrInUse);
        assert!(taken(listen::probe_tcp(addr(address), &options)), "{address}");
        assert!(taken(listen::probe_udp(addr(address), &options)), "{address}");
    }
    for _ in 0..32 {
        let _client = TcpStream::connect(LOOPBACK).expect("a connection");
        let _ = listen::probe_tcp(addr(LOOPBACK), &options);
        listener.accept().expect("every connection is the listener's");
    }
}

fn a_probe_and_a_restart_pass_over_what_a_listener_left() {
    // Of an evenkeel, of an older program with one of the options.
    for (port, address, reuse) in [(7001, true, true), (7002, true, false), (7003, false, true)] {
        let place = format!("127.0.0.1:{port}");
        let made = Made { address, port: reuse, ..Made::default() };
        leave_time_wait(&place, made);
        let _open = leave_connection(&place, made);
        listen::probe_tcp(addr(&place), &Options::default()).expect("nobody listens");
        listen::tcp(addr(&place), &Options::default()).expect("the restarted server binds");
    }
    // Of one with neither: nothing passes over that.
    leave_time_wait("127.0.0.1:7004", Made::default());
    let probe = listen::probe_tcp(addr("127.0.0.1:7004"), &Options::default());
    let open = listen::tcp(addr("127.0.0.1:7004"), &Options::default());
    assert_eq!(probe.expect_err("in use").kind(), ErrorKind::AddrInUse);
    assert_eq!(open.expect_err("in use").source.kind(), ErrorKind::AddrInUse);
}

/// An accepted connection whose listener is gone.
pub fn leave_connection(place: &str, made: Made) -> (Socket, TcpStream) {
    let listener = tcp(place, made, true);
    let client = TcpStream::connect(place).expect("a connection");
    (listener.accept().expect("the connection is there").0, client)
}

/// A connection in TIME_WAIT on the listener's side.
pub fn leave_time_wait(place: &str, made: Made) {
    use evenkeel::sys::holders::{Protocol, State, states};
    let (accepted, mut client) = leave_connection(place, made);
    drop(accepted);
    let read = std::io::Read::read(&mut client, &mut [0; 1]).expect("the end");
    assert_eq!(read, 0);
    drop(client);
    eventually("TIME_WAIT", || states(addr(place), Protocol::Tcp) == [State::TimeWait]);
}
