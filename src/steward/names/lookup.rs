//! One question about a name, by /etc/hosts and DNS, and what came of it.
//!
//! As the host itself resolves names: /etc/hosts first, then the servers and
//! search domains of /etc/resolv.conf; both files are read again when they
//! change. Remembers the last good answer to each question: where a DNS server
//! cannot be reached, or answers for IPv4 and not for IPv6, what was true last
//! stands in. Bounded by `PATIENCE` and by `MAX_ADDRESSES` a name. Ends with
//! its owner, the thread of `names`.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Hosts, TokioResolver};

use crate::config::ServerAddress;
use crate::steward::checks::printable;

/// No question takes longer, whatever /etc/resolv.conf says.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// So many addresses of a name are used.
pub const MAX_ADDRESSES: usize = 256;
/// How long an answer of /etc/hosts is good: until the file changes.
const HOSTS_TTL: Duration = Duration::from_secs(3600);
const FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// A place that a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    /// 0 for what is to be used first; more of `srv` alone.
    pub priority: u16,
    /// Where it is.
    pub address: SocketAddr,
    /// The share that an SRV record gives it.
    pub weight: Option<u16>,
}

/// All places of a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// In an order that is always the same.
    pub found: Vec<Found>,
    /// How long this is true.
    pub ttl: Duration,
    /// Why some of it is what was true earlier.
    pub stale: Option<String>,
}

/// Asks questions.
pub struct Lookups {
    resolver: RefCell<TokioResolver>,
    hosts: RefCell<Hosts>,
    files: Cell<[FileState; 2]>,
    last: RefCell<HashMap<(Name, RecordType), Vec<RData>>>,
}

/// What tells one version of a file from another.
type FileState = Option<(u64, u64, i64, i64)>;

/// The records of one question.
struct Records {
    data: Vec<RData>,
    ttl: Duration,
    stale: Option<String>,
}

/// Why there are no records.
enum Failure {
    /// The name has none.
    Missing(&'static str),
    /// Nobody could say.
    Unknown(String),
}

impl Lookups {
    /// By the files as they are now.
    pub fn new() -> Result<Lookups, String> {
        let files = FILES.map(state_of);
        Ok(Lookups {
            resolver: RefCell::new(resolver()?),
            hosts: RefCell::new(Hosts::from_system().unwrap_or_default()),
            files: Cell::new(files),
            last: RefCell::default(),
        })
    }

    /// Reads the files again where they changed; whether they did.
    pub fn refresh(&self) -> bool {
        let files = FILES.map(state_of);
        if files == self.files.replace(files) {
            return false;
        }
        if let Ok(new) = resolver() {
            self.resolver.replace(new);
        }
        self.hosts.replace(Hosts::from_system().unwrap_or_default());
        true
    }

    /// What an address of the configuration stands for now.
    pub async fn resolve(&self, address: &ServerAddress) -> Result<Answer, String> {
        let asked = async {
            match address {
                ServerAddress::Name { host, port } => self.host(host, *port).await,
                ServerAddress::Srv(name) => self.service(name).await,
                // Nothing to be asked.
                ServerAddress::Ip(_) | ServerAddress::Unix(_) => Ok(Answer::default()),
            }
        };
        let answer = tokio::time::timeout(PATIENCE, asked).await;
        answer
            .unwrap_or_else(|_| Err(format!("no answer within {}", crate::units::format_duration(PATIENCE))))
    }

    async fn host(&self, host: &str, port: u16) -> Result<Answer, String> {
        let name = Name::from_ascii(host).map_err(|error| error.to_string())?;
        let (addresses, ttl, stale) = self.addresses(&name).await?;
        let found = addresses.into_iter().map(|ip| Found {
            priority: 0,
            address: SocketAddr::new(ip, port),
            weight: None,
        });
        Ok(Answer { found: sorted(found.collect()), ttl, stale })
    }

    async fn service(&self, name: &str) -> Result<Answer, String> {
        let name = Name::from_ascii(name).map_err(|error| error.to_string())?;
        let records = self.records(&name, RecordType::SRV).await.map_err(Failure::into_reason)?;
        let mut answer = Answer { found: Vec::new(), ttl: records.ttl, stale: records.stale };
        let mut missing = None;
        for data in &records.data {
            let RData::SRV(srv) = data else { continue };
            // "." means that the service is decidedly not available (RFC 2782).
            if srv.target.is_root() || srv.port == 0 {
                continue;
            }
            match self.addresses(&srv.target).await {
                Ok((addresses, ttl, stale)) => {
                    answer.ttl = answer.ttl.min(ttl);
                    answer.stale = answer.stale.or(stale);
                    answer.found.extend(addresses.into_iter().map(|ip| Found {
                        priority: srv.priority,
                        address: SocketAddr::new(ip, srv.port),
                        weight: Some(srv.weight),
                    }));
                }
                Err(reason) => missing = Some(format!("{}: {reason}", srv.target)),
            }
        }
        answer.found = sorted(answer.found);
        match (answer.found.is_empty(), missing) {
            (true, Some(reason)) => Err(reason),
            (true, None) => Err("the service is not offered".into()),
            (false, reason) => {
                answer.stale = answer.stale.or(reason);
                Ok(answer)
            }
        }
    }

