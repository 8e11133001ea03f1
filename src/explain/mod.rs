//! Turns a bind that failed into what happened and what to do about it.
//!
//! Pure: `sys::holders::gather` collects the facts, this writes the words. The
//! supervisor and `doctor` say the same for the same facts:
//!
//! ```ignore
//! let error = listen::tcp(address, &options).unwrap_err();
//! let facts = holders::gather(address, Protocol::Tcp, &options);
//! let told = explain::bind_failure(&BindFailure::new(&error, Protocol::Tcp, &options, facts));
//! ```

mod in_use;

use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use crate::sys::holders::{Facts, Placement, Protocol};
use crate::sys::listen::{OpenError, Options, Step};

pub use in_use::{blocks, holder_line};

/// Exit code: an address could not be bound.
pub const EXIT_ADDRESS: u8 = 69;
/// Exit code: a permission is missing.
pub const EXIT_PERMISSION: u8 = 77;

/// An address that could not be opened, with all that is known about it.
#[derive(Clone, Debug)]
pub struct BindFailure {
    /// What was to be bound.
    pub address: SocketAddr,
    /// TCP or UDP.
    pub mode: Protocol,
    /// The call that failed.
    pub step: Step,
    /// What it answered.
    pub errno: i32,
    /// A probe for other programs' sockets, not the bind itself: sockets that
    /// a bind would join count as in the way too.
    pub probing: bool,
    /// The interface that was asked for.
    pub interface: Option<String>,
    /// Holders, our uid, and what the host says.
    pub facts: Facts,
}

impl BindFailure {
    /// From what `sys::listen` returned and `sys::holders::gather` found.
    pub fn new(error: &OpenError, mode: Protocol, options: &Options, facts: Facts) -> BindFailure {
        BindFailure {
            address: error.address,
            mode,
            step: error.step,
            errno: error.source.raw_os_error().unwrap_or(0),
            probing: false,
            interface: options.interface.clone(),
            facts,
        }
    }

    /// The same for `sys::listen::probe_tcp` and `probe_udp`.
    pub fn probe(
        address: SocketAddr,
        errno: i32,
        mode: Protocol,
        options: &Options,
        facts: Facts,
    ) -> BindFailure {
        let source = std::io::Error::from_raw_os_error(errno);
        let error = OpenError { step: Step::Bind, address, source };
        BindFailure { probing: true, ..BindFailure::new(&error, mode, options, facts) }
    }

    /// `127.0.0.1:8080/tcp`
    fn place(&self) -> String {
        format!("{}/{}", self.address, self.mode.name())
    }
}

/// What to tell the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What is the case; one line.
    pub text: String,
    /// What to do; one line.
    pub advice: String,
    /// What the program ends with if it ends for this.
    pub exit_code: u8,
}

/// Why the address could not be opened, and the way out.
pub fn bind_failure(failure: &BindFailure) -> Explanation {
    match Errno::from_raw(failure.errno) {
        Errno::EADDRINUSE => in_use::explain(failure),
        Errno::EACCES => refused(failure),
        Errno::EPERM => not_permitted(failure),
        Errno::EADDRNOTAVAIL => not_here(failure),
        Errno::EAFNOSUPPORT => address(
            format!("{}: {} is not there on this host", failure.place(), family(failure.address)),
            "enable it in the kernel, allow it in the unit (RestrictAddressFamilies=), or take the address out of bind"
                .into(),
        ),
        Errno::EINVAL => invalid(failure),
        Errno::ENODEV => no_device(failure),
        Errno::EMFILE => address(
            format!("{}: this process has no file descriptor left", failure.place()),
            "raise LimitNOFILE= in the unit (or ulimit -n)".into(),
        ),
        Errno::ENFILE => address(
            format!("{}: this host has no file descriptor left", failure.place()),
            "raise it: sysctl -w fs.file-max=...".into(),
        ),
        Errno::ENOBUFS | Errno::ENOMEM => address(
            format!("{}: {}: the kernel has no memory for it", failure.place(), failure.step),
            "lower receive_buffer and send_buffer, or raise the memory limit of the unit or container".into(),
        ),
        Errno::ENOPROTOOPT => address(
            format!("{}: this kernel does not know {}", failure.place(), failure.step),
            "leave the option out, or use a newer kernel".into(),
        ),
        other => address(
            format!("{}: {}: {}", failure.place(), failure.step, described(other)),
            "not one of the usual causes; strace -f -e trace=network shows the call".into(),
        ),
    }
}

/// EACCES at bind(2): a low port; elsewhere: a policy.
fn refused(failure: &BindFailure) -> Explanation {
    let port = failure.address.port();
    let start = failure.facts.unprivileged_port_start;
    if failure.step == Step::Bind && port != 0 && port < start.unwrap_or(1024) {
        let limit = start.map_or("1024 (as usual)".into(), |start| start.to_string());
        return permission(
            format!(
                "{}: ports below {limit} need CAP_NET_BIND_SERVICE, which uid {} lacks here",
                failure.place(),
                failure.facts.our_uid
            ),
            format!(
                "AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit, or \
                 sysctl -w net.ipv4.ip_unprivileged_port_start={port}, or a port from {} on",
                start.unwrap_or(1024)
            ),
        );
    }
    permission(
        format!("{}: {}: permission denied, and not for a low port", failure.place(), failure.step),
        "a security policy says no: look for a denial in the journal (SELinux, AppArmor, landlock) \
         and at SocketBindDeny= of the unit"
            .into(),
    )
}

