//! Who holds an address, seen from everywhere, and the words for each way in
//! which a bind can fail.

use std::fs;
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use evenkeel::explain::{self, BindFailure, Explanation};
use evenkeel::sys::holders::{self, Protocol, State, find};
use evenkeel::sys::isolated::in_child;
use evenkeel::sys::listen::{self, MulticastInterface, OpenError, Options, Step};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::listen::{leave_connection, leave_time_wait};
use crate::matrix::{deny, deny_family};
use crate::support::{
    Holder, LIMIT, Made, NOBODY, SOMEBODY, addr, ask, become_user, doctor, elsewhere, ip, isolated, json,
    lacks_other_users, other_users, skipped, tcp, udp,
};

const HERE: &str = "127.0.0.1:7000";
const ALONE: Made = Made { address: false, port: false, owner: None, dual: false };
const SHARED: Made = Made { address: true, port: true, owner: None, dual: false };

/// As the supervisor does it: open, and on failure gather and explain.
fn opened(address: &str, options: &Options) -> Explanation {
    let error = listen::tcp(addr(address), options).expect_err("this bind fails");
    told(&error, Protocol::Tcp, options)
}

fn told(error: &OpenError, mode: Protocol, options: &Options) -> Explanation {
    let facts = holders::gather(error.address, mode, options);
    explain::bind_failure(&BindFailure::new(error, mode, options, facts))
}

#[test]
fn a_listener_without_reuseport_is_named() {
    isolated(|| {
        let holder = Holder::of(tcp(HERE, ALONE, true));
        let pid = holder.pid();
        let told = opened(HERE, &Options::default());
        let us = nix::unistd::geteuid();
        assert_eq!(
            told.text,
            format!("127.0.0.1:7000/tcp is held by pid {pid} (sleep 600), uid {us}, without SO_REUSEPORT")
        );
        assert_eq!(told.advice, format!("stop pid {pid}, or choose another port"));
        assert_eq!(told.exit_code, 69);
        // And gone with its holder.
        drop(holder);
        assert_eq!(doctor(HERE).exit_code, 0);
        assert_eq!(doctor(HERE).text, "127.0.0.1:7000/tcp can be bound\n");
    });
}

#[test]
fn the_json_has_what_was_promised() {
    isolated(|| {
        let holder = Holder::of(tcp(HERE, Made { address: true, ..ALONE }, true));
        let outcome = ask(HERE, Protocol::Tcp, true);
        let told = json(&outcome.text);
        assert_eq!(outcome.exit_code, 69);
        assert_eq!((&told["address"], &told["bind"]), (&HERE.into(), &"EADDRINUSE".into()));
        let one = &told["holders"][0];
        assert_eq!((&one["pid"], &one["command"]), (&holder.pid().into(), &"sleep 600".into()));
        assert_eq!(
            (&one["state"], &one["uid"]),
            (&"listening".into(), &nix::unistd::geteuid().as_raw().into())
        );
        assert_eq!(one["options"], serde_json::json!(["SO_REUSEADDR"]));
        assert!(one.get("unit").is_some() && told["advice"].as_str().is_some_and(|a| a.contains("stop pid")));
        let free = json(&ask("127.0.0.1:7001", Protocol::Tcp, true).text);
        assert_eq!((&free["bind"], &free["advice"]), (&"ok".into(), &"".into()));
    });
}

#[test]
fn a_group_of_our_own_user_is_counted_and_the_way_to_share_is_told() {
    isolated(|| {
        let first = Holder::of(tcp(HERE, SHARED, true));
        let _second = Holder::of(tcp(HERE, SHARED, true));
        // The kernel would let us in, and half of the clients with us.
        drop(listen::tcp(addr(HERE), &Options::default()).expect("the group takes us"));
        let told = doctor(HERE);
        assert_eq!(told.exit_code, 69);
        let named = format!("is held by 2 sockets of pid {} (sleep 600) and 1 more, uid ", first.pid());
        assert!(told.text.contains(&named), "{}", told.text);
        assert!(told.text.contains(", with SO_REUSEPORT\n"), "{}", told.text);
        assert!(told.text.contains("set share_ports = true in [daemon]"), "{}", told.text);
    });
}

