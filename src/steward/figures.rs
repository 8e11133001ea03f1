//! The sockets' queues as the supervisor last saw them.
//!
//! The supervisor is asked when somebody wants to know and what is here is
//! older than `FRESH`, and not again before it answered or `PATIENCE` is over:
//! however many callers there are, it looks a few times a second at most. One
//! that does not answer costs a caller `PATIENCE` once in a while; the last
//! figures stand until then.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::control::ListenerFigures;

/// How old figures may be.
const FRESH: Duration = Duration::from_millis(200);
/// How long new ones are waited for.
const PATIENCE: Duration = Duration::from_millis(300);

/// The last figures, and whether new ones are on their way.
#[derive(Debug, Default)]
pub struct Figures {
    state: Mutex<State>,
    came: Condvar,
}

#[derive(Debug, Default)]
struct State {
    latest: Arc<Vec<ListenerFigures>>,
    came_at: Option<Instant>,
    asked_at: Option<Instant>,
}

impl Figures {
    /// New ones have come.
    pub fn handle_come(&self, figures: Vec<ListenerFigures>) {
        let mut state = self.state.lock().expect("no thread panics with it");
        *state = State { latest: Arc::new(figures), came_at: Some(Instant::now()), asked_at: None };
        self.came.notify_all();
    }

    /// Figures of now, as far as they can be had; `ask` asks for new ones.
    pub fn fresh(&self, ask: impl FnOnce()) -> Arc<Vec<ListenerFigures>> {
        let young = |at: Option<Instant>, age| at.is_some_and(|at| at.elapsed() < age);
        let mut state = self.state.lock().expect("no thread panics with it");
        if young(state.came_at, FRESH) {
            return Arc::clone(&state.latest);
        }
        if state.asked_at.is_none() || !young(state.asked_at, 4 * PATIENCE) {
            state.asked_at = Some(Instant::now());
            ask();
        } else if !young(state.asked_at, PATIENCE) {
            // Somebody has waited in vain: once is enough.
            return Arc::clone(&state.latest);
        }
        let before = state.came_at;
        let (state, _) = self
            .came
            .wait_timeout_while(state, PATIENCE, |state| state.came_at == before)
            .expect("no thread panics with it");
        Arc::clone(&state.latest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_supervisor_is_asked_once_and_waited_for_once() {
        let (figures, mut asked) = (Figures::default(), 0);
        let begin = Instant::now();
        for _ in 0..20 {
            assert!(figures.fresh(|| asked += 1).is_empty());
        }
        assert_eq!(asked, 1);
        assert!(begin.elapsed() >= PATIENCE);
    }

    #[test]
    fn what_came_is_given_to_everybody_for_a_while() {
        let (figures, mut asked) = (Figures::default(), 0);
        figures.handle_come(vec![ListenerFigures::default()]);
        assert_eq!(figures.fresh(|| asked += 1).len(), 1);
        assert_eq!(asked, 0);
    }
}
