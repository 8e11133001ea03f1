//! The matrix of this kernel: what it says, and that it asked.

use std::collections::BTreeMap;

use evenkeel::doctor::matrix::{Kind, Matrix, Outcome, Reuse, Trial, Verdict, trials};
use evenkeel::sys::isolated::Network;

use crate::scene::{elsewhere, json};
use crate::support::{Test, skip};
use crate::tests;

pub fn tests() -> Vec<Test> {
    tests![
        this_kernel_applies_the_rules_that_listeners_rely_on,
        another_user_is_refused_what_reuseport_gives_and_granted_what_reuseaddr_gives needs ["root"],
        without_a_second_user_its_cells_say_so_and_guess_nothing,
        every_cell_is_asked_answered_and_reasoned,
        the_classic_sentences_are_held_against_the_answers,
        a_thief_by_reuseaddr_gets_every_datagram_and_reuseport_alone_keeps_it_out needs ["root"],
        the_table_explains_every_letter_it_uses,
        where_no_namespace_is_allowed_the_loopback_answers_the_same,
        a_kernel_whose_reuseport_does_nothing_shows_in_the_cells,
        a_kernel_that_refuses_to_listen_shows_in_the_cells,
        a_bind_that_a_filter_refuses_shows_with_its_own_error,
    ]
}

/// What Linux 6.18 does wherever the addresses overlap. A word is what the
/// first socket set (nothing, RA, RP, both), a letter what the second set:
/// `.` bound, `B` EADDRINUSE at bind(2).
const SAME_USER: [(Kind, &str); 6] = [
    (Kind::TcpListening, "BBBB BBBB BB.. BB.."),
    (Kind::TcpBound, "BBBB B.B. BB.. B..."),
    (Kind::TcpConnection, "BBBB B.B. BB.. B..."),
    (Kind::TcpTimeWait, "BBBB B.B. BB.. B..."),
    (Kind::Udp, "BBBB B.B. BB.. B..."),
    (Kind::UdpMulticast, "BBBB B.B. BB.. B..."),
];
const ANOTHER_USER: [(Kind, &str); 6] = [
    (Kind::TcpListening, "BBBB BBBB BBBB BBBB"),
    (Kind::TcpBound, "BBBB B.B. BBBB B.B."),
    (Kind::TcpConnection, "BBBB B.B. BBBB B.B."),
    (Kind::TcpTimeWait, "BBBB B.B. BB.. B..."),
    (Kind::Udp, "BBBB B.B. BBBB B.B."),
    (Kind::UdpMulticast, "BBBB B.B. BBBB B.B."),
];
const APART: &str = ".... .... .... ....";

fn measured() -> Matrix {
    Matrix::measure().expect("the matrix can be tried")
}

/// The kernels that the tables above were read from. On others a difference
/// is news and not a fault.
fn is_known(matrix: &Matrix) -> bool {
    matrix.kernel.starts_with("6.18.")
}

fn words(matrix: &Matrix, kind: Kind, pair: usize, same_uid: bool) -> String {
    let pair = kind.pairs()[pair];
    let letter = |first, second| {
        let trial = Trial { kind, pair, first, second, same_uid };
        match matrix.outcome(trial).expect("every combination is asked") {
            Outcome::Bound => '.',
            Outcome::Refused { errno, call } if errno == "EADDRINUSE" && call == "bind" => 'B',
            Outcome::Refused { .. } => '!',
            Outcome::NotTried(_) => '?',
        }
    };
    let word = |first| Reuse::ALL.map(|second| letter(first, second)).iter().collect::<String>();
    Reuse::ALL.map(word).join(" ")
}

fn differences(matrix: &Matrix, table: &[(Kind, &str)], same_uid: bool) -> Vec<String> {
    let mut differences = Vec::new();
    for (kind, overlapping) in table {
        for (at, pair) in kind.pairs().iter().enumerate() {
            let expected = if pair.overlap { overlapping } else { APART };
            let found = words(matrix, *kind, at, same_uid);
            if found != expected {
                let (name, first, second) = (kind.name(), pair.first, pair.second);
                differences.push(format!("{name} {first}, {second}: {found} and not {expected}"));
            }
        }
    }
    differences
}

fn this_kernel_applies_the_rules_that_listeners_rely_on() {
    answers_as_in(&SAME_USER, true);
}

fn another_user_is_refused_what_reuseport_gives_and_granted_what_reuseaddr_gives() {
    answers_as_in(&ANOTHER_USER, false);
}

