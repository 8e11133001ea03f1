//! The words for each way in which a bind can fail without anybody being
//! there: permissions, addresses, interfaces, policies.

use std::fs;

use evenkeel::explain::{self, BindFailure};
use evenkeel::sys::holders::{self, Protocol};
use evenkeel::sys::listen::{self, MulticastInterface, OpenError, Options, Step};

use crate::matrix::{deny, deny_family};
use crate::scene::{NOBODY, addr, doctor, elsewhere, ip, lose_rights, opened, told};
use crate::support::{Test, skip};
use crate::tests;

pub fn tests() -> Vec<Test> {
    tests![
        a_low_port_names_the_capability_the_sysctl_and_the_unit_line,
        an_address_of_no_interface_offers_freebind,
        an_address_of_an_interface_that_is_down_names_it,
        an_ipv6_address_under_the_search_for_duplicates_says_so,
        ipv6_switched_off_is_told_with_the_line_that_switches_it_on,
        a_link_local_address_without_its_interface_is_told_how_to_be_written,
        an_interface_that_is_not_there_and_a_group_without_a_route_are_told,
        transparent_without_the_capability_is_a_missing_permission,
        a_policy_that_refuses_the_bind_is_not_taken_for_a_low_port,
        a_family_that_is_not_there_is_passed_over_for_a_bare_port_and_told_else,
        a_process_without_a_descriptor_left_can_still_say_so,
        every_errno_gives_one_line_a_way_out_and_an_exit_code,
    ]
}

const HERE: &str = "127.0.0.1:7000";

fn a_low_port_names_the_capability_the_sysctl_and_the_unit_line() {
    let low = |port: u16| {
        let outcome = doctor(&format!("127.0.0.1:{port}"));
        format!("{} {}", outcome.exit_code, outcome.text)
    };
    let expected = |start: u16, uid: u32, port: u16| {
        format!(
            "77 127.0.0.1:{port}/tcp: ports below {start} need CAP_NET_BIND_SERVICE, which uid {uid} lacks here\n  \
             AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit, or \
             sysctl -w net.ipv4.ip_unprivileged_port_start={port}, or a port from {start} on\n"
        )
    };
    let ask = |port| {
        elsewhere(|| {
            lose_rights(NOBODY);
            low(port)
        })
    };
    assert_eq!(ask(80), expected(1024, NOBODY, 80));
    // The limit is read and not assumed.
    fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "8000").expect("our own network's limit");
    assert_eq!(ask(7999), expected(8000, NOBODY, 7999));
    assert!(ask(8000).starts_with("0 "));
    fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "80").expect("our own network's limit");
    assert!(ask(80).starts_with("0 "));
}

fn an_address_of_no_interface_offers_freebind() {
    let told = opened("192.0.2.1:7000", &Options::default());
    assert_eq!(told.text, "192.0.2.1:7000/tcp: no interface of this host has the address 192.0.2.1");
    assert!(told.advice.contains("freebind = true") && told.advice.contains("ip address add 192.0.2.1"));
    assert_eq!(told.exit_code, 69);
}

fn an_address_of_an_interface_that_is_down_names_it() {
    if !ip("link add left0 type veth peer name right0") || !ip("address add 198.51.100.1/24 dev left0") {
        skip("no virtual interface can be made here");
    }
    let down = listen::tcp(addr("198.51.100.1:7000"), &Options::default());
    if down.is_ok() {
        // Linux keeps an IPv4 address local whatever its interface does.
        assert!(ip("-6 address add 2001:db8::1/64 dev left0"));
        let told = opened("[2001:db8::1]:7000", &Options::default());
        assert_eq!(told.text, "[2001:db8::1]:7000/tcp: 2001:db8::1 is on interface left0, which is down");
        assert!(told.advice.starts_with("ip link set left0 up"), "{}", told.advice);
        assert_eq!(told.exit_code, 69);
        return;
    }
    let told = opened("198.51.100.1:7000", &Options::default());
    assert!(told.text.ends_with("198.51.100.1 is on interface left0, which is down"), "{}", told.text);
    assert!(told.advice.starts_with("ip link set left0 up"), "{}", told.advice);
}

fn an_ipv6_address_under_the_search_for_duplicates_says_so() {
    if !ip("link add left0 type veth peer name right0")
        || !ip("link set left0 up")
        || !ip("link set right0 up")
    {
        skip("no virtual interface can be made here");
    }
    // Many probes a second apart: the search outlasts this test.
    let conf = "/proc/sys/net/ipv6/conf/left0/dad_transmits";
    if fs::write(conf, "100").is_err() || !ip("-6 address add 2001:db8::1/64 dev left0") {
        skip("IPv6 cannot be set up here");
    }
    let told = opened("[2001:db8::1]:7000", &Options::default());
    assert_eq!(
        told.text,
        "[2001:db8::1]:7000/tcp: 2001:db8::1 on left0 is not usable yet: the search for a duplicate runs"
    );
    assert!(told.advice.contains("freebind = true"), "{}", told.advice);
    let freebind = Options { freebind: true, ..Options::default() };
    listen::tcp(addr("[2001:db8::1]:7000"), &freebind).expect("as the advice says");
}

