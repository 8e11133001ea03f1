//! Health checks and names: everything of the steward that looks outwards.
//!
//! One thread with an asynchronous runtime, so that hundreds of servers cost
//! no thread each. It follows what `Servers` says is there, checks it
//! (`watch`, `probe`), resolves it (`names`), and tells `Servers` what came of
//! it. It may fall behind and never blocks anyone: workers read the board. It
//! ends with the process.

mod command;
mod dial;
mod exchange;
mod http;
mod probe;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use tracing::error;

use self::dial::{Place, Target};
use self::probe::{Kind, Probe};
use self::watch::{Before, Wanted, Watch};
use super::names::{FILES_PERIOD, Names};
use super::servers::{Servers, Watched};
use crate::board;
use crate::config::{Check, Health, SendProxy, ServerAddress};
use crate::health::Rules;
use crate::sys::clock::Millis;

pub(super) use probe::printable;

/// How often traffic is looked at, and whether the machine slept.
const LOOK_PERIOD: Duration = Duration::from_millis(500);

/// Begins to watch and to resolve, on a thread of its own. `is_first` = no
/// steward of this daemon has judged anything yet.
pub fn start(servers: Arc<Servers>, is_first: bool) {
    let begun = std::thread::Builder::new().name("checks".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => {
                let local = tokio::task::LocalSet::new();
                local.block_on(&runtime, follow(servers, is_first));
            }
            Err(error) => error!("no health checks and no names: {error}"),
        }
    });
    if let Err(error) = begun {
        error!("no health checks and no names: {error}");
    }
}

/// Follows what there is for ever.
async fn follow(servers: Arc<Servers>, is_first: bool) {
    let seed = crate::sys::clock::precise_micros() ^ (u64::from(std::process::id()) << 32);
    let watch = Watch::new(Arc::clone(&servers), seed);
    let names = Names::new(Arc::clone(&servers)).inspect_err(|reason| error!("no names: {reason}")).ok();
    let (mut changes, mut failures) = (servers.changes(), servers.failures());
    let mut looks = tokio::time::interval(LOOK_PERIOD);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut files = tokio::time::interval(FILES_PERIOD);
    files.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut is_first = is_first;
    loop {
        changes.mark_unchanged();
        let places = servers.places();
        let seen_any = !places.is_empty();
        watch.set(places.into_iter().map(|place| wanted(place, is_first)).collect());
        if let Some(names) = &names {
            names.set(servers.names());
        }
        // What comes later was not there when an earlier steward judged.
        is_first |= seen_any;
        loop {
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    break;
                }
                _ = failures.changed() => watch.look(),
                _ = looks.tick() => watch.look(),
                _ = files.tick() => {
                    if let Some(names) = &names {
                        names.look_at_files();
                    }
                }
            }
        }
    }
}

/// How a place is to be watched, and what is known of it.
fn wanted(place: Watched, is_first: bool) -> (Wanted, Before) {
    let before = match place.verdict {
        board::Health::Down => Before::Judged { up: false },
        board::Health::Up if is_first => Before::Unheard,
        board::Health::Up => Before::Judged { up: true },
    };
    let health = &place.health;
    let millis = |duration: Duration| duration.as_millis() as Millis;
    let rules = Rules {
        checked: health.check != Check::None,
        passive: health.passive,
        interval: millis(health.interval),
        rise: health.rise,
        fall: health.fall,
    };
    let wanted =
        Wanted { check: health.check, probe: probe(&place), interval: health.interval, rules, id: place.id };
    (wanted, before)
}

fn probe(place: &Watched) -> Option<Probe> {
    let health = &place.health;
    let target = target(&place.address, health.port)?;
    let kind = match health.check {
        Check::None => return None,
        Check::Connect => Kind::Connect,
        Check::Http => Kind::Http {
            method: health.method.clone(),
            path: health.path.clone(),
            host: host(health, &target),
            expect_status: health.expect_status.clone(),
        },
        Check::Exchange => {
            let (send, expect) = (health.send.clone(), health.expect.clone());
            if place.is_udp {
                Kind::ExchangeDatagrams { send, expect }
            } else {
                Kind::Exchange { send, expect }
            }
        }
        Check::Command => Kind::Command {
            arguments: health.command.clone(),
            server: place.id.address.clone(),
            upstream: place.id.upstream.clone(),
        },
    };
    // Another port is another service, which knows of no header.
    let send_proxy = if health.port == 0 { place.send_proxy } else { SendProxy::Off };
    let place = Place { target, source: place.source.clone(), send_proxy };
    Some(Probe { kind, place, timeout: health.timeout })
}

fn target(address: &ServerAddress, port: u16) -> Option<Target> {
    match address {
        ServerAddress::Ip(address) => {
            let mut address = *address;
            if port != 0 {
                address.set_port(port);
            }
            Some(Target::Ip(address))
        }
        ServerAddress::Unix(path) => Some(Target::Unix(path.clone())),
        ServerAddress::Name { .. } | ServerAddress::Srv(_) => None,
    }
}

/// The Host header.
fn host(health: &Health, target: &Target) -> String {
    match target {
        _ if !health.host.is_empty() => health.host.clone(),
        Target::Ip(address) => address.to_string(),
        Target::Unix(_) => "localhost".into(),
    }
}
