//! What a run will do: the options checked, the defaults filled in.
//!
//! Made once, shared by all threads, never changed. `prepare` also asks the
//! host for what the plan needs: the target's address and enough descriptors.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::args::{Args, Direction, Pattern, Payload, Spacing, Transport};
use super::dialogue::{self, Script};
use super::pattern::HEADER;
use super::values;

/// Descriptors besides those of the connections: files, polls, channels.
const SPARE_DESCRIPTORS: u64 = 64;

/// Connections that are open at once unless the options say otherwise.
const CONCURRENCY: u64 = 64;

/// Bytes that a stream keeps on their way, at least one message.
const STREAM_BYTES: usize = 512 * 1024;

/// Datagrams that a stream without a rate keeps on their way.
const STREAM_DATAGRAMS: usize = 16;

/// The largest payload of a datagram over IPv4.
const LARGEST_DATAGRAM: usize = 65_507;

/// Why a run does not start, and with which exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// 2 usage, 1 failed, 77 permission.
    pub code: u8,
    /// One sentence.
    pub text: String,
}

impl Refusal {
    /// The options make no sense.
    pub fn usage(text: impl Into<String>) -> Refusal {
        Refusal { code: 2, text: text.into() }
    }

    /// The host cannot do it.
    pub fn failed(text: impl Into<String>) -> Refusal {
        Refusal { code: 1, text: text.into() }
    }
}

/// One run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// TCP or UDP.
    pub transport: Transport,
    /// What one client does.
    pub pattern: Pattern,
    /// Where to.
    pub target: SocketAddr,
    /// As it was typed.
    pub target_text: String,
    /// Threads.
    pub threads: usize,
    /// Connections at once, over all threads.
    pub concurrency: u64,
    /// Connections in all; none = as many as it takes.
    pub connections: Option<u64>,
    /// Exchanges in all; none = until the time is over.
    pub requests: Option<u64>,
    /// Starts a second, over all threads; none = closed loop.
    pub rate: Option<f64>,
    /// Spacing of those starts.
    pub arrivals: Spacing,
    /// The end of the run, warm-up not included.
    pub duration: Option<Duration>,
    /// Not measured.
    pub warmup: Duration,
    /// For one answer.
    pub timeout: Duration,
    /// Payload bytes of one exchange.
    pub size: usize,
    /// Exchanges that one connection has under way at most.
    pub window: usize,
    /// Which way a stream flows; both for the other patterns.
    pub direction: Direction,
    /// What is said and expected.
    pub script: Script,
    /// Given client addresses.
    pub sources: Vec<IpAddr>,
    /// Of payloads and arrivals.
    pub seed: u64,
}

impl Plan {
    /// Checks the options, resolves the target, raises the descriptor limit.
    pub fn prepare(args: &Args) -> Result<Plan, Refusal> {
        check_combinations(args)?;
        let target = resolve(&args.address)?;
        if let Some(source) = args.source.iter().find(|source| source.is_ipv4() != target.is_ipv4()) {
            return Err(Refusal::usage(format!(
                "--source {source} is of another address family than {target}"
            )));
        }
        let pattern = args.pattern.unwrap_or(default_pattern(args.mode));
        let size = args.size.unwrap_or(default_size(args.mode, pattern));
        let concurrency = concurrency(args, pattern);
        check_size(args, size)?;
        let expect = match &args.expect {
            Some(text) if text == "any" => Some(b"any".to_vec()),
            Some(text) => Some(values::bytes(text).map_err(|e| Refusal::usage(format!("--expect: {e}")))?),
            None => None,
        };
        let send = args.send.as_deref().map(values::bytes).transpose();
        let send = send.map_err(|e| Refusal::usage(format!("--send: {e}")))?;
        let last = pattern == Pattern::Connect;
        let script =
            dialogue::script(args.payload, &args.address, &args.path, &args.query, last, send, expect)
                .map_err(Refusal::usage)?;
        if args.mode == Transport::Udp && script.message().len() > LARGEST_DATAGRAM {
            return Err(Refusal::usage(format!("--send: a datagram takes at most {LARGEST_DATAGRAM} bytes")));
        }
        let endless = args.requests.is_none() && (args.connections.is_none() || pattern != Pattern::Connect);
        let duration = args.duration.or(endless.then_some(Duration::from_secs(10)));
        raise_descriptor_limit(concurrency)?;
        Ok(Plan {
            transport: args.mode,
            pattern,
            target,
            target_text: args.address.clone(),
            threads: threads(args, concurrency),
            concurrency,
            connections: args.connections,
            requests: args.requests,
            rate: args.rate,
            arrivals: args.arrivals,
            duration,
            warmup: args.warmup,
            timeout: args.timeout.unwrap_or(Duration::from_secs(match args.mode {
                Transport::Tcp => 5,
                Transport::Udp => 1,
            })),
            window: window(args, pattern, size),
            size,
            direction: args.direction,
            script,
            sources: args.source.clone(),
            seed: args.seed,
        })
    }

