//! "Address already in use": by whom, why that stands in the way, and what
//! would clear it.
//!
//! The rules are those that `doctor --matrix` tries out on this kernel.

use std::net::SocketAddr;

use crate::sys::holders::{Holder, Protocol, State};

use super::{BindFailure, EXIT_ADDRESS, Explanation};

/// More holders than this are counted, not named.
const NAMED: usize = 3;

/// Does this holder stand in the way of a socket of ours?
///
/// Ours have SO_REUSEPORT, those of TCP and of multicast groups SO_REUSEADDR
/// too. An option that could not be read counts as not set: better named
/// than passed over.
pub fn blocks(holder: &Holder, address: SocketAddr, our_uid: u32) -> bool {
    let joins = holder.reuse_port == Some(true) && holder.uid == our_uid;
    let ours_step_aside = match holder.protocol {
        Protocol::Tcp => holder.state != State::Listening,
        Protocol::Udp => address.ip().is_multicast(),
    };
    let passed_over = ours_step_aside && holder.reuse_address == Some(true);
    !(joins || passed_over)
}

/// `pid 4242 (nginx: master), uid 33, without SO_REUSEPORT`
pub fn holder_line(holder: &Holder, our_uid: u32) -> String {
    let state = match (holder.protocol, holder.state) {
        // A UDP socket that is connected is a socket like the others.
        (Protocol::Udp, _) => State::Bound,
        (Protocol::Tcp, state) => state,
    };
    let what = match (state, holder.socket_count) {
        (State::TimeWait, count) => return format!("{} in TIME_WAIT", connections(count)),
        (State::Listening | State::Bound, 1) => String::new(),
        (State::Listening | State::Bound, count) => format!("{count} sockets of "),
        (State::Connected, count) => format!("{} of ", connections(count)),
        // Once a program has closed it, a connection is the kernel's alone.
        (State::Closing, count) if holder.processes.is_empty() => {
            return format!("{} that a program has closed and the peer has not", connections(count));
        }
        (State::Closing, count) => format!("{} on its way up or down, of ", connections(count)),
    };
    let unlistening = if unlistening(holder) { ", bound but not listening" } else { "" };
    match holder.processes.as_slice() {
        [] => format!("{what}uid {}, process not visible from here{unlistening}", holder.uid),
        [first, others @ ..] => {
            let more = match others.len() {
                0 => String::new(),
                count => format!(" and {count} more"),
            };
            let unit = first.unit.as_ref().map(|unit| format!(" of {unit}")).unwrap_or_default();
            format!(
                "{what}pid {} ({}){unit}{more}, uid {}, {}{unlistening}",
                first.pid,
                first.command,
                holder.uid,
                reuse(holder, our_uid)
            )
        }
    }
}

pub(super) fn explain(failure: &BindFailure) -> Explanation {
    let facts = &failure.facts;
    let in_the_way = |holder: &&Holder| {
        let held = matches!(holder.state, State::Listening | State::Bound);
        blocks(holder, failure.address, facts.our_uid) || (failure.probing && held)
    };
    let mut culprits: Vec<&Holder> = facts.holders.iter().filter(in_the_way).collect();
    if culprits.is_empty() {
        // It went between the bind and the look, or by a rule that is not
        // among ours: say who is there.
        culprits = facts.holders.iter().collect();
    }
    let Some(first) = culprits.first() else {
        return nobody(failure);
    };
    let mut named: Vec<String> = culprits
        .iter()
        .take(NAMED)
        .map(|holder| at(holder, failure) + &holder_line(holder, facts.our_uid))
        .collect();
    if culprits.len() > NAMED {
        named.push(format!("{} more", culprits.len() - NAMED));
    }
    Explanation {
        text: format!("{} is held by {}", failure.place(), named.join("; and by ")),
        advice: advice(first, failure),
        exit_code: EXIT_ADDRESS,
    }
}

/// Names the holder's own address where it is another one.
fn at(holder: &Holder, failure: &BindFailure) -> String {
    let same = holder.local.ip() == failure.address.ip();
    if same { String::new() } else { format!("the overlapping {}: ", holder.local) }
}

