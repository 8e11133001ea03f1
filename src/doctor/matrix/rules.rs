//! Why a cell is as it is, and what the classic description of the two
//! options says, held against the answers of this kernel.
//!
//! `expected` is what Linux 6.18 does, as one rule. It is never shown instead
//! of an answer: where the two differ, the reason says that they do.

use serde::Serialize;

use super::{Kind, Matrix, Outcome, Pair, Reuse, Trial};

/// A sentence of the classic description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// Its short name.
    pub name: &'static str,
    /// What is commonly said.
    pub claim: &'static str,
    /// Is it so here?
    pub verdict: Verdict,
    /// What this kernel did.
    pub found: String,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it is said.
    Holds,
    /// Not as it is said; `found` tells how it is.
    Differs,
    /// Could not be tried; `found` tells why.
    NotTried,
}

/// One sentence of reason for the answer to this question.
pub(super) fn why(trial: &Trial, outcome: &Outcome) -> String {
    if let Outcome::NotTried(reason) = outcome {
        return reason.clone();
    }
    let (bound, reason) = expected(trial);
    match (bound, outcome) {
        (true, Outcome::Bound) => reason.into(),
        (false, Outcome::Refused { errno, call }) if errno == "EADDRINUSE" && call == "bind" => reason.into(),
        (_, Outcome::Bound) => format!("not as on Linux 6.18, where it is refused: {reason}"),
        (_, Outcome::Refused { errno, call }) => {
            let usual = if bound { "it works" } else { "bind answers EADDRINUSE" };
            format!("not as on Linux 6.18, where {usual} ({reason}); here {call} answered {errno}")
        }
        (_, Outcome::NotTried(reason)) => reason.clone(),
    }
}

/// Is the second socket bound, and by which rule?
fn expected(trial: &Trial) -> (bool, &'static str) {
    let Trial { kind, pair, first, second, same_uid } = *trial;
    let address = first.address && second.address;
    let port = first.port && second.port;
    if !pair.overlap {
        return (true, "no address belongs to both, so no option is needed");
    }
    if port && same_uid {
        return (true, "both set SO_REUSEPORT and one user made both");
    }
    if port && kind == Kind::TcpTimeWait {
        return (true, "both set SO_REUSEPORT; what is in TIME_WAIT has no owner any more, so any user may");
    }
    if address && kind == Kind::UdpMulticast {
        return (true, "both set SO_REUSEADDR; each socket gets its own copy");
    }
    if address && kind.is_udp() {
        return (
            true,
            "both set SO_REUSEADDR: on UDP any user may, and the later socket takes the datagrams",
        );
    }
    if address && kind != Kind::TcpListening {
        return (true, "both set SO_REUSEADDR and the first does not listen");
    }
    if port && !same_uid && kind != Kind::TcpTimeWait {
        return (false, "both set SO_REUSEPORT but two users made them");
    }
    if address {
        return (false, "SO_REUSEADDR has no say while the first listens");
    }
    match (first == Reuse::NONE, second == Reuse::NONE) {
        (true, true) => (false, "neither set an option"),
        (true, false) => (false, "the first set no option, and both must"),
        (false, true) => (false, "the second set no option, and both must"),
        (false, false) => (false, "they set different options, and one must be set by both"),
    }
}

/// The sentences, in the order in which books tell them.
pub(super) fn rules(matrix: &Matrix) -> Vec<Rule> {
    vec![
        restart(matrix),
        many_addresses(matrix),
        wildcard_beside_specific(matrix),
        two_families(matrix),
        duplicates_for_multicast(matrix),
        reuse_port_by_all(matrix),
        reuse_port_one_user(matrix),
        multicast_the_same(matrix),
        busy_otherwise(matrix),
        theft(matrix),
    ]
}

/// The answer for the same address, `kind.pairs()[0]`.
fn same(matrix: &Matrix, kind: Kind, first: Reuse, second: Reuse, same_uid: bool) -> Outcome {
    at(matrix, kind, kind.pairs()[0], first, second, same_uid)
}

fn at(matrix: &Matrix, kind: Kind, pair: Pair, first: Reuse, second: Reuse, same_uid: bool) -> Outcome {
    let trial = Trial { kind, pair, first, second, same_uid };
    let outcome = matrix.outcome(trial).cloned();
    outcome.unwrap_or_else(|| Outcome::NotTried("not among the cells".into()))
}

/// A claim that rests on these answers: those that should be bound, those
/// that should be refused. An answer that is missing decides nothing.
fn judge(bound: &[&Outcome], refused: &[&Outcome]) -> Verdict {
    let missing = |o: &&&Outcome| matches!(o, Outcome::NotTried(_));
    if bound.iter().chain(refused).any(|o| missing(&o)) {
        return Verdict::NotTried;
    }
    let holds = bound.iter().all(|o| **o == Outcome::Bound) && refused.iter().all(|o| o.in_use());
    if holds { Verdict::Holds } else { Verdict::Differs }
}