#[test]
fn a_group_of_another_user_is_told_by_its_user() {
    isolated(|| {
        if lacks_other_users() {
            return;
        }
        let holder = Holder::of(tcp(HERE, Made { owner: Some(SOMEBODY), ..SHARED }, true));
        let told = opened(HERE, &Options::default());
        assert_eq!(
            told.text,
            format!(
                "127.0.0.1:7000/tcp is held by pid {} (sleep 600), uid 65533, with SO_REUSEPORT, but we are uid 0: all \
                 must share one uid",
                holder.pid()
            )
        );
        assert!(told.advice.contains("start both programs as uid 65533 or as uid 0"), "{}", told.advice);
        assert_eq!(told.exit_code, 69);
    });
}

#[test]
fn a_process_of_another_user_is_hidden_and_its_socket_is_not() {
    isolated(|| {
        if lacks_other_users() {
            return;
        }
        let _holder = Holder::of(tcp(HERE, ALONE, true));
        let said = elsewhere(|| {
            become_user(NOBODY);
            let outcome = doctor(HERE);
            format!("{} {}", outcome.exit_code, outcome.text)
        });
        assert!(
            said.starts_with("69 127.0.0.1:7000/tcp is held by uid 0, process not visible from here\n"),
            "{said}"
        );
        assert!(said.contains("another user's, or in another container"), "{said}");
        assert!(said.contains("evenkeel doctor 127.0.0.1:7000"), "{said}");
    });
}

#[test]
fn behind_hidepid_even_the_process_is_gone_and_the_user_still_told() {
    isolated(|| {
        if lacks_other_users() {
            return;
        }
        let mut command = Command::new("sleep");
        command.uid(SOMEBODY).gid(SOMEBODY);
        let holder = Holder::start(tcp(HERE, Made { owner: Some(SOMEBODY), ..ALONE }, true), command);
        let said = elsewhere(|| {
            own_mounts();
            let options = Some("hidepid=2");
            if mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), options).is_err() {
                return "skipped".into();
            }
            become_user(NOBODY);
            let seen = fs::exists(format!("/proc/{}", holder.pid())).unwrap_or(false);
            format!("{seen} {}", doctor(HERE).text)
        });
        if said == "skipped" {
            return skipped("proc cannot be mounted here");
        }
        let expected = "false 127.0.0.1:7000/tcp is held by uid 65533, process not visible from here\n";
        assert!(said.starts_with(expected), "{said}");
    });
}

#[test]
fn a_holder_outside_our_pid_namespace_is_not_visible_and_one_inside_another_is() {
    isolated(|| {
        let outside = Holder::of(tcp(HERE, ALONE, true));
        let said = elsewhere(|| {
            if unshare(CloneFlags::CLONE_NEWPID).is_err() {
                return "skipped".into();
            }
            // The child of this one is the first process of the namespace.
            elsewhere(|| {
                own_mounts();
                match mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None::<&str>) {
                    Ok(()) => doctor(HERE).text,
                    Err(_) => "skipped".into(),
                }
            })
        });
        if said == "skipped" {
            return skipped("no pid namespace, or proc cannot be mounted");
        }
        assert!(said.contains("process not visible from here\n"), "{said}");
        // From above, the processes of a namespace below have numbers.
        drop(outside);
        let socket = tcp("127.0.0.1:7001", ALONE, true);
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "sleep"]);
        let below = Below::start(socket, command);
        crate::support::eventually("the inner sleep is named", || {
            opened("127.0.0.1:7001", &Options::default()).text.contains("sleep 600")
        });
        drop(below);
    });
}

/// A holder that is not itself the sleep.
struct Below(std::process::Child);

