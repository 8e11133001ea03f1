//! What must hold of health, whatever checks and traffic say.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const RULES: Rules = Rules { checked: true, passive: true, interval: 2_000, rise: 2, fall: 3 };

/// Lets checks come in, one an interval; answers what was said and when.
fn check(health: &mut Health, now: &mut Millis, results: &[bool]) -> Vec<Outcome> {
    results
        .iter()
        .map(|&ok| {
            *now += health.rules.interval;
            health.handle_check(ok, *now)
        })
        .collect()
}

fn verdicts(outcomes: &[Outcome]) -> Vec<bool> {
    outcomes.iter().filter_map(|outcome| outcome.verdict).collect()
}

fn news(outcomes: &[Outcome]) -> Vec<News> {
    outcomes.iter().filter_map(|outcome| outcome.news).collect()
}

#[test]
fn a_server_is_up_until_the_first_check_says_otherwise() {
    let mut now = 0;
    let mut health = Health::new(RULES, now);
    assert!(health.is_up());
    let said = check(&mut health, &mut now, &[false]);
    assert_eq!(said, [Outcome { verdict: Some(false), news: Some(News::Down) }]);
    let said = check(&mut health, &mut now, &[true, true]);
    assert_eq!((verdicts(&said), news(&said)), (vec![true], vec![News::Up]));
}

#[test]
fn one_that_was_judged_before_is_not_judged_by_its_first_check() {
    let mut now = 0;
    let mut health = Health::resume(RULES, true, now);
    assert!(verdicts(&check(&mut health, &mut now, &[false, false])).is_empty());
    assert_eq!(verdicts(&check(&mut health, &mut now, &[false])), [false]);
    let mut health = Health::resume(RULES, false, now);
    assert!(!health.is_up());
    assert_eq!(news(&check(&mut health, &mut now, &[true, true])), [News::Up]);
}

#[test]
fn failures_of_traffic_take_it_down_and_checks_bring_it_back() {
    let mut now = 0;
    let mut health = Health::new(RULES, now);
    check(&mut health, &mut now, &[true]);
    assert_eq!(health.handle_traffic(0, 2, now), Outcome::default());
    // A success between them.
    assert_eq!(health.handle_traffic(1, 5, now), Outcome::default());
    assert_eq!(health.handle_traffic(0, 2, now), Outcome::default());
    assert_eq!(health.handle_traffic(0, 1, now).verdict, Some(false));
    assert_eq!(verdicts(&check(&mut health, &mut now, &[true, true])), [true]);
    let mut deaf = Health::new(Rules { passive: false, ..RULES }, now);
    assert_eq!(deaf.handle_traffic(0, 1000, now), Outcome::default());
}

#[test]
fn without_checks_a_server_comes_back_to_be_tried_after_longer_and_longer_rests() {
    let rules = Rules { checked: false, ..RULES };
    let mut health = Health::new(rules, 0);
    let down = health.handle_traffic(0, 3, 1_000);
    assert_eq!(down, Outcome { verdict: Some(false), news: Some(News::Down) });
    let mut rests = Vec::new();
    let mut now = 1_000;
    for _ in 0..7 {
        let due = health.trial_at().unwrap();
        assert_eq!(health.handle_time(due - 1), Outcome::default());
        assert_eq!(health.handle_time(due), Outcome { verdict: Some(true), news: None });
        rests.push(due - now);
        now = due + 10;
        // One failure is enough, and nobody is told again.
        assert_eq!(health.handle_traffic(0, 1, now), Outcome { verdict: Some(false), news: None });
    }
    assert_eq!(rests, [10_000, 20_000, 40_000, 80_000, 160_000, 320_000, 320_000]);
    let due = health.trial_at().unwrap();
    health.handle_time(due);
    assert!(health.is_on_trial());
    let up = health.handle_traffic(1, 0, due + 5);
    assert_eq!(up, Outcome { verdict: None, news: Some(News::Up) });
    assert!(health.is_up() && !health.is_on_trial());
}

#[test]
fn a_flapping_server_is_told_once_and_told_again_when_it_is_steady() {
    let mut now = 0;
    let mut health = Health::new(RULES, now);
    let mut said = check(&mut health, &mut now, &[true]);
    for _ in 0..100 {
        // Long enough up and down for each to count.
        said.extend(check(&mut health, &mut now, &[false; 3]));
        said.extend(check(&mut health, &mut now, &[true; 16]));
    }
    assert_eq!(verdicts(&said).len(), 200);
    let told = news(&said);
    let first = [News::Down, News::Up, News::Down, News::Up, News::Flapping { falls: 3 }];
    assert_eq!(told, first);
    assert!(health.is_flapping());
    let said = check(&mut health, &mut now, &[true; 75]);
    assert_eq!(news(&said), [News::Steady { up: true }]);
    assert!(!health.is_flapping());
    let said = check(&mut health, &mut now, &[false; 3]);
    assert_eq!(news(&said), [News::Down]);
}