fn restart(matrix: &Matrix) -> Rule {
    let ask = |kind, first, second| same(matrix, kind, first, second, true);
    let (open, linger) = (Kind::TcpConnection, Kind::TcpTimeWait);
    let both = [open, linger].map(|kind| ask(kind, Reuse::ADDRESS, Reuse::ADDRESS));
    let none = [open, linger].map(|kind| ask(kind, Reuse::NONE, Reuse::NONE));
    let new_alone = ask(linger, Reuse::NONE, Reuse::ADDRESS);
    let port = ask(linger, Reuse::PORT, Reuse::PORT);
    let changed = ask(linger, Reuse::ADDRESS, Reuse::PORT);
    Rule {
        name: "restart",
        claim: "SO_REUSEADDR lets a restarted server bind while connections of its predecessor are open or in TIME_WAIT",
        verdict: judge(&[&both[0], &both[1]], &[&none[0], &none[1]]),
        found: format!(
            "set by both: open {}, TIME_WAIT {}; by neither: {}, {}; by the new one alone: {}, so the predecessor must \
             have set it too; SO_REUSEPORT set by both does the same: {}; one after the other does not: {}",
            both[0].word(),
            both[1].word(),
            none[0].word(),
            none[1].word(),
            new_alone.word(),
            port.word(),
            changed.word()
        ),
    }
}

fn many_addresses(matrix: &Matrix) -> Rule {
    let apart = |kind: Kind| kind.pairs().iter().find(|pair| !pair.overlap).copied();
    let one = [Kind::TcpListening, Kind::Udp].map(|kind| match apart(kind) {
        Some(pair) => at(matrix, kind, pair, Reuse::NONE, Reuse::NONE, true),
        None => Outcome::NotTried("no such pair".into()),
    });
    let several = &matrix.extras.two_processes;
    Rule {
        name: "one-port-many-addresses",
        claim: "one port can be bound on different local addresses, by one process or by several",
        verdict: judge(&[&one[0], &one[1], &several[0], &several[1]], &[]),
        found: format!(
            "without any option, one process: tcp {}, udp {}; two processes: tcp {}, udp {}",
            one[0].word(),
            one[1].word(),
            several[0].word(),
            several[1].word()
        ),
    }
}

fn wildcard_beside_specific(matrix: &Matrix) -> Rule {
    let pair = super::meet(super::ONE, super::ANY);
    let ask = |kind, reuse| at(matrix, kind, pair, reuse, reuse, true);
    let listening = ask(Kind::TcpListening, Reuse::ADDRESS);
    let udp = ask(Kind::Udp, Reuse::ADDRESS);
    let port = ask(Kind::TcpListening, Reuse::PORT);
    Rule {
        name: "wildcard-beside-specific",
        claim: "SO_REUSEADDR lets a wildcard and a specific address share a port",
        verdict: judge(&[&listening, &udp], &[]),
        found: format!(
            "TCP listeners: {}; udp: {}; TCP listeners with SO_REUSEPORT: {}",
            listening.word(),
            udp.word(),
            port.word()
        ),
    }
}

fn two_families(matrix: &Matrix) -> Rule {
    let ask = |first, second, overlap| {
        let pair = Pair { first, second, overlap };
        at(matrix, Kind::TcpListening, pair, Reuse::NONE, Reuse::NONE, true)
    };
    let only = ask(super::ANY, super::ONLY, false);
    let dual = ask(super::ANY, super::DUAL, true);
    Rule {
        name: "two-families",
        claim: "the wildcards of IPv4 and IPv6 stand side by side with IPV6_V6ONLY and conflict without it",
        verdict: judge(&[&only], &[&dual]),
        found: format!("with IPV6_V6ONLY: {}; without: {}", only.word(), dual.word()),
    }
}

fn duplicates_for_multicast(matrix: &Matrix) -> Rule {
    let ask = |kind| same(matrix, kind, Reuse::ADDRESS, Reuse::ADDRESS, true);
    let (group, udp, tcp) = (ask(Kind::UdpMulticast), ask(Kind::Udp), ask(Kind::TcpListening));
    Rule {
        name: "duplicates-for-multicast-only",
        claim: "with SO_REUSEADDR the same address and port can be bound twice for UDP multicast, and for nothing else",
        verdict: judge(&[&group], &[&udp, &tcp]),
        found: format!(
            "udp multicast: {}; TCP listeners: {}; udp unicast: {}{}",
            group.word(),
            tcp.word(),
            udp.word(),
            if udp == Outcome::Bound {
                ", and the later socket takes the datagrams (see udp-theft)"
            } else {
                ""
            }
        ),
    }
}