    /// The addresses of both families.
    async fn addresses(&self, name: &Name) -> Result<(Vec<IpAddr>, Duration, Option<String>), String> {
        let listed = self.hosts_addresses(name);
        if !listed.is_empty() {
            return Ok((listed, HOSTS_TTL, None));
        }
        let (v4, v6) = tokio::join!(self.records(name, RecordType::A), self.records(name, RecordType::AAAA));
        let (mut addresses, mut ttl, mut stale) = (Vec::new(), HOSTS_TTL, None);
        let mut failures = Vec::new();
        for records in [v4, v6] {
            match records {
                Ok(records) => {
                    addresses.extend(records.data.iter().filter_map(ip_of));
                    ttl = ttl.min(records.ttl);
                    stale = stale.or(records.stale);
                }
                Err(failure) => failures.push(failure),
            }
        }
        // A family that could not be asked for is not one that there is not.
        let unknown = failures.iter().find_map(|failure| match failure {
            Failure::Unknown(reason) => Some(reason.clone()),
            Failure::Missing(_) => None,
        });
        if addresses.is_empty() {
            let missing = failures.into_iter().next().map(Failure::into_reason);
            return Err(unknown.or(missing).unwrap_or_else(|| "the name has no usable address".into()));
        }
        Ok((addresses, ttl, stale.or(unknown)))
    }

    fn hosts_addresses(&self, name: &Name) -> Vec<IpAddr> {
        let hosts = self.hosts.borrow();
        let listed = [RecordType::A, RecordType::AAAA]
            .into_iter()
            .filter_map(|kind| hosts.lookup_static_host(&Query::query(name.clone(), kind)));
        listed
            .flat_map(|lookup| lookup.answers().iter().filter_map(|r| ip_of(&r.data)).collect::<Vec<_>>())
            .collect()
    }

    async fn records(&self, name: &Name, kind: RecordType) -> Result<Records, Failure> {
        let key = (name.clone(), kind);
        // Cheap, and not held over the question.
        let resolver = self.resolver.borrow().clone();
        match resolver.lookup(name.clone(), kind).await {
            Ok(lookup) => {
                let answers = lookup.answers();
                let data: Vec<RData> = answers
                    .iter()
                    .map(|record| &record.data)
                    .filter(|data| data.record_type() == kind)
                    .cloned()
                    .collect();
                let ttl = answers.iter().map(|record| record.ttl).min().unwrap_or(0);
                self.last.borrow_mut().insert(key, data.clone());
                Ok(Records { data, ttl: Duration::from_secs(ttl.into()), stale: None })
            }
            Err(error) => match failure(&error) {
                Failure::Unknown(reason) => match self.last.borrow().get(&key) {
                    Some(data) => {
                        Ok(Records { data: data.clone(), ttl: Duration::ZERO, stale: Some(reason) })
                    }
                    None => Err(Failure::Unknown(reason)),
                },
                missing => {
                    self.last.borrow_mut().remove(&key);
                    Err(missing)
                }
            },
        }
    }
}

impl Failure {
    fn into_reason(self) -> String {
        match self {
            Failure::Missing(reason) => reason.into(),
            Failure::Unknown(reason) => reason,
        }
    }
}

fn failure(error: &NetError) -> Failure {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
            ResponseCode::NXDomain => Failure::Missing("no such name"),
            ResponseCode::NoError => Failure::Missing("the name has no address"),
            code => Failure::Unknown(format!("the DNS server says: {code}")),
        },
        NetError::Dns(DnsError::ResponseCode(code)) => {
            Failure::Unknown(format!("the DNS server says: {code}"))
        }
        NetError::Timeout => Failure::Unknown("no DNS server answered in time".into()),
        other => Failure::Unknown(printable(other.to_string().as_bytes(), 200)),
    }
}

/// The address of a record, where it is one of a host.
fn ip_of(data: &RData) -> Option<IpAddr> {
    let ip = match data {
        RData::A(a) => IpAddr::V4(a.0),
        RData::AAAA(aaaa) => IpAddr::V6(aaaa.0),
        _ => return None,
    };
    // "0.0.0.0" is how filters say no; connecting to it would end at this host.
    (!ip.is_unspecified() && !ip.is_multicast() && ip != Ipv4Addr::BROADCAST).then_some(ip)
}

fn sorted(mut found: Vec<Found>) -> Vec<Found> {
    found.sort();
    found.dedup_by_key(|found| found.address);
    found.truncate(MAX_ADDRESSES);
    found
}

fn resolver() -> Result<TokioResolver, String> {
    let mut builder = match TokioResolver::builder_tokio() {
        Ok(builder) => builder,
        // As resolv.conf(5) has it: without any, the server of this host.
        Err(_) => {
            let local = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
            let config = ResolverConfig::from_parts(None, Vec::new(), vec![local]);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        }
    };
    let options = builder.options_mut();
    // Asked only when a TTL is over; a second memory would only be late.
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.timeout = options.timeout.min(PATIENCE / 3);
    options.try_tcp_on_error = true;
    builder.build().map_err(|error| error.to_string())
}

fn state_of(path: &str) -> FileState {
    let data = fs::metadata(path).ok()?;
    Some((data.ino(), data.size(), data.mtime(), data.mtime_nsec()))
}
