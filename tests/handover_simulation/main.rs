//! Hand-overs in a pretend world, with a death at every step.
//!
//! The decisions of both sides are the product's own (`handover::protocol`);
//! the processes, the channels with their ways to fail, the supervisor and the
//! clock are a model, driven by a seed. Each seed is run once as it is, then
//! once for each of its steps and each process with that one dying there, and
//! once more with a second death soon after. After every step each item has
//! one owner that lives, and no two processes poll it. What fails names its
//! seed and its deaths. `EVENKEEL_SOAK=10` tries ten times as many seeds.
//!
//! Not here: what parks over a restart, the gate in front of clients'
//! datagrams, and the supervisor's own decisions beyond the next receiver.

mod channel;
mod dice;
mod world;

use dice::Dice;
use world::{Flaw, World};

/// No run of this world takes longer.
const STEP_LIMIT: usize = 20_000;

/// Who dies.
#[derive(Clone, Copy, Debug)]
enum Party {
    Sender,
    Getter(usize),
}

/// Runs a seed with these deaths; how many steps it took.
fn run(seed: u64, deaths: &[(usize, Party)], flaw: Flaw) -> Result<usize, String> {
    let mut world = World::new(seed, flaw);
    for step in 0..STEP_LIMIT {
        for (_, party) in deaths.iter().filter(|(at, _)| *at == step) {
            world.kill(match party {
                Party::Sender => 0,
                Party::Getter(getter) => world.getters[getter % world.getters.len()],
            });
        }
        if world.is_over() && deaths.iter().all(|(at, _)| *at <= step) {
            world.check_end().map_err(|why| format!("at the end: {why}"))?;
            return Ok(step);
        }
        world.step();
        world.check().map_err(|why| format!("step {step}: {why}"))?;
    }
    Err("it does not end".into())
}

/// Every death of a seed; how many runs that were.
fn try_all(seed: u64, flaw: Flaw) -> Result<usize, String> {
    let named = |deaths: &[(usize, Party)]| {
        run(seed, deaths, flaw).map_err(|why| format!("seed {seed}, deaths {deaths:?}: {why}"))
    };
    let steps = named(&[])?;
    let mut dice = Dice(!seed);
    let mut runs = 1;
    for step in 0..=steps {
        for party in [Party::Sender, Party::Getter(0), Party::Getter(1)] {
            named(&[(step, party)])?;
            let second = [Party::Sender, Party::Getter(0), Party::Getter(1)][dice.roll(3) as usize];
            named(&[(step, party), (step + 1 + dice.roll(40) as usize, second)])?;
            runs += 2;
        }
    }
    Ok(runs)
}

#[test]
fn whoever_dies_at_whatever_step_costs_what_it_had_and_no_more() {
    let soak: u64 = std::env::var("EVENKEEL_SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let runs: usize = (0..40 * soak).map(|seed| try_all(seed, Flaw::None).unwrap()).sum();
    println!("{runs} runs of {} seeds", 40 * soak);
}

#[test]
fn what_is_done_wrongly_is_found() {
    for flaw in [
        Flaw::ForgetsBeforeTaken,
        Flaw::PollsBeforeTaken,
        Flaw::PollsWhatCouldNotBeSaid,
        Flaw::DoesNotCut,
        Flaw::IgnoresLateAnswers,
    ] {
        let found = (0..50).find_map(|seed| try_all(seed, flaw).err());
        println!("{flaw:?}: {}", found.unwrap_or_else(|| panic!("{flaw:?} was not found")));
    }
}