fn ipv6_switched_off_is_told_with_the_line_that_switches_it_on() {
    if fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").is_err() {
        skip("IPv6 cannot be switched off here");
    }
    let told = opened("[::1]:7000", &Options::default());
    assert_eq!(told.text, "[::1]:7000/tcp: IPv6 is switched off on this host");
    assert!(told.advice.contains("net.ipv6.conf.all.disable_ipv6=0"), "{}", told.advice);
    assert_eq!(told.exit_code, 69);
}

fn a_link_local_address_without_its_interface_is_told_how_to_be_written() {
    let told = opened("[fe80::1]:7000", &Options::default());
    assert_eq!(told.text, "[fe80::1]:7000/tcp: a link-local address is not whole without its interface");
    assert!(told.advice.contains("[fe80::1%2]:7000"), "{}", told.advice);
    assert_eq!(told.exit_code, 69);
}

fn an_interface_that_is_not_there_and_a_group_without_a_route_are_told() {
    let options = Options { interface: Some("nosuch0".into()), ..Options::default() };
    let device = opened(HERE, &options);
    assert_eq!(device.text, "127.0.0.1:7000/tcp: there is no interface nosuch0 in this network namespace");
    assert_eq!(device.exit_code, 69);
    let group = addr("239.255.77.1:7000");
    let error = listen::multicast(group, &MulticastInterface::Any, None, &Options::default());
    let Err(error) = error else {
        skip("this network has a route to groups");
    };
    let told = told(&error, Protocol::Udp, &Options::default());
    assert_eq!(told.text, "239.255.77.1:7000/udp: no interface to join the group on");
    assert!(told.advice.starts_with("set multicast_interface"), "{}", told.advice);
}

fn transparent_without_the_capability_is_a_missing_permission() {
    let said = elsewhere(|| {
        lose_rights(NOBODY);
        let told = opened(HERE, &Options { transparent: true, ..Options::default() });
        format!("{} {} | {}", told.exit_code, told.text, told.advice)
    });
    assert!(
        said.starts_with(
            "77 127.0.0.1:7000/tcp: IP_TRANSPARENT: transparent needs CAP_NET_ADMIN or CAP_NET_RAW"
        ),
        "{said}"
    );
    assert!(said.contains("AmbientCapabilities=CAP_NET_ADMIN"), "{said}");
}

fn a_policy_that_refuses_the_bind_is_not_taken_for_a_low_port() {
    let refused = |errno| {
        elsewhere(|| {
            deny(libc::SYS_bind, None, errno);
            let outcome = doctor(HERE);
            format!("{} {}", outcome.exit_code, outcome.text)
        })
    };
    let policy = refused(libc::EACCES);
    assert!(
        policy.starts_with("77 127.0.0.1:7000/tcp: bind: permission denied, and not for a low port\n"),
        "{policy}"
    );
    assert!(policy.contains("SELinux, AppArmor, landlock"), "{policy}");
    let filter = refused(libc::EPERM);
    assert!(filter.starts_with("77 127.0.0.1:7000/tcp: bind: operation not permitted\n"), "{filter}");
    assert!(filter.contains("SocketBindDeny=") && filter.contains("SystemCallFilter="), "{filter}");
}

fn a_family_that_is_not_there_is_passed_over_for_a_bare_port_and_told_else() {
    let said = elsewhere(|| {
        deny_family(libc::AF_INET6, libc::EAFNOSUPPORT);
        doctor("[::1]:7000").text + &doctor(":7000").text
    });
    assert!(said.starts_with("[::1]:7000/tcp: IPv6 is not there on this host\n"), "{said}");
    assert!(said.contains("RestrictAddressFamilies="), "{said}");
    assert!(said.ends_with("0.0.0.0:7000/tcp can be bound\n"), "{said}");
}

fn a_process_without_a_descriptor_left_can_still_say_so() {
    let said = elsewhere(|| {
        use nix::sys::resource::{Resource, setrlimit};
        setrlimit(Resource::RLIMIT_NOFILE, 1, 1).expect("a limit can be lowered");
        let told = opened(HERE, &Options::default());
        format!("{} {} | {}", told.exit_code, told.text, told.advice)
    });
    assert_eq!(
        said,
        "69 127.0.0.1:7000/tcp: this process has no file descriptor left | raise LimitNOFILE= in the unit (or \
             ulimit -n)"
    );
}

fn every_errno_gives_one_line_a_way_out_and_an_exit_code() {
    for errno in 1..=133 {
        for step in [Step::Socket, Step::Option("SO_REUSEPORT"), Step::Bind, Step::Listen, Step::Join] {
            for address in [HERE, "[::1]:80", "[fe80::1]:80", "239.1.1.1:80"] {
                let source = std::io::Error::from_raw_os_error(errno);
                let error = OpenError { step, address: addr(address), source };
                let failure =
                    BindFailure::new(&error, Protocol::Tcp, &Options::default(), holders::Facts::default());
                let told = explain::bind_failure(&failure);
                assert!(told.text.starts_with(&format!("{address}/tcp")), "{errno}: {told:?}");
                assert!(!told.advice.is_empty() && !told.text.ends_with('.'), "{errno}: {told:?}");
                assert!(!told.text.contains('\n') && !told.advice.contains('\n'), "{errno}: {told:?}");
                let permission = matches!(errno, libc::EACCES | libc::EPERM);
                assert_eq!(told.exit_code, if permission { 77 } else { 69 }, "{errno}");
            }
        }
    }
}
