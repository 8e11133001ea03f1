//! How the servers stand: the one owner of the upstream board.
//!
//! ```text
//!   checks --verdicts--+                       +--> the board of this generation
//!   names ---answers---+--> Standing --publish-+--> boards of earlier ones that still have workers
//!   supervisor -orders-+                       +--> the bell that workers hear
//! ```
//! Checks and names run beside this and call in; each call is short and holds
//! one lock. What changed is on the board before the call returns. A steward
//! that is new takes up what the board says, so the verdicts of its
//! predecessor stand until it has its own. Bounded by the configuration; it
//! ends with the process.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tracing::{info, warn};

use super::View;
use crate::board::{Board, Health, Layout, Overrides, Resolved, Standing, State};
use crate::config::{self, Config, ServerAddress};
use crate::counters::{Counters, OfServer};
use crate::sys::bell::Bell;
use crate::sys::clock::{self, Millis};
use crate::sys::shared::Region;

pub use crate::board::PlaceId;

/// However often real traffic fails, nobody is woken for it more often.
const FAILURES_PAUSE: Duration = Duration::from_millis(50);

/// A place that is to be checked, with what the file says of it.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Its name.
    pub id: PlaceId,
    /// Where it is: an IP address, or a Unix socket.
    pub address: ServerAddress,
    /// The upstream's `[upstream.health]`.
    pub health: config::Health,
    /// Whether UDP listeners use the upstream.
    pub is_udp: bool,
    /// How it stands: a check that begins anew goes on from here.
    pub verdict: Health,
}

/// A server whose name is to be resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The upstream's name.
    pub upstream: String,
    /// The server's address as the file writes it.
    pub server: String,
    /// The same, as meant: `Name` or `Srv`.
    pub address: ServerAddress,
}

/// What real traffic has met at a place. Both grow, and begin anew at a reload
/// and for a steward that is new: only differences mean something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// The place.
    pub id: PlaceId,
    /// Connections established, or flows opened.
    pub connections: u64,
    /// Connects that failed, or flows whose server refused.
    pub failures: u64,
}

/// All servers, and the board that says how they stand.
#[derive(Debug)]
pub struct Servers {
    inner: Mutex<Inner>,
    /// Told that the list of places or names may be another one.
    changes: watch::Sender<u64>,
    /// Told that real traffic failed somewhere.
    failures: watch::Sender<u64>,
    bell: Bell,
}

#[derive(Debug, Default)]
struct Inner {
    present: Option<Present>,
    overrides: Overrides,
    /// What checks want `status` to show, by place.
    checks: BTreeMap<PlaceId, Value>,
}

#[derive(Debug)]
struct Present {
    view: Arc<View>,
    standing: Standing,
    /// Its own board first.
    boards: Vec<WrittenBoard>,
}

/// A board with the configuration that it is of.
#[derive(Debug)]
pub struct WrittenBoard {
    /// The number of the configuration in the view.
    pub config: usize,
    /// Its memory.
    pub region: Region,
}

impl Servers {
    /// Nothing is known yet. `bell` wakes the workers; whenever `failures` is
    /// rung, traffic has failed.
    pub fn new(bell: OwnedFd, failures: OwnedFd) -> Arc<Servers> {
        let servers = Arc::new(Servers {
            inner: Mutex::default(),
            changes: watch::Sender::new(0),
            failures: watch::Sender::new(0),
            bell: Bell::from_fd(bell),
        });
        let listening = Arc::downgrade(&servers);
        let failures = Bell::from_fd(failures);
        std::thread::spawn(move || {
            while failures.wait().is_ok()
                && let Some(servers) = listening.upgrade()
            {
                servers.failures.send_modify(|count| *count += 1);
                std::thread::sleep(FAILURES_PAUSE);
            }
        });
        servers
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no thread panics with it")
    }

    // For checks and names.

    /// Changes whenever `places` or `names` may answer something else: a
    /// reload, an answer of the resolver, an order of the operator.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Changes some time, at most `FAILURES_PAUSE`, after real traffic failed;
    /// costs nothing while none does.
    pub fn failures(&self) -> watch::Receiver<u64> {
        self.failures.subscribe()
    }

    /// Every place that has an address and is not disabled.
    pub fn places(&self) -> Vec<Watched> {
        let inner = self.lock();
        let Some(present) = &inner.present else { return Vec::new() };
        let config = present.config();
        let watched = present.standing.places().filter_map(|(id, upstream, server, place)| {
            let file = config.upstreams.iter().find(|file| file.name == upstream.name)?;
            (place.state() != State::Disabled).then(|| Watched {
                id,
                address: match place.address {
                    Some(crate::board::Address::Ip(address)) => ServerAddress::Ip(address),
                    Some(crate::board::Address::Unix) | None => server.address.clone(),
                },
                health: file.health.clone(),
                is_udp: is_udp(config, &file.name),
                verdict: place.health,
            })
        });
        watched.collect()
    }

    /// Every server whose name is to be resolved.
    pub fn names(&self) -> Vec<Named> {
        let inner = self.lock();
        let Some(present) = &inner.present else { return Vec::new() };
        let upstreams = present.standing.upstreams().iter();
        let named = upstreams.flat_map(|upstream| {
            let named = upstream.servers.iter().filter(|server| {
                matches!(server.address, ServerAddress::Name { .. } | ServerAddress::Srv(_))
            });
            named.map(|server| Named {
                upstream: upstream.name.clone(),
                server: server.name.clone(),
                address: server.address.clone(),
            })
        });
        named.collect()
    }