#[test]
fn a_pause_of_the_machine_gives_a_fresh_round() {
    let mut now = 0;
    let mut health = Health::new(Rules { fall: 2, ..RULES }, now);
    check(&mut health, &mut now, &[true, false]);
    health.handle_gap(now);
    assert!(verdicts(&check(&mut health, &mut now, &[false, false])).is_empty());
    assert_eq!(verdicts(&check(&mut health, &mut now, &[false])), [false]);
    health.handle_gap(now);
    assert_eq!(verdicts(&check(&mut health, &mut now, &[true, true])), [true]);
}

#[test]
fn a_gap_is_a_jump_of_the_sleeping_clock_or_a_late_look() {
    let mut gap = Gap::new(1_000, 50_000);
    assert!(!gap.look(1_500, 50_500));
    assert!(!gap.look(5_000, 54_000), "a loaded machine");
    assert!(gap.look(5_500, 654_000), "it slept");
    assert!(!gap.look(6_000, 654_500));
    assert!(gap.look(20_000, 668_500), "it was stopped");
}

proptest! {
    /// Down only after `fall` failures in a row (or the first check), up only
    /// after `rise` successes in a row, and after eight times as many for sure.
    #[test]
    fn verdicts_follow_runs(
        rise in 1u32..6, fall in 1u32..6, results in prop::collection::vec(any::<bool>(), 1..400),
    ) {
        let mut health = Health::new(Rules { rise, fall, ..RULES }, 0);
        let (mut run, mut last, mut now) = (0u32, None, 0);
        for (number, ok) in results.into_iter().enumerate() {
            now += RULES.interval;
            run = if last == Some(ok) { run + 1 } else { 1 };
            last = Some(ok);
            let was_up = health.is_up();
            let outcome = health.handle_check(ok, now);
            prop_assert_eq!(outcome.verdict.is_some(), was_up != health.is_up());
            match (was_up, health.is_up()) {
                (true, false) => prop_assert!(!ok && (run >= fall || number == 0)),
                (false, true) => prop_assert!(ok && run >= rise),
                (true, true) => prop_assert!(ok || run < fall),
                (false, false) => prop_assert!(!ok || run < rise * 8),
            }
        }
    }

    /// However a server behaves, no more than a few lines come in a quiet
    /// time, and what is told alternates.
    #[test]
    fn news_are_few_and_alternate(
        steps in prop::collection::vec((any::<bool>(), 1usize..40), 1..200), checked: bool,
    ) {
        let mut health = Health::new(Rules { checked, ..RULES }, 0);
        let quiet = health.quiet();
        let (mut now, mut told): (Millis, Vec<(Millis, News)>) = (0, Vec::new());
        for (ok, count) in steps {
            for _ in 0..count {
                now += RULES.interval;
                let outcome = match checked {
                    true => health.handle_check(ok, now),
                    false => health.handle_traffic(u64::from(ok), u64::from(!ok), now),
                };
                told.extend(outcome.news.map(|news| (now, news)));
            }
        }
        let mut up = true;
        let mut flapping = false;
        for (_, news) in &told {
            match *news {
                News::Up => { prop_assert!(!up && !flapping); up = true; }
                News::Down => { prop_assert!(up && !flapping); up = false; }
                News::Flapping { falls } => { prop_assert!(falls >= 3 && !flapping); flapping = true; }
                News::Steady { up: now_up } => { prop_assert!(flapping); flapping = false; up = now_up; }
            }
        }
        // Two falls and two rises may be told, then the flapping, then that it
        // is steady: nothing else until a quiet time is over.
        for (at, _) in &told {
            let within = told.iter().filter(|(other, _)| other >= at && *other < at + quiet).count();
            prop_assert!(within <= 7, "{within} lines in {quiet} ms: {told:?}");
        }
    }

    /// No two intervals in a row need be alike, all are within a tenth, and a
    /// seed gives the same ones again.
    #[test]
    fn intervals_jitter_within_a_tenth(seed: u64, millis in 1u64..3_600_000) {
        let interval = Duration::from_millis(millis);
        let (mut one, mut other) = (Pace::new(seed), Pace::new(seed));
        for _ in 0..50 {
            let next = one.next(interval);
            prop_assert_eq!(next, other.next(interval));
            prop_assert!(next >= interval.mul_f64(0.899) && next <= interval.mul_f64(1.101), "{:?}", next);
        }
    }

    /// First checks come within one interval, and early where there are few.
    #[test]
    fn first_checks_are_spread(seed: u64, count in 1usize..2_000, millis in 1u64..100_000) {
        let interval = Duration::from_millis(millis);
        let first = Pace::new(seed).first(count, interval);
        prop_assert!(first <= interval && first <= Duration::from_millis(5 * count as u64));
    }
}

#[test]
fn jitter_spreads_servers_of_one_interval_evenly() {
    // After fifty rounds a thousand servers that began together are spread:
    // fifty sums of ±10 % have a deviation of about 0.41 intervals, so that no
    // tenth of an interval holds more than a few times its share. Seeded, so
    // no chance is involved.
    let interval = Duration::from_secs(2);
    let mut tenths = [0; 10];
    for server in 0..1_000u64 {
        let mut pace = Pace::new(server);
        let at: Duration = (0..50).map(|_| pace.next(interval)).sum();
        tenths[(at.as_millis() % 2_000 / 200) as usize] += 1;
    }
    assert!(tenths.iter().all(|&count| (50..200).contains(&count)), "{tenths:?}");
}
