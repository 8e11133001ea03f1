//! Who holds an address, seen from everywhere.

use std::fs;
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use evenkeel::sys::holders::{Process, Protocol, State, find};
use evenkeel::sys::isolated::in_child;
use evenkeel::sys::listen::{self, Options};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::listen::{leave_connection, leave_time_wait};
use crate::matrix::deny_family;
use crate::scene::{
    Holder, LIMIT, Made, NOBODY, SOMEBODY, addr, ask, become_user, doctor, elsewhere, ip, json, opened, tcp,
    told, udp,
};
use crate::support::{Test, eventually, skip};
use crate::tests;

pub fn tests() -> Vec<Test> {
    tests![
        a_listener_without_reuseport_is_named,
        the_json_has_what_was_promised,
        a_group_of_our_own_user_is_counted_and_the_way_to_share_is_told,
        a_group_of_another_user_is_told_by_its_user needs ["root"],
        a_process_of_another_user_is_hidden_and_its_socket_is_not needs ["root"],
        behind_hidepid_even_the_process_is_gone_and_the_user_still_told needs ["root"],
        a_holder_outside_our_pid_namespace_is_not_visible_and_one_inside_another_is,
        another_network_is_no_conflict_and_a_holder_that_moved_there_still_is_one,
        a_socket_that_is_bound_and_does_not_listen_is_found,
        an_overlapping_address_counts_and_is_named,
        what_lingers_is_told_apart_from_what_lives,
        a_port_that_an_outgoing_connection_borrowed_is_told_as_such,
        udp_holders_are_named_and_asked_for_by_a_flag,
        a_unit_is_named_and_the_line_that_stops_it needs ["root"],
        without_netlink_the_tables_of_proc_tell_the_same,
    ]
}

const HERE: &str = "127.0.0.1:7000";
const ALONE: Made = Made { address: false, port: false, owner: None, dual: false };
const SHARED: Made = Made { address: true, port: true, owner: None, dual: false };

fn a_listener_without_reuseport_is_named() {
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
}

fn the_json_has_what_was_promised() {
    let holder = Holder::of(tcp(HERE, Made { address: true, ..ALONE }, true));
    let outcome = ask(HERE, Protocol::Tcp, true);
    let told = json(&outcome.text);
    assert_eq!(outcome.exit_code, 69);
    assert_eq!((&told["address"], &told["bind"]), (&HERE.into(), &"EADDRINUSE".into()));
    let one = &told["holders"][0];
    assert_eq!((&one["pid"], &one["command"]), (&holder.pid().into(), &"sleep 600".into()));
    assert_eq!((&one["state"], &one["uid"]), (&"listening".into(), &nix::unistd::geteuid().as_raw().into()));
    assert_eq!(one["options"], serde_json::json!(["SO_REUSEADDR"]));
    assert!(one.get("unit").is_some() && told["advice"].as_str().is_some_and(|a| a.contains("stop pid")));
    let free = json(&ask("127.0.0.1:7001", Protocol::Tcp, true).text);
    assert_eq!((&free["bind"], &free["advice"]), (&"ok".into(), &"".into()));
}

fn a_group_of_our_own_user_is_counted_and_the_way_to_share_is_told() {
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
}

fn a_group_of_another_user_is_told_by_its_user() {
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
}

fn a_process_of_another_user_is_hidden_and_its_socket_is_not() {
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
}

fn behind_hidepid_even_the_process_is_gone_and_the_user_still_told() {
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
        skip("proc cannot be mounted here");
    }
    let expected = "false 127.0.0.1:7000/tcp is held by uid 65533, process not visible from here\n";
    assert!(said.starts_with(expected), "{said}");
}

fn a_holder_outside_our_pid_namespace_is_not_visible_and_one_inside_another_is() {
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
        skip("no pid namespace, or proc cannot be mounted");
    }
    assert!(said.contains("process not visible from here\n"), "{said}");
    // From above, the processes of a namespace below have numbers.
    drop(outside);
    let socket = tcp("127.0.0.1:7001", ALONE, true);
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "sleep"]);
    let _below = Holder::spawn(socket, command);
    let inner = |process: &Process| process.command == "sleep 600";
    eventually("the inner process is named too", || {
        let holders = find(addr("127.0.0.1:7001"), Protocol::Tcp, None);
        holders.iter().any(|holder| holder.processes.len() == 2 && holder.processes.iter().any(inner))
    });
}