fn answers_as_in(table: &[(Kind, &str)], same_uid: bool) {
    let matrix = measured();
    let differences = differences(&matrix, table, same_uid);
    if !is_known(&matrix) {
        skip(&format!("Linux {} is not in the table; differences: {differences:?}", matrix.kernel));
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

fn without_a_second_user_its_cells_say_so_and_guess_nothing() {
    let text = elsewhere(|| {
        // A user namespace of this one user, whoever runs the test.
        let (uid, flags) = (nix::unistd::geteuid(), nix::sched::CloneFlags::CLONE_NEWUSER);
        if nix::sched::unshare(flags).is_err() {
            return "no user namespace".into();
        }
        let _ = std::fs::write("/proc/self/setgroups", "deny");
        let _ = std::fs::write("/proc/self/uid_map", format!("0 {uid} 1"));
        measured().json()
    });
    if text == "no user namespace" {
        skip(&text);
    }
    let cells = json(&text)["cells"].as_array().expect("cells").clone();
    let other = cells.iter().filter(|cell| cell["same_uid"] == false);
    assert!(other.clone().count() > 900);
    for cell in other {
        assert_eq!(cell["bind"], "not tried");
        assert!(cell["why"].as_str().is_some_and(|why| why.contains("CAP_SETUID")), "{cell}");
    }
    let ours = cells.iter().filter(|cell| cell["same_uid"] == true && cell["bind"] == "not tried");
    assert_eq!(ours.count(), 0);
}

fn every_cell_is_asked_answered_and_reasoned() {
    // It ends by itself with an error where it takes a minute.
    let matrix = measured();
    assert_eq!(matrix.trials.len(), trials().len());
    // 5 kinds on 13 pairs and one on 7, 16 combinations, two users.
    assert_eq!(matrix.trials.len(), (5 * 13 + 7) * 16 * 2);
    for cell in matrix.cells() {
        assert!(!cell.why.is_empty() && !cell.why.contains('\n'), "{cell:?}");
        assert!(!cell.why.contains("not as on"), "{cell:?}");
        assert!(!cell.same_uid || cell.bind != "not tried", "{cell:?}");
    }
}

fn the_classic_sentences_are_held_against_the_answers() {
    let matrix = measured();
    if !is_known(&matrix) {
        skip(&format!("Linux {} is not in the table", matrix.kernel));
    }
    let verdicts: BTreeMap<&str, Verdict> =
        matrix.rules().iter().map(|rule| (rule.name, rule.verdict)).collect();
    let two_users = |verdict| {
        if crate::support::other_users() { verdict } else { Verdict::NotTried }
    };
    let expected = BTreeMap::from([
        ("restart", Verdict::Holds),
        ("one-port-many-addresses", Verdict::Holds),
        ("wildcard-beside-specific", Verdict::Differs),
        ("two-families", Verdict::Holds),
        ("duplicates-for-multicast-only", Verdict::Differs),
        ("reuseport-asked-by-all", Verdict::Holds),
        ("reuseport-one-user", two_users(Verdict::Holds)),
        ("multicast-the-same", Verdict::Differs),
        ("busy-otherwise", Verdict::Holds),
        ("udp-theft", two_users(Verdict::Holds)),
    ]);
    assert_eq!(verdicts, expected);
}

fn a_thief_by_reuseaddr_gets_every_datagram_and_reuseport_alone_keeps_it_out() {
    let matrix = measured();
    assert_eq!(matrix.extras.theft, Ok((0, 100)));
    assert_eq!(matrix.extras.theft_refused.word(), "EADDRINUSE");
}

fn the_table_explains_every_letter_it_uses() {
    let text = measured().text();
    let legend: Vec<char> =
        text.lines().filter_map(|l| l.strip_prefix("  ")?.split_once("  ")?.0.chars().next()).collect();
    let tables = text.split("what is commonly said").next().expect("the tables come first");
    let rows: Vec<&str> = tables.lines().filter(|line| line.matches(", ").count() == 1).collect();
    let rows: Vec<&&str> = rows.iter().filter(|row| row.starts_with(['1', '2', '0', '['])).collect();
    assert_eq!(rows.len(), 5 * 13 + 7);
    for row in rows {
        let letters: String = row[42..].split_whitespace().collect();
        assert_eq!(letters.len(), 32, "{row}");
        assert!(letters.chars().all(|letter| legend.contains(&letter)), "{row}\n{legend:?}");
    }
}

fn where_no_namespace_is_allowed_the_loopback_answers_the_same() {
    let usual = measured();
    let text = elsewhere(|| {
        deny(libc::SYS_unshare, None, libc::EPERM);
        measured().json()
    });
    let told = json(&text);
    assert_eq!(told["network"], "loopback of this host");
    let answers = |cells: &serde_json::Value| -> Vec<serde_json::Value> {
        let cells = cells.as_array().expect("cells").iter();
        // Another user is there or not, as the namespace allows.
        cells.filter(|cell| cell["same_uid"] == true).map(|cell| cell["bind"].clone()).collect()
    };
    if usual.network == Network::Shared {
        skip("no network namespace is allowed to begin with");
    }
    assert_eq!(answers(&told["cells"]), answers(&json(&usual.json())["cells"]));
}

fn a_kernel_whose_reuseport_does_nothing_shows_in_the_cells() {
    // Success without effect: the kernel no longer knows who asked.
    let text = elsewhere(|| {
        deny(libc::SYS_setsockopt, Some(libc::SO_REUSEPORT as u32), 0);
        measured().json()
    });
    let told = json(&text);
    for cell in told["cells"].as_array().expect("cells") {
        let listening = cell["kind"] == "tcp-listening" && cell["same_uid"] == true;
        if listening && cell["addresses"][0] == cell["addresses"][1] {
            assert_eq!(cell["bind"], "EADDRINUSE", "{cell}");
            let asked = |who: &str| cell[who].to_string().contains("SO_REUSEPORT");
            let why = cell["why"].as_str().expect("a sentence");
            assert_eq!(why.starts_with("not as on Linux 6.18"), asked("first") && asked("second"), "{cell}");
        }
    }
    let rules = told["rules"].as_array().expect("rules");
    let rule = rules.iter().find(|rule| rule["name"] == "reuseport-asked-by-all").expect("the rule");
    assert_eq!(rule["verdict"], "differs");
}

fn a_kernel_that_refuses_to_listen_shows_in_the_cells() {
    let text = elsewhere(|| {
        deny(libc::SYS_listen, None, libc::EADDRINUSE);
        measured().json()
    });
    let told = json(&text);
    let mut seen = 0;
    for cell in told["cells"].as_array().expect("cells").iter().filter(|cell| cell["same_uid"] == true) {
        match cell["kind"].as_str().expect("a kind") {
            // The first socket cannot be brought there.
            "tcp-listening" | "tcp-connection" | "tcp-time-wait" => assert_eq!(cell["bind"], "not tried"),
            "tcp-bound" if cell["first"] == cell["second"] && cell["first"][0] == "SO_REUSEADDR" => {
                seen += 1;
                assert!(
                    cell["why"].as_str().is_some_and(|why| why.contains("here listen answered")),
                    "{cell}"
                );
            }
            _ => {}
        }
    }
    assert!(seen > 0);
}

fn a_bind_that_a_filter_refuses_shows_with_its_own_error() {
    // Only where the address is as long as IPv4's, so that first sockets of
    // IPv6 are still made.
    let length = size_of::<libc::sockaddr_in>() as u32;
    let text = elsewhere(|| {
        deny(libc::SYS_bind, Some(length), libc::EPERM);
        measured().json()
    });
    let told = json(&text);
    let cells = told["cells"].as_array().expect("cells").iter();
    let seconds = cells.filter(|cell| cell["same_uid"] == true && cell["addresses"][1] == "0.0.0.0");
    let is_six = |cell: &&serde_json::Value| {
        cell["addresses"][0].as_str().is_some_and(|first| first.starts_with("[::]"))
    };
    let (six, four): (Vec<_>, Vec<_>) = seconds.partition(is_six);
    assert!(!six.is_empty() && !four.is_empty());
    for cell in six {
        // A connection over IPv4 binds nothing by itself, so those are made.
        assert_eq!(cell["bind"], "EPERM", "{cell}");
        assert!(cell["why"].as_str().is_some_and(|why| why.ends_with("here bind answered EPERM")), "{cell}");
    }
    for cell in four {
        assert_eq!(cell["bind"], "not tried", "{cell}");
        assert!(cell["why"].as_str().is_some_and(|why| why.contains("first socket could not")), "{cell}");
    }
}

/// From here on, and for every child: this call does nothing and answers
/// `errno`, 0 for success; only with this third argument if one is given.
pub fn deny(call: libc::c_long, third: Option<u32>, errno: i32) {
    // Six arguments of 64 bits follow number, architecture and pointer; the
    // low half comes first on little-endian.
    deny_argument(call, third.map(|value| (2, value)), errno);
}

/// From here on no socket of this family can be made.
pub fn deny_family(family: i32, errno: i32) {
    deny_argument(libc::SYS_socket, Some((0, family as u32)), errno);
}

fn deny_argument(call: libc::c_long, argument: Option<(u32, u32)>, errno: i32) {
    let step = |code: u32, k: u32, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |offset| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0);
    let unless = |value, skip| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 0, skip);
    let answer = |value| step(libc::BPF_RET | libc::BPF_K, value, 0, 0);
    let half = if cfg!(target_endian = "little") { 0 } else { 4 };
    let mut program = vec![load(0), unless(call as u32, if argument.is_some() { 3 } else { 1 })];
    if let Some((at, value)) = argument {
        program.extend([load(16 + at * 8 + half), unless(value, 1)]);
    }
    program.push(answer(libc::SECCOMP_RET_ERRNO | errno as u32));
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs().expect("privileges can always be given up");
    // SAFETY: `program` and what it points to live through the call; the
    // kernel copies both.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
    assert_eq!(result, 0, "the filter is in force");
}