/// EPERM: an option that wants a capability, or a filter of the cgroup.
fn not_permitted(failure: &BindFailure) -> Explanation {
    let (lacking, advice) = match failure.step {
        Step::Option("SO_BINDTODEVICE") => (
            "interface needs CAP_NET_RAW on this kernel",
            "AmbientCapabilities=CAP_NET_RAW in the unit, or leave interface out (Linux 5.7 needs no capability)",
        ),
        Step::Option("IP_TRANSPARENT" | "IPV6_TRANSPARENT") => (
            "transparent needs CAP_NET_ADMIN or CAP_NET_RAW",
            "AmbientCapabilities=CAP_NET_ADMIN in the unit, or transparent = false",
        ),
        Step::Bind | Step::Listen => (
            "operation not permitted",
            "a filter of the cgroup or a seccomp rule says no: look at SocketBindDeny= and SystemCallFilter= of the unit",
        ),
        Step::Socket | Step::Join | Step::Option(_) => (
            "operation not permitted",
            "a seccomp rule or a security policy says no: look at SystemCallFilter= of the unit",
        ),
    };
    permission(format!("{}: {}: {lacking}", failure.place(), failure.step), advice.into())
}

/// EADDRNOTAVAIL: the address is not this host's, or not at this moment.
fn not_here(failure: &BindFailure) -> Explanation {
    let (place, ip) = (failure.place(), failure.address.ip());
    let wait = "freebind = true binds it all the same and works as soon as it is there";
    let (text, advice) = match &failure.facts.placement {
        Placement::FamilyDisabled => (
            format!("{place}: IPv6 is switched off on this host"),
            "sysctl -w net.ipv6.conf.all.disable_ipv6=0, or take the address out of bind".into(),
        ),
        Placement::Down(name) => (
            format!("{place}: {ip} is on interface {name}, which is down"),
            format!("ip link set {name} up, or {wait}"),
        ),
        Placement::Tentative(name) => (
            format!("{place}: {ip} on {name} is not usable yet: the search for a duplicate runs"),
            format!(
                "try again in a second or two (After=network-online.target in the unit), or {wait}; \
                 the kernel can skip it: sysctl -w net.ipv6.conf.{name}.accept_dad=0"
            ),
        ),
        Placement::Duplicate(name) => (
            format!("{place}: {ip} on {name} was refused: another host has this address"),
            "give one of the two another address".into(),
        ),
        Placement::Nowhere => (
            format!("{place}: no interface of this host has the address {ip}"),
            format!("ip address add {ip} dev INTERFACE, or correct bind, or {wait}"),
        ),
        Placement::Up(name) => (
            format!("{place}: {ip} is on {name}, and yet it cannot be bound"),
            "it may have come this moment; try again. With interface set, the address must be of that interface".into(),
        ),
        Placement::Everywhere => (
            format!("{place}: {}: the address cannot be assigned", failure.step),
            match failure.step {
                Step::Join => "multicast_interface must have an address, be up and be able to do multicast".into(),
                _ => format!("ip address show tells which addresses this host has; {wait}"),
            },
        ),
    };
    address(text, advice)
}

/// EINVAL: most often a link-local address without its interface.
fn invalid(failure: &BindFailure) -> Explanation {
    let place = failure.place();
    match failure.address {
        SocketAddr::V6(v6) if v6.scope_id() == 0 && needs_scope(failure.address.ip()) => address(
            format!("{place}: a link-local address is not whole without its interface"),
            format!("set interface = \"eth0\", or write its number (ip link): [{}%2]:{}", v6.ip(), v6.port()),
        ),
        _ if failure.step == Step::Join => address(
            format!("{place}: {} is not a multicast group that can be joined", failure.address.ip()),
            "a group is in 224.0.0.0/4 or ff00::/8; an IPv6 group names its interface, not an address".into(),
        ),
        _ => address(
            format!("{place}: {}: the kernel calls the address or the value invalid", failure.step),
            "check the address and the listener's socket options".into(),
        ),
    }
}

fn no_device(failure: &BindFailure) -> Explanation {
    let text = match (failure.step, &failure.interface) {
        (Step::Join, _) => {
            format!("{}: no interface to join the group on", failure.place())
        }
        (_, Some(name)) => {
            format!("{}: there is no interface {name} in this network namespace", failure.place())
        }
        _ => format!("{}: {}: no such interface", failure.place(), failure.step),
    };
    let advice = match failure.step {
        Step::Join => {
            "set multicast_interface, or add a route: ip route add 224.0.0.0/4 dev INTERFACE".to_string()
        }
        _ => "ip link shows the names; correct interface, or start after it is there (After= in the unit)"
            .into(),
    };
    address(text, advice)
}

/// fe80::/10, and the groups of an interface or a link.
fn needs_scope(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V6(v6) => {
            let first = v6.segments()[0];
            first & 0xffc0 == 0xfe80 || (v6.is_multicast() && matches!(first & 0xf, 1 | 2))
        }
        IpAddr::V4(_) => false,
    }
}

fn family(address: SocketAddr) -> &'static str {
    if address.is_ipv6() { "IPv6" } else { "IPv4" }
}

/// The kernel's words, in lower case, with the name that manuals use.
fn described(errno: Errno) -> String {
    format!("{} ({errno:?})", errno.desc().to_lowercase())
}

fn address(text: String, advice: String) -> Explanation {
    Explanation { text, advice, exit_code: EXIT_ADDRESS }
}

fn permission(text: String, advice: String) -> Explanation {
    Explanation { text, advice, exit_code: EXIT_PERMISSION }
}