    /// A verdict on a place, with why, for the log. One on a place that is
    /// gone, or that changes nothing, does nothing.
    pub fn handle_verdict(&self, id: &PlaceId, health: Health, reason: &str, now: Millis) {
        let mut inner = self.lock();
        let Some(present) = &mut inner.present else { return };
        if !present.standing.handle_verdict(id, health, now) {
            return;
        }
        let PlaceId { upstream, server, address } = id;
        let place = if address == server { server.clone() } else { format!("{server} ({address})") };
        match health {
            Health::Up => info!("upstream {upstream}: server {place} is up: {reason}"),
            Health::Down => warn!("upstream {upstream}: server {place} is down: {reason}"),
        }
        self.publish(&inner);
    }

    /// What a name resolves to now, or why it does not; then the addresses
    /// that it had stand.
    pub fn handle_resolution(
        &self,
        upstream: &str,
        server: &str,
        answer: Result<Vec<Resolved>, String>,
        now: Millis,
    ) {
        let mut inner = self.lock();
        let Some(present) = &mut inner.present else { return };
        let (changed, without_room) = present.standing.handle_resolution(upstream, server, answer, now);
        if without_room > 0 {
            warn!("upstream {upstream}: {without_room} addresses of {server} find no room and are not used");
        }
        if changed {
            self.publish(&inner);
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// What `status` shows of the check of a place.
    pub fn set_check(&self, id: &PlaceId, check: Value) {
        self.lock().checks.insert(id.clone(), check);
    }

    /// What real traffic has met, place by place.
    pub fn traffic(&self) -> Vec<Traffic> {
        let inner = self.lock();
        let Some(present) = &inner.present else { return Vec::new() };
        let (_, layout) = &present.view.configs[0];
        let tables: Vec<Counters> = present.own_counters().collect();
        let places = present.standing.places().filter_map(|(id, ..)| {
            let (upstream, place) = present.standing.find(&id)?;
            let number = layout.place(upstream, place);
            let sum = |which| tables.iter().map(|counters| counters.server(number, which).get()).sum();
            Some(Traffic { id, connections: sum(OfServer::Connections), failures: sum(OfServer::Failures) })
        });
        places.collect()
    }

    // For the supervisor's messages and for `status`.

    /// Another generation is in force, or other counters are read. Its board
    /// is brought up to date at once.
    pub(super) fn handle_view(&self, view: Arc<View>, boards: Vec<WrittenBoard>) {
        let mut inner = self.lock();
        let config = &view.configs[0].0;
        let mut standing = Standing::new(config, &inner.overrides);
        match &inner.present {
            Some(before) => standing.carry_over(&before.standing),
            None => {
                let own = boards.iter().find(|board| board.config == 0);
                let layout = Layout::of(config);
                if let Some(board) = own.and_then(|own| Board::over(own.region.words(), &layout)) {
                    standing.take_up(&board);
                }
            }
        }
        inner.checks.retain(|id, _| standing.find(id).is_some());
        inner.present = Some(Present { view, standing, boards });
        self.publish(&inner);
        self.changes.send_modify(|count| *count += 1);
    }

    /// Everything that the operator has changed at run time.
    pub(super) fn handle_overrides(&self, overrides: Overrides) {
        let mut inner = self.lock();
        inner.overrides = overrides;
        let Inner { present, overrides, .. } = &mut *inner;
        if let Some(present) = present
            && present.standing.set_overrides(overrides, clock::coarse())
        {
            self.publish(&inner);
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// How everything stands, and what checks say, for `status`.
    pub(super) fn shown(&self) -> (Standing, BTreeMap<PlaceId, Value>) {
        let inner = self.lock();
        let standing = inner.present.as_ref().map(|present| present.standing.clone());
        (standing.unwrap_or_default(), inner.checks.clone())
    }

    /// Writes what changed, and wakes the workers where something did: they
    /// reset sessions of servers that are down, and let in who waits.
    fn publish(&self, inner: &Inner) {
        let Some(present) = &inner.present else { return };
        let mut any = false;
        for board in &present.boards {
            let Some((config, _)) = present.view.configs.get(board.config) else { continue };
            let layout = Layout::of(config);
            let Some(memory) = Board::over(board.region.words(), &layout) else { continue };
            if board.config == 0 {
                any |= present.standing.publish(&memory);
            } else {
                let mut standing = Standing::new(config, &inner.overrides);
                standing.take_up(&memory);
                standing.carry_over(&present.standing);
                any |= standing.publish(&memory);
            }
        }
        if any {
            self.bell.ring();
        }
    }
}

impl Present {
    fn config(&self) -> &Config {
        &self.view.configs[0].0
    }

    /// The counters that are laid out as the present configuration has it.
    fn own_counters(&self) -> impl Iterator<Item = Counters<'_>> {
        let layout = &self.view.configs[0].1;
        let own = self.view.tables.iter().filter(|(table, _)| table.config == 0);
        own.filter_map(move |(_, region)| Counters::over(region.words(), layout))
    }
}

fn is_udp(config: &Config, upstream: &str) -> bool {
    config.listeners.iter().any(|listener| match listener.target {
        config::Target::Upstream(index) => {
            listener.mode == config::Mode::Udp && config.upstreams[index].name == upstream
        }
        config::Target::Service(_) => false,
    })
}