    /// The part of a total that thread `index` has to do.
    pub fn part(&self, total: u64, index: usize) -> u64 {
        let (threads, index) = (self.threads as u64, index as u64);
        total / threads + u64::from(index < total % threads)
    }

    /// Exchanges that thread `index` has to do: where the connections are
    /// counted too, each connection of the run gets its equal part.
    pub fn part_of_requests(&self, index: usize) -> Option<u64> {
        let requests = self.requests?;
        let Some(connections) = self.connections.filter(|_| self.pattern != Pattern::Connect) else {
            return Some(self.part(requests, index));
        };
        let before: u64 = (0..index).map(|other| self.part(connections, other)).sum();
        let up_to = |connection: u64| u128::from(connection) * u128::from(requests) / u128::from(connections);
        Some((up_to(before + self.part(connections, index)) - up_to(before)) as u64)
    }

    /// Exchanges of one connection of thread `index`, where the options fix
    /// them; the thread's last one may do fewer.
    pub fn per_connection(&self, index: usize) -> Option<u64> {
        match (self.pattern, self.connections, self.part_of_requests(index)) {
            (Pattern::Connect, _, _) => Some(1),
            (_, Some(connections), Some(requests)) => {
                Some(requests.div_ceil(self.part(connections, index).max(1)))
            }
            (_, Some(connections), None) if connections > self.concurrency => Some(1),
            _ => None,
        }
    }
}

fn default_pattern(mode: Transport) -> Pattern {
    match mode {
        Transport::Tcp => Pattern::Connect,
        Transport::Udp => Pattern::Request,
    }
}

fn default_size(mode: Transport, pattern: Pattern) -> usize {
    match (mode, pattern) {
        (_, Pattern::Connect | Pattern::Request) => 64,
        (Transport::Tcp, Pattern::Stream) => 16 * 1024,
        (Transport::Udp, Pattern::Stream) => 1200,
    }
}

fn concurrency(args: &Args, pattern: Pattern) -> u64 {
    let most = args.connections.unwrap_or(u64::MAX);
    let default = match pattern {
        Pattern::Connect => CONCURRENCY,
        Pattern::Request | Pattern::Stream => args.connections.unwrap_or(CONCURRENCY),
    };
    args.concurrency.unwrap_or(default).min(most)
}

fn threads(args: &Args, concurrency: u64) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    args.threads.unwrap_or((cpus / 2).clamp(1, 16)).min(concurrency).min(1024) as usize
}

fn window(args: &Args, pattern: Pattern, size: usize) -> usize {
    match (pattern, args.mode) {
        (Pattern::Connect, _) | (Pattern::Request, Transport::Tcp) => 1,
        (Pattern::Stream, Transport::Tcp) => (STREAM_BYTES / size).max(1),
        // A rate is its own limit: a lost datagram must not hold up the next.
        (_, Transport::Udp) if args.rate.is_some() => 1 << 20,
        (Pattern::Request, Transport::Udp) => 1,
        (Pattern::Stream, Transport::Udp) => STREAM_DATAGRAMS,
    }
}