fn advice(holder: &Holder, failure: &BindFailure) -> String {
    let our_uid = failure.facts.our_uid;
    match holder.state {
        State::TimeWait | State::Closing => {
            "left by a program that did not set SO_REUSEADDR or SO_REUSEPORT; gone in a minute, start again then".into()
        }
        State::Connected if failure.mode == Protocol::Tcp => format!(
            "end that program or wait for its connection to end; if it only borrowed the port for an outgoing \
             connection, keep it from that: sysctl -w net.ipv4.ip_local_reserved_ports={}",
            failure.address.port()
        ),
        State::Listening | State::Bound | State::Connected => match holder.reuse_port {
            Some(true) if holder.uid != our_uid => format!(
                "all sockets of a port must be opened by one user: start both programs as uid {} or as uid {our_uid}, \
                 or {}",
                holder.uid,
                stop(holder)
            ),
            Some(true) => format!(
                "{}; if both are meant to share the port, set share_ports = true in [daemon]",
                stop(holder)
            ),
            Some(false) => stop(holder),
            None => format!("{}; root can see more: evenkeel doctor {}{}", stop(holder), failure.address, udp(failure)),
        },
    }
}

fn stop(holder: &Holder) -> String {
    let Some(first) = holder.processes.first() else {
        return "stop its owner (another user's, or in another container) or choose another port".into();
    };
    match &first.unit {
        Some(unit) if unit.ends_with(".service") || unit.ends_with(".socket") => {
            format!("systemctl stop {unit}, or choose another port")
        }
        _ => format!("stop pid {}, or choose another port", first.pid),
    }
}

fn nobody(failure: &BindFailure) -> Explanation {
    Explanation {
        text: format!("{} is in use, but no socket there is visible from here", failure.place()),
        advice: format!(
            "the holder may have gone, so try again; before Linux 6.8 a socket that is bound and not listening \
             is in no table; root can see more: evenkeel doctor {}{}",
            failure.address,
            udp(failure)
        ),
        exit_code: EXIT_ADDRESS,
    }
}

fn udp(failure: &BindFailure) -> &'static str {
    match failure.mode {
        Protocol::Tcp => "",
        Protocol::Udp => " --udp",
    }
}

fn connections(count: usize) -> String {
    if count == 1 { "a connection".into() } else { format!("{count} connections") }
}

fn unlistening(holder: &Holder) -> bool {
    // UDP sockets never listen, so it would say nothing there.
    holder.state == State::Bound && holder.protocol == Protocol::Tcp
}

fn reuse(holder: &Holder, our_uid: u32) -> String {
    match holder.reuse_port {
        Some(true) if holder.uid != our_uid => {
            format!("with SO_REUSEPORT, but we are uid {our_uid}: all must share one uid")
        }
        Some(true) => "with SO_REUSEPORT".into(),
        Some(false) => "without SO_REUSEPORT".into(),
        None => "its options not readable from here".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(protocol: Protocol, state: State, uid: u32, reuse: [Option<bool>; 2]) -> Holder {
        Holder {
            protocol,
            local: "127.0.0.1:80".parse().expect("an address"),
            state,
            uid,
            interface: 0,
            reuse_address: reuse[0],
            reuse_port: reuse[1],
            socket_count: 1,
            processes: Vec::new(),
        }
    }

    #[test]
    fn a_holder_blocks_as_the_kernel_would_have_it() {
        use Protocol::{Tcp, Udp};
        let (yes, no) = (Some(true), Some(false));
        let unicast = "127.0.0.1:80".parse().expect("an address");
        let group = "239.1.1.1:80".parse().expect("an address");
        let blocks =
            |protocol, state, uid, reuse, address| blocks(&holder(protocol, state, uid, reuse), address, 0);
        // A group takes all sockets of its user, and nobody else's.
        assert!(!blocks(Tcp, State::Listening, 0, [no, yes], unicast));
        assert!(blocks(Tcp, State::Listening, 33, [no, yes], unicast));
        assert!(!blocks(Udp, State::Bound, 0, [no, yes], unicast));
        // SO_REUSEADDR helps over what does not listen, on TCP and in groups.
        assert!(blocks(Tcp, State::Listening, 0, [yes, no], unicast));
        assert!(!blocks(Tcp, State::Connected, 33, [yes, no], unicast));
        assert!(blocks(Udp, State::Bound, 33, [yes, no], unicast));
        assert!(!blocks(Udp, State::Bound, 33, [yes, no], group));
        // What could not be read is not passed over.
        assert!(blocks(Tcp, State::Listening, 0, [None, None], unicast));
        assert!(blocks(Tcp, State::TimeWait, 0, [None, None], unicast));
    }
}
