//! Whether one server is up, from what its checks and its traffic said.
//!
//! ```text
//!            first check, or `fall` failures in a row
//!      Up  ------------------------------------------>  Down
//!       ^ ^--- `rise` successes in a row --------------/ |
//!       |        (twice, 4, 8 times as many while it     |
//!       |         goes up and down)                      |
//!     Trial <--- without checks: after a rest -----------/
//!        \----- one failure -----------------------------^
//! ```
//!
//! A server counts as up until the first check says otherwise. One that keeps
//! changing is told once as flapping and then again when it is steady, not at
//! each change. Where nothing checks a server that its traffic took down, it
//! rests, longer each time, and is then tried: the first failure takes it down
//! again, the first success makes it up.
//!
//! Owned by the steward, one for each place that servers may be at. Pure: time
//! comes in, what is to be done and to be told goes out. Bounded: a few
//! numbers. It ends with its place.

mod gap;
mod pace;
#[cfg(test)]
mod tests;

pub use gap::Gap;
pub use pace::Pace;

/// Milliseconds of the monotonic clock.
type Millis = u64;

/// From so many falls without a quiet time on, a server flaps.
const FLAPPING_FALLS: u32 = 3;
/// `rise` is doubled with each further fall, so often at most.
const MOST_RISE_DOUBLINGS: u32 = 3;
/// So many times the shortest way down and up again without a change of mind
/// make a quiet time: longer than a fully damped way up.
const QUIET_ROUNDS: u64 = 15;
/// No quiet time is shorter, however short the interval is.
const SHORTEST_QUIET: Millis = 30_000;
/// The first rest of a server that nothing checks, in intervals.
const REST_INTERVALS: u64 = 5;
/// A rest is doubled with each further fall, so often at most.
const MOST_REST_DOUBLINGS: u32 = 5;

/// What a server's upstream asks of its health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Something checks it; otherwise its traffic alone speaks.
    pub checked: bool,
    /// Failures of its traffic count.
    pub passive: bool,
    /// The time between two checks.
    pub interval: Millis,
    /// Successes in a row that bring it up.
    pub rise: u32,
    /// Failures in a row that take it down.
    pub fall: u32,
}

/// What there is to say of a server to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It is down from now on.
    Down,
    /// It is up from now on.
    Up,
    /// It has gone down so often that its changes are not told any more.
    Flapping {
        /// How often.
        falls: u32,
    },
    /// It flapped, and has been up, or down, for long enough to believe it.
    Steady {
        /// Which of the two.
        up: bool,
    },
}

/// What follows from something that happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// It is up, or down, from now on; `None` = as before.
    pub verdict: Option<bool>,
    /// What to tell.
    pub news: Option<News>,
}

/// The health of one server.
#[derive(Clone, Debug)]
pub struct Health {
    rules: Rules,
    up: bool,
    /// Nothing has spoken yet: the first check decides alone.
    unheard: bool,
    /// Brought up to be tried, without a success yet.
    on_trial: bool,
    /// Since a pause of this machine no check has come in.
    after_gap: bool,
    /// Checks in a row.
    successes: u32,
    failures: u32,
    /// Failures of traffic since its last success.
    traffic_failures: u32,
    /// Since the last quiet time.
    falls: u32,
    flapping: bool,
    /// What people were told last.
    told_up: bool,
    since: Millis,
    /// When something last spoke against what was said before it.
    unsettled_at: Millis,
    last_ok: bool,
}

impl Health {
    /// A server of which nothing is known: up until something says otherwise.
    pub fn new(rules: Rules, now: Millis) -> Health {
        Health {
            rules,
            up: true,
            unheard: true,
            on_trial: false,
            after_gap: false,
            successes: 0,
            failures: 0,
            traffic_failures: 0,
            falls: 0,
            flapping: false,
            told_up: true,
            since: now,
            unsettled_at: now,
            last_ok: true,
        }
    }

    /// A server that an earlier process has judged already.
    pub fn resume(rules: Rules, up: bool, now: Millis) -> Health {
        let falls = u32::from(!up);
        Health { up, told_up: up, last_ok: up, unheard: false, falls, ..Health::new(rules, now) }
    }

    /// The configuration asks something else from now on; the state stays.
    pub fn handle_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// A check came in.
    pub fn handle_check(&mut self, ok: bool, now: Millis) -> Outcome {
        // The network may be back later than the program is.
        if std::mem::take(&mut self.after_gap) && !ok {
            return Outcome::default();
        }
        self.settle(ok, now);
        let first = std::mem::take(&mut self.unheard);
        if ok {
            self.successes = self.successes.saturating_add(1);
            self.failures = 0;
            let enough = self.successes >= self.rise_needed();
            if self.up { self.confirm(now) } else { self.rise_if(enough, now) }
        } else {
            self.failures = self.failures.saturating_add(1);
            self.successes = 0;
            self.fall_if(first || self.failures >= self.rules.fall, now)
        }
    }

    /// What its traffic met since the last call: connects that succeeded and
    /// that failed. In which order is not known, so any success stands between
    /// the failures.
    pub fn handle_traffic(&mut self, successes: u64, failures: u64, now: Millis) -> Outcome {
        if !self.rules.passive || !self.up || (successes == 0 && failures == 0) {
            return self.handle_time(now);
        }
        if successes > 0 {
            self.traffic_failures = 0;
            if !self.rules.checked {
                self.settle(true, now);
                return self.confirm(now);
            }
            return self.handle_time(now);
        }
        let failures = u32::try_from(failures).unwrap_or(u32::MAX);
        self.traffic_failures = self.traffic_failures.saturating_add(failures);
        self.settle(false, now);
        self.fall_if(self.on_trial || self.traffic_failures >= self.rules.fall, now)
    }