/// Options that exclude each other.
fn check_combinations(args: &Args) -> Result<(), Refusal> {
    let pattern = args.pattern.unwrap_or(default_pattern(args.mode));
    let refuse = |text: &str| Err(Refusal::usage(text));
    if args.rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
        return refuse("--rate is a number of starts a second, above zero");
    }
    if args.max_spread.is_some_and(|ratio| ratio.is_nan() || ratio < 1.0) {
        return refuse("--max-spread is a ratio of at least 1, such as 1.2: the largest count over the mean");
    }
    if args.timeout.is_some_and(|timeout| timeout.is_zero()) {
        return refuse("--timeout must be above zero");
    }
    if args.duration.is_some_and(|duration| duration.is_zero()) {
        return refuse("--duration must be above zero");
    }
    if args.rate.is_some() && pattern == Pattern::Stream && args.mode == Transport::Tcp {
        return refuse(
            "--rate does not go with a tcp stream, which is as fast as the connection: use --pattern request",
        );
    }
    if args.direction != Direction::Both {
        if pattern != Pattern::Stream {
            return refuse("--direction is for --pattern stream; the other patterns go both ways");
        }
        if args.direction == Direction::Down && (args.mode == Transport::Udp || args.requests.is_some()) {
            return refuse("--direction down is for tcp, and is ended by --duration, not by --requests");
        }
    }
    let foreign = args.payload != Payload::Pattern || args.expect.is_some();
    if foreign && pattern == Pattern::Stream {
        return refuse(
            "--pattern stream needs a target that echoes: --payload and --expect do not go with it",
        );
    }
    if args.payload == Payload::Dns && args.mode == Transport::Tcp {
        return refuse("--payload dns is for udp");
    }
    if args.payload == Payload::Http && args.mode == Transport::Udp {
        return refuse("--payload http is for tcp");
    }
    if args.size.is_some() && (foreign || args.send.is_some()) {
        return refuse(
            "--size is for the default payload: what --payload, --send and --expect send has its own",
        );
    }
    Ok(())
}

fn check_size(args: &Args, size: usize) -> Result<(), Refusal> {
    if args.mode == Transport::Udp && !(HEADER..=LARGEST_DATAGRAM).contains(&size) {
        return Err(Refusal::usage(format!(
            "--size {size}: a datagram takes {HEADER} to {LARGEST_DATAGRAM} bytes, the first {HEADER} are its number"
        )));
    }
    if size > 1 << 30 {
        return Err(Refusal::usage(format!("--size {size}: one exchange takes at most 1 GiB")));
    }
    Ok(())
}