impl Below {
    fn start(socket: socket2::Socket, mut command: Command) -> Below {
        let input = std::process::Stdio::from(std::os::fd::OwnedFd::from(socket));
        Below(command.arg("600").stdin(input).spawn().expect("unshare can be started"))
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn another_network_is_no_conflict_and_a_holder_that_moved_there_still_is_one() {
    isolated(|| {
        // Same address, other network: nothing to see.
        let elsewhere_network = in_child(LIMIT, || {
            let _socket = tcp(HERE, ALONE, true);
            unshare(CloneFlags::CLONE_NEWNET).expect("a network below ours");
            // What is bound stays in the old network; the look is in the new.
            vec![doctor(HERE).exit_code, find(addr(HERE), Protocol::Tcp, None).len() as u8]
        });
        let seen = elsewhere_network.expect("the child answers");
        // Down is its loopback, so only the absence of holders is claimed.
        assert_eq!(seen[1], 0);
        // Our socket in the hands of a process of another network.
        let mut command = Command::new("sleep");
        // SAFETY: one system call between fork and exec.
        unsafe { command.pre_exec(|| Ok(unshare(CloneFlags::CLONE_NEWNET)?)) };
        let holder = Holder::start(tcp(HERE, ALONE, true), command);
        let told = opened(HERE, &Options::default());
        assert!(told.text.contains(&format!("pid {} (sleep 600)", holder.pid())), "{}", told.text);
    });
}

#[test]
fn a_socket_that_is_bound_and_does_not_listen_is_found() {
    isolated(|| {
        let holder = Holder::of(tcp(HERE, ALONE, false));
        let told = opened(HERE, &Options::default());
        if kernel() < (6, 8) {
            assert!(told.text.ends_with("is in use, but no socket there is visible from here"));
            return skipped("before Linux 6.8 no table has such sockets");
        }
        let named = format!("pid {} (sleep 600)", holder.pid());
        assert!(told.text.contains(&named), "{}", told.text);
        assert!(told.text.ends_with("without SO_REUSEPORT, bound but not listening"), "{}", told.text);
    });
}

#[test]
fn an_overlapping_address_counts_and_is_named() {
    isolated(|| {
        let _wild = Holder::of(tcp("0.0.0.0:7000", ALONE, true));
        let told = opened(HERE, &Options::default());
        assert!(told.text.contains("is held by the overlapping 0.0.0.0:7000: pid "), "{}", told.text);
        let _specific = Holder::of(tcp("127.0.0.1:7001", ALONE, true));
        let told = opened("0.0.0.0:7001", &Options::default());
        assert!(told.text.contains("the overlapping 127.0.0.1:7001: pid "), "{}", told.text);
        let _dual = Holder::of(tcp("[::]:7002", Made { dual: true, ..ALONE }, true));
        let told = opened("127.0.0.1:7002", &Options::default());
        assert!(told.text.contains("the overlapping [::]:7002: pid "), "{}", told.text);
        // An IPv6-only one is no conflict, and is not shown as one.
        let _only = Holder::of(tcp("[::]:7003", ALONE, true));
        assert_eq!(doctor("127.0.0.1:7003").text, "127.0.0.1:7003/tcp can be bound\n");
        // A bare port asks for both families.
        let both = doctor("7003");
        assert_eq!(both.exit_code, 69);
        assert!(both.text.contains("0.0.0.0:7003/tcp can be bound"), "{}", both.text);
        assert!(both.text.contains("[::]:7003/tcp is held by pid "), "{}", both.text);
    });
}

#[test]
fn what_lingers_is_told_apart_from_what_lives() {
    isolated(|| {
        leave_time_wait(HERE, ALONE);
        let told = opened(HERE, &Options::default());
        assert_eq!(told.text, "127.0.0.1:7000/tcp is held by a connection in TIME_WAIT");
        assert!(told.advice.contains("gone in a minute"), "{}", told.advice);
        assert_eq!((told.exit_code, doctor(HERE).exit_code), (69, 69));
        // In the way of nothing when it was left by a listener like ours.
        leave_time_wait("127.0.0.1:7001", SHARED);
        let free = doctor("127.0.0.1:7001");
        assert_eq!(
            (free.exit_code, free.text.as_str()),
            (0, "127.0.0.1:7001/tcp can be bound\n  not in the way: a connection in TIME_WAIT\n")
        );
        let _open = leave_connection("127.0.0.1:7002", ALONE);
        let told = opened("127.0.0.1:7002", &Options::default());
        let us = format!("is held by a connection of pid {} (", std::process::id());
        assert!(told.text.contains(&us), "{}", told.text);
    });
}

#[test]
fn a_port_that_an_outgoing_connection_borrowed_is_told_as_such() {
    isolated(|| {
        let server = tcp(HERE, ALONE, true);
        let client = TcpStream::connect(HERE).expect("a connection");
        let borrowed = client.local_addr().expect("its port");
        let (_accepted, _) = server.accept().expect("the other end");
        let told = opened(&borrowed.to_string(), &Options::default());
        assert!(told.text.contains("is held by a connection of pid "), "{}", told.text);
        let line = format!("net.ipv4.ip_local_reserved_ports={}", borrowed.port());
        assert!(told.advice.contains(&line), "{}", told.advice);
        assert_eq!(told.exit_code, 69);
    });
}

#[test]
fn udp_holders_are_named_and_asked_for_by_a_flag() {
    isolated(|| {
        let holder = Holder::of(udp(HERE, Made { address: true, ..ALONE }));
        let error = listen::udp(addr(HERE), &Options::default()).expect_err("in use");
        let told = told(&error, Protocol::Udp, &Options::default());
        let named = format!("127.0.0.1:7000/udp is held by pid {} (sleep 600)", holder.pid());
        assert!(told.text.starts_with(&named), "{}", told.text);
        assert_eq!(ask(HERE, Protocol::Udp, false).exit_code, 69);
        assert_eq!(doctor(HERE).exit_code, 0, "TCP is another port space");
        // A group is open to all who set the options, and so not in the way.
        if !ip("route add 224.0.0.0/4 dev lo") {
            return skipped("the half of groups needs the ip command and the right to add a route");
        }
        let group = "239.255.77.1:7000";
        let _member = Holder::of(udp(group, SHARED));
        assert_eq!(ask(group, Protocol::Udp, false).exit_code, 0);
        let _single = Holder::of(udp("239.255.77.2:7000", ALONE));
        let refused = ask("239.255.77.2:7000", Protocol::Udp, false);
        assert!(refused.text.contains("without SO_REUSEPORT"), "{}", refused.text);
    });
}

#[test]
fn a_unit_is_named_and_the_line_that_stops_it() {
    isolated(|| {
        if !other_users() {
            return skipped("needs root to make a control group");
        }
        let Some(group) = control_group("evenkeel-test-holder.service") else {
            return skipped("no control group can be made here");
        };
        let holder = Holder::of(tcp(HERE, ALONE, true));
        fs::write(group.join("cgroup.procs"), holder.pid().to_string()).expect("the holder is moved");
        let told = opened(HERE, &Options::default());
        let one = json(&ask(HERE, Protocol::Tcp, true).text)["holders"][0]["unit"].clone();
        drop(holder);
        fs::remove_dir(&group).expect("an empty group goes");
        assert!(told.text.contains("(sleep 600) of evenkeel-test-holder.service, uid 0"), "{}", told.text);
        assert_eq!(told.advice, "systemctl stop evenkeel-test-holder.service, or choose another port");
        assert_eq!(one, "evenkeel-test-holder.service");
    });
}

/// A group of the hierarchy that systemd uses, wherever it is mounted.
fn control_group(name: &str) -> Option<std::path::PathBuf> {
    let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup"];
    let root = roots.iter().find(|root| fs::exists(format!("{root}/cgroup.procs")).unwrap_or(false))?;
    let group = std::path::Path::new(root).join(name);
    fs::create_dir(&group).ok().map(|()| group)
}

#[test]
fn without_netlink_the_tables_of_proc_tell_the_same() {
    isolated(|| {
        let holder = Holder::of(tcp(HERE, ALONE, true));
        let usual = opened(HERE, &Options::default()).text;
        let said = elsewhere(|| {
            deny_family(libc::AF_NETLINK, libc::EPERM);
            opened(HERE, &Options::default()).text
        });
        assert_eq!(said, usual);
        assert!(said.contains(&holder.pid().to_string()));
        let states: Vec<State> =
            find(addr(HERE), Protocol::Tcp, None).into_iter().map(|holder| holder.state).collect();
        assert_eq!(states, [State::Listening]);
    });
}

#[test]
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
    if !nix::unistd::geteuid().is_root() {
        let us = nix::unistd::geteuid().as_raw();
        return assert_eq!(low(1), expected(1024, us, 1));
    }
    isolated(|| {
        if lacks_other_users() {
            return;
        }
        let ask = |port| {
            elsewhere(|| {
                become_user(NOBODY);
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
    });
}

#[test]
fn an_address_of_no_interface_offers_freebind() {
    isolated(|| {
        let told = opened("192.0.2.1:7000", &Options::default());
        assert_eq!(told.text, "192.0.2.1:7000/tcp: no interface of this host has the address 192.0.2.1");
        assert!(told.advice.contains("freebind = true") && told.advice.contains("ip address add 192.0.2.1"));
        assert_eq!(told.exit_code, 69);
    });
}

#[test]
fn an_address_of_an_interface_that_is_down_names_it() {
    isolated(|| {
        if !ip("link add left0 type veth peer name right0") || !ip("address add 198.51.100.1/24 dev left0") {
            return skipped("no virtual interface can be made here");
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
    });
}

#[test]
fn an_ipv6_address_under_the_search_for_duplicates_says_so() {
    isolated(|| {
        if !ip("link add left0 type veth peer name right0")
            || !ip("link set left0 up")
            || !ip("link set right0 up")
        {
            return skipped("no virtual interface can be made here");
        }
        // Many probes a second apart: the search outlasts this test.
        let conf = "/proc/sys/net/ipv6/conf/left0/dad_transmits";
        if fs::write(conf, "100").is_err() || !ip("-6 address add 2001:db8::1/64 dev left0") {
            return skipped("IPv6 cannot be set up here");
        }
        let told = opened("[2001:db8::1]:7000", &Options::default());
        assert_eq!(
            told.text,
            "[2001:db8::1]:7000/tcp: 2001:db8::1 on left0 is not usable yet: the search for a duplicate runs"
        );
        assert!(told.advice.contains("freebind = true"), "{}", told.advice);
        let freebind = Options { freebind: true, ..Options::default() };
        listen::tcp(addr("[2001:db8::1]:7000"), &freebind).expect("as the advice says");
    });
}

#[test]
fn ipv6_switched_off_is_told_with_the_line_that_switches_it_on() {
    isolated(|| {
        if fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").is_err() {
            return skipped("IPv6 cannot be switched off here");
        }
        let told = opened("[::1]:7000", &Options::default());
        assert_eq!(told.text, "[::1]:7000/tcp: IPv6 is switched off on this host");
        assert!(told.advice.contains("net.ipv6.conf.all.disable_ipv6=0"), "{}", told.advice);
        assert_eq!(told.exit_code, 69);
    });
}

#[test]
fn a_link_local_address_without_its_interface_is_told_how_to_be_written() {
    isolated(|| {
        let told = opened("[fe80::1]:7000", &Options::default());
        assert_eq!(told.text, "[fe80::1]:7000/tcp: a link-local address is not whole without its interface");
        assert!(told.advice.contains("[fe80::1%eth0]:7000"), "{}", told.advice);
        assert_eq!(told.exit_code, 69);
    });
}

#[test]
fn an_interface_that_is_not_there_and_a_group_without_a_route_are_told() {
    isolated(|| {
        let options = Options { interface: Some("nosuch0".into()), ..Options::default() };
        let device = opened(HERE, &options);
        assert_eq!(
            device.text,
            "127.0.0.1:7000/tcp: there is no interface nosuch0 in this network namespace"
        );
        assert_eq!(device.exit_code, 69);
        let group = addr("239.255.77.1:7000");
        let error = listen::multicast(group, &MulticastInterface::Any, &Options::default());
        let Err(error) = error else {
            return skipped("this network has a route to groups");
        };
        let told = told(&error, Protocol::Udp, &Options::default());
        assert_eq!(told.text, "239.255.77.1:7000/udp: no interface to join the group on");
        assert!(told.advice.starts_with("set multicast_interface"), "{}", told.advice);
    });
}

#[test]
fn transparent_without_the_capability_is_a_missing_permission() {
    isolated(|| {
        if lacks_other_users() {
            return;
        }
        let said = elsewhere(|| {
            become_user(NOBODY);
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
    });
}

#[test]
fn a_policy_that_refuses_the_bind_is_not_taken_for_a_low_port() {
    isolated(|| {
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
    });
}

#[test]
fn a_family_that_is_not_there_is_passed_over_for_a_bare_port_and_told_else() {
    isolated(|| {
        let said = elsewhere(|| {
            deny_family(libc::AF_INET6, libc::EAFNOSUPPORT);
            doctor("[::1]:7000").text + &doctor(":7000").text
        });
        assert!(said.starts_with("[::1]:7000/tcp: IPv6 is not there on this host\n"), "{said}");
        assert!(said.contains("RestrictAddressFamilies="), "{said}");
        assert!(said.ends_with("0.0.0.0:7000/tcp can be bound\n"), "{said}");
    });
}

#[test]
fn a_process_without_a_descriptor_left_can_still_say_so() {
    isolated(|| {
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
    });
}

#[test]
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

/// Mounts of this process's own, which end with it.
fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).expect("mounts of our own");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .expect("what is mounted here stays here");
}

/// Major and minor number.
fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel tells its release");
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().expect("a number"));
    (numbers.next().expect("a major number"), numbers.next().expect("a minor number"))
}