fn another_network_is_no_conflict_and_a_holder_that_moved_there_still_is_one() {
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
}

fn a_socket_that_is_bound_and_does_not_listen_is_found() {
    let holder = Holder::of(tcp(HERE, ALONE, false));
    let told = opened(HERE, &Options::default());
    if kernel() < (6, 8) {
        assert!(told.text.ends_with("is in use, but no socket there is visible from here"));
        skip("before Linux 6.8 no table has such sockets");
    }
    let named = format!("pid {} (sleep 600)", holder.pid());
    assert!(told.text.contains(&named), "{}", told.text);
    assert!(told.text.ends_with("without SO_REUSEPORT, bound but not listening"), "{}", told.text);
}

fn an_overlapping_address_counts_and_is_named() {
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
}

fn what_lingers_is_told_apart_from_what_lives() {
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
}

fn a_port_that_an_outgoing_connection_borrowed_is_told_as_such() {
    let server = tcp(HERE, ALONE, true);
    let client = TcpStream::connect(HERE).expect("a connection");
    let borrowed = client.local_addr().expect("its port");
    let (_accepted, _) = server.accept().expect("the other end");
    let told = opened(&borrowed.to_string(), &Options::default());
    assert!(told.text.contains("is held by a connection of pid "), "{}", told.text);
    let line = format!("net.ipv4.ip_local_reserved_ports={}", borrowed.port());
    assert!(told.advice.contains(&line), "{}", told.advice);
    assert_eq!(told.exit_code, 69);
}

fn udp_holders_are_named_and_asked_for_by_a_flag() {
    let holder = Holder::of(udp(HERE, Made { address: true, ..ALONE }));
    let error = listen::udp(addr(HERE), &Options::default()).expect_err("in use");
    let told = told(&error, Protocol::Udp, &Options::default());
    let named = format!("127.0.0.1:7000/udp is held by pid {} (sleep 600)", holder.pid());
    assert!(told.text.starts_with(&named), "{}", told.text);
    assert_eq!(ask(HERE, Protocol::Udp, false).exit_code, 69);
    assert_eq!(doctor(HERE).exit_code, 0, "TCP is another port space");
    // A group is open to all who set the options, and so not in the way.
    if !ip("route add 224.0.0.0/4 dev lo") {
        skip("the half of groups needs the ip command and the right to add a route");
    }
    let group = "239.255.77.1:7000";
    let _member = Holder::of(udp(group, SHARED));
    assert_eq!(ask(group, Protocol::Udp, false).exit_code, 0);
    let _single = Holder::of(udp("239.255.77.2:7000", ALONE));
    let refused = ask("239.255.77.2:7000", Protocol::Udp, false);
    assert!(refused.text.contains("without SO_REUSEPORT"), "{}", refused.text);
}

fn a_unit_is_named_and_the_line_that_stops_it() {
    let name = format!("evenkeel-test-{}.service", std::process::id());
    let Some(group) = control_group(&name) else {
        skip("no control group can be made here");
    };
    let holder = Holder::of(tcp(HERE, ALONE, true));
    fs::write(group.join("cgroup.procs"), holder.pid().to_string()).expect("the holder is moved");
    let told = opened(HERE, &Options::default());
    let one = json(&ask(HERE, Protocol::Tcp, true).text)["holders"][0]["unit"].clone();
    drop(holder);
    fs::remove_dir(&group).expect("an empty group goes");
    assert!(told.text.contains(&format!("(sleep 600) of {name}, uid 0")), "{}", told.text);
    assert_eq!(told.advice, format!("systemctl stop {name}, or choose another port"));
    assert_eq!(one, name);
}

/// A group of the hierarchy that systemd uses, wherever it is mounted.
fn control_group(name: &str) -> Option<std::path::PathBuf> {
    let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup"];
    let root = roots.iter().find(|root| fs::exists(format!("{root}/cgroup.procs")).unwrap_or(false))?;
    let group = std::path::Path::new(root).join(name);
    fs::create_dir(&group).ok().map(|()| group)
}

fn without_netlink_the_tables_of_proc_tell_the_same() {
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