/// The first address of the target; the wildcard means this host.
fn resolve(text: &str) -> Result<SocketAddr, Refusal> {
    let port_is_number =
        text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !port_is_number {
        return Err(Refusal::usage(format!("{text:?} is not ADDRESS:PORT, [IPV6]:PORT or NAME:PORT")));
    }
    let found = text.to_socket_addrs().map_err(|error| {
        Refusal::failed(format!(
            "{text:?} does not resolve ({error}): is the name right, and reachable a name server?"
        ))
    })?;
    let mut target =
        found.into_iter().next().ok_or_else(|| Refusal::failed(format!("{text:?} has no address")))?;
    if target.port() == 0 {
        return Err(Refusal::usage(format!("{text:?}: nobody can listen on port 0")));
    }
    if target.ip().is_unspecified() {
        target.set_ip(match target.ip() {
            IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    Ok(target)
}

/// One descriptor a connection: raises the soft limit, the hard one too where
/// that is allowed.
fn raise_descriptor_limit(concurrency: u64) -> Result<(), Refusal> {
    let needed = concurrency.saturating_add(SPARE_DESCRIPTORS);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)
        .map_err(|error| Refusal::failed(format!("the descriptor limit cannot be read: {error}")))?;
    if soft >= needed {
        return Ok(());
    }
    let raised = setrlimit(Resource::RLIMIT_NOFILE, needed, hard.max(needed));
    if raised.is_ok() {
        return Ok(());
    }
    Err(Refusal::failed(format!(
        "{concurrency} connections at once need {needed} descriptors, this process may have {hard}: use \
         --concurrency {} or raise the limit (ulimit -Hn {needed})",
        hard.saturating_sub(SPARE_DESCRIPTORS)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args as _, FromArgMatches};

    fn plan(line: &str) -> Result<Plan, Refusal> {
        let command = Args::augment_args(clap::Command::new("bench"));
        let words = std::iter::once("bench").chain(line.split_whitespace());
        let matches = command.try_get_matches_from(words).map_err(|e| Refusal::usage(e.to_string()))?;
        Plan::prepare(&Args::from_arg_matches(&matches).expect("the matches are of these options"))
    }

    #[test]
    fn defaults_are_filled_in_by_pattern() {
        let connect = plan("tcp 127.0.0.1:80").expect("fine");
        assert_eq!((connect.pattern, connect.concurrency, connect.size), (Pattern::Connect, 64, 64));
        assert_eq!(connect.duration, Some(Duration::from_secs(10)));
        let kept =
            plan("tcp 127.0.0.1:80 --pattern request --connections 100 --requests 1050").expect("fine");
        assert_eq!((kept.concurrency, kept.per_connection(0), kept.duration), (100, Some(11), None));
        assert_eq!(plan("tcp 127.0.0.1:80 --connections 5").expect("fine").duration, None);
        assert_eq!(plan("udp [::]:53").expect("fine").target, "[::1]:53".parse().expect("an address"));
    }

    #[test]
    fn the_parts_of_the_threads_sum_to_the_whole() {
        let plan = plan("tcp 127.0.0.1:80 --threads 7 --concurrency 100").expect("fine");
        assert_eq!((0..7).map(|index| plan.part(1000, index)).sum::<u64>(), 1000);
        assert_eq!(plan.part(3, 6), 0);
    }

    #[test]
    fn requests_follow_the_connections_to_their_threads() {
        let plan = plan("tcp 127.0.0.1:80 --pattern request --threads 2 --connections 7 --requests 1001")
            .expect("fine");
        assert_eq!((plan.part(7, 0), plan.part(7, 1)), (4, 3));
        assert_eq!((plan.part_of_requests(0), plan.part_of_requests(1)), (Some(572), Some(429)));
        assert_eq!((plan.per_connection(0), plan.per_connection(1)), (Some(143), Some(143)));
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in [
            "tcp 127.0.0.1",
            "tcp :80",
            "tcp 127.0.0.1:0",
            "tcp 127.0.0.1:99999",
            "tcp 127.0.0.1:80 --rate 0",
            "tcp 127.0.0.1:80 --rate nan",
            "tcp 127.0.0.1:80 --max-spread 0.5",
            "tcp 127.0.0.1:80 --pattern stream --rate 5",
            "tcp 127.0.0.1:80 --direction up",
            "tcp 127.0.0.1:80 --payload dns",
            "udp 127.0.0.1:80 --payload http",
            "udp 127.0.0.1:80 --size 7",
            "udp 127.0.0.1:80 --size 65508",
            "udp 127.0.0.1:80 --pattern stream --direction down",
            "tcp 127.0.0.1:80 --source ::1",
            "tcp 127.0.0.1:80 --payload http --expect x",
            r"tcp 127.0.0.1:80 --send \q",
            "sctp 127.0.0.1:80",
        ] {
            assert_eq!(plan(line).expect_err(line).code, 2, "{line}");
        }
    }

    #[test]
    fn too_many_connections_name_the_number_that_would_do() {
        let refusal = plan("tcp 127.0.0.1:80 --concurrency 99000000000").expect_err("no host has so many");
        assert_eq!(refusal.code, 1);
        assert!(refusal.text.contains("99000000064 descriptors"), "{}", refusal.text);
    }
}