    /// Time has passed.
    pub fn handle_time(&mut self, now: Millis) -> Outcome {
        if let Some(due) = self.trial_at()
            && due <= now
        {
            self.up = true;
            self.on_trial = true;
            self.since = now;
            self.unsettled_at = now;
            self.traffic_failures = 0;
            // Not told: nobody knows yet whether it is true.
            return Outcome { verdict: Some(true), news: None };
        }
        let quiet = now.saturating_sub(self.unsettled_at) >= self.quiet();
        // A rest proves nothing; a trial that nobody used proves little, but
        // then nobody is hurt either.
        let rests = !self.rules.checked && !self.up;
        if !quiet || rests || self.falls == 0 {
            return Outcome::default();
        }
        self.falls = 0;
        self.on_trial = false;
        let flapped = std::mem::take(&mut self.flapping);
        let news = match (flapped, self.told_up == self.up) {
            (true, _) => Some(News::Steady { up: self.up }),
            (false, true) => None,
            (false, false) => Some(if self.up { News::Up } else { News::Down }),
        };
        self.told_up = self.up;
        Outcome { verdict: None, news }
    }

    /// The machine was asleep, or this process did not run, for a while: what
    /// was counted before means nothing, and the first round after it only
    /// counts in the server's favour.
    pub fn handle_gap(&mut self, now: Millis) {
        self.successes = 0;
        self.failures = 0;
        self.traffic_failures = 0;
        self.after_gap = true;
        self.unsettled_at = now;
    }

    /// When it is to be tried again, where nothing checks it.
    pub fn trial_at(&self) -> Option<Millis> {
        let doublings = self.falls.saturating_sub(1).min(MOST_REST_DOUBLINGS);
        let rest = (self.rules.interval.max(1) * REST_INTERVALS) << doublings;
        (!self.rules.checked && !self.up).then_some(self.since + rest)
    }

    /// Whether it may get traffic.
    pub fn is_up(&self) -> bool {
        self.up
    }

    /// Whether it is up to be tried, and has not proved itself.
    pub fn is_on_trial(&self) -> bool {
        self.on_trial
    }

    /// Whether its changes are not told any more.
    pub fn is_flapping(&self) -> bool {
        self.flapping
    }

    /// When it last went up or down.
    pub fn since(&self) -> Millis {
        self.since
    }

    /// Checks that succeeded in a row, and how many bring it up.
    pub fn rising(&self) -> (u32, u32) {
        (self.successes, self.rise_needed())
    }

    /// Failures of its traffic in a row that are counted against it.
    pub fn traffic_failures(&self) -> u32 {
        self.traffic_failures
    }

    /// Failures in a row, of checks or of traffic, and how many take it down.
    pub fn falling(&self) -> (u32, u32) {
        (self.failures.max(self.traffic_failures), self.rules.fall)
    }

    /// The more often it fell, the longer it has to stand before it is
    /// believed.
    fn rise_needed(&self) -> u32 {
        let doublings = (self.falls + 1).saturating_sub(FLAPPING_FALLS).min(MOST_RISE_DOUBLINGS);
        self.rules.rise.max(1).saturating_mul(1 << doublings)
    }

    fn quiet(&self) -> Millis {
        let round = u64::from(self.rules.rise.saturating_add(self.rules.fall)) * self.rules.interval;
        (round * QUIET_ROUNDS).max(SHORTEST_QUIET)
    }

    /// Notes that something spoke, and whether it said the same as before.
    fn settle(&mut self, ok: bool, now: Millis) {
        if ok != self.last_ok {
            self.unsettled_at = now;
        }
        self.last_ok = ok;
    }

    /// It is up and something says so.
    fn confirm(&mut self, now: Millis) -> Outcome {
        self.traffic_failures = if self.rules.checked { self.traffic_failures } else { 0 };
        if std::mem::take(&mut self.on_trial) && !self.told_up && !self.flapping {
            self.told_up = true;
            return Outcome { verdict: None, news: Some(News::Up) };
        }
        self.handle_time(now)
    }

    fn rise_if(&mut self, enough: bool, now: Millis) -> Outcome {
        if !enough || self.up {
            return self.handle_time(now);
        }
        self.change(true, now);
        if self.flapping {
            return Outcome { verdict: Some(true), news: None };
        }
        self.told_up = true;
        Outcome { verdict: Some(true), news: Some(News::Up) }
    }

    fn fall_if(&mut self, enough: bool, now: Millis) -> Outcome {
        if !enough || !self.up {
            return self.handle_time(now);
        }
        self.change(false, now);
        self.falls = self.falls.saturating_add(1);
        // A trial that fails is no change to who was told that it is down.
        let news = match (self.flapping, self.told_up) {
            (true, _) | (false, false) => None,
            (false, true) if self.falls >= FLAPPING_FALLS => {
                self.flapping = true;
                Some(News::Flapping { falls: self.falls })
            }
            (false, true) => Some(News::Down),
        };
        self.told_up = false;
        Outcome { verdict: Some(false), news }
    }

    fn change(&mut self, up: bool, now: Millis) {
        self.up = up;
        self.since = now;
        self.unsettled_at = now;
        self.on_trial = false;
        self.successes = 0;
        self.failures = 0;
        self.traffic_failures = 0;
    }
}