fn reuse_port_by_all(matrix: &Matrix) -> Rule {
    let mut bound = Vec::new();
    let mut refused = Vec::new();
    for kind in [Kind::TcpListening, Kind::Udp] {
        bound.push(same(matrix, kind, Reuse::PORT, Reuse::PORT, true));
        refused.push(same(matrix, kind, Reuse::PORT, Reuse::NONE, true));
        refused.push(same(matrix, kind, Reuse::NONE, Reuse::PORT, true));
    }
    Rule {
        name: "reuseport-asked-by-all",
        claim: "SO_REUSEPORT allows duplicates only if every socket asked for it",
        verdict: judge(&bound.iter().collect::<Vec<_>>(), &refused.iter().collect::<Vec<_>>()),
        found: format!(
            "asked by both: tcp {}, udp {}; by the first alone: tcp {}, udp {}; by the second alone: tcp {}, udp {}",
            bound[0].word(),
            bound[1].word(),
            refused[0].word(),
            refused[2].word(),
            refused[1].word(),
            refused[3].word()
        ),
    }
}

fn reuse_port_one_user(matrix: &Matrix) -> Rule {
    let ask = |kind, same_uid| same(matrix, kind, Reuse::PORT, Reuse::PORT, same_uid);
    let ours = [Kind::TcpListening, Kind::Udp].map(|kind| ask(kind, true));
    let others = [Kind::TcpListening, Kind::Udp].map(|kind| ask(kind, false));
    let linger = ask(Kind::TcpTimeWait, false);
    Rule {
        name: "reuseport-one-user",
        claim: "SO_REUSEPORT allows duplicates only if the effective user of the sockets is the same",
        verdict: judge(&[&ours[0], &ours[1]], &[&others[0], &others[1]]),
        found: match reason(&others[0]) {
            Some(reason) => format!("not tried: {reason}"),
            None => format!(
                "same user: tcp {}, udp {}; two users: tcp {}, udp {}; against TIME_WAIT of another user: {}",
                ours[0].word(),
                ours[1].word(),
                others[0].word(),
                others[1].word(),
                linger.word()
            ),
        },
    }
}

fn multicast_the_same(matrix: &Matrix) -> Rule {
    let ask = |first, second, same_uid| same(matrix, Kind::UdpMulticast, first, second, same_uid);
    let address = ask(Reuse::ADDRESS, Reuse::ADDRESS, true);
    let port = ask(Reuse::PORT, Reuse::PORT, true);
    let mixed = ask(Reuse::ADDRESS, Reuse::PORT, true);
    let (address_two, port_two) =
        (ask(Reuse::ADDRESS, Reuse::ADDRESS, false), ask(Reuse::PORT, Reuse::PORT, false));
    Rule {
        name: "multicast-the-same",
        claim: "for multicast SO_REUSEADDR and SO_REUSEPORT mean the same",
        verdict: match judge(&[&address, &port, &mixed], &[]) {
            // Whoever may try two users sees a difference there as well.
            Verdict::Holds if reason(&port_two).is_none() && address_two != port_two => Verdict::Differs,
            verdict => verdict,
        },
        found: format!(
            "both sockets with SO_REUSEADDR: {}, with SO_REUSEPORT: {}; one with the one and one with the other: {}, so \
             set both; two users: {} with SO_REUSEADDR, {} with SO_REUSEPORT",
            address.word(),
            port.word(),
            mixed.word(),
            address_two.word(),
            port_two.word()
        ),
    }
}

fn busy_otherwise(matrix: &Matrix) -> Rule {
    let overlapping = |trial: &Trial| trial.pair.overlap && trial.same_uid;
    let unasked = |trial: &Trial| trial.first == Reuse::NONE && trial.second == Reuse::NONE;
    let asked = matrix.trials.iter().filter(|(trial, _)| overlapping(trial) && unasked(trial));
    let answers: Vec<&Outcome> = asked.map(|(_, outcome)| outcome).collect();
    let tried: Vec<&Outcome> = answers.iter().copied().filter(|o| reason(o).is_none()).collect();
    let refused = tried.iter().filter(|outcome| outcome.in_use()).count();
    Rule {
        name: "busy-otherwise",
        claim: "a port that is busy in any other way answers \"address already in use\"",
        verdict: if tried.is_empty() { Verdict::NotTried } else { judge(&[], &tried) },
        found: format!(
            "{refused} of {} cells without options and with overlapping addresses answered EADDRINUSE",
            tried.len()
        ),
    }
}

fn theft(matrix: &Matrix) -> Rule {
    let (verdict, found) = match &matrix.extras.theft {
        Err(reason) => (Verdict::NotTried, format!("not tried: {reason}")),
        Ok((ours, theirs)) => (
            if *theirs > 0 { Verdict::Holds } else { Verdict::Differs },
            format!(
                "both with SO_REUSEADDR, the second of another user: it got {theirs} of {} datagrams, the first {ours}; \
                 against SO_REUSEPORT alone its bind: {}",
                ours + theirs,
                matrix.extras.theft_refused.word()
            ),
        ),
    };
    Rule {
        name: "udp-theft",
        claim: "SO_REUSEADDR on a unicast UDP socket lets another user steal the port",
        verdict,
        found,
    }
}

fn reason(outcome: &Outcome) -> Option<&str> {
    match outcome {
        Outcome::NotTried(reason) => Some(reason),
        Outcome::Bound | Outcome::Refused { .. } => None,
    }
}
