//! A question that every worker answers for itself: which sessions it has.
//!
//! The supervisor passes the question on, gathers the answers (sealed
//! memories that it does not read) and hands them to the steward together.
//! One that is not answered in time is answered without the silent workers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mio::Token;

use super::Supervisor;
use crate::control::sessions::Query;
use crate::control::{ToSteward, ToWorker};
use crate::sys::clock::{self, Millis};

/// A worker that hangs keeps nobody waiting longer, in milliseconds.
const PATIENCE: Millis = 2_000;
/// Questions that may be open at once; each holds a descriptor a worker.
const MOST: usize = 8;

/// One question and what came of it.
#[derive(Debug)]
pub struct Inquiry {
    id: u64,
    waits_for: Vec<Token>,
    answers: Vec<OwnedFd>,
    until: Millis,
}

impl Inquiry {
    /// When it is answered without the rest.
    pub fn deadline(&self) -> Millis {
        self.until
    }
}

impl Supervisor {
    /// Asks every worker that serves or finishes something.
    pub(super) fn ask_workers(&mut self, id: u64, query: &Query) -> Result<(), String> {
        if self.inquiries.len() >= MOST {
            return Err("too many such questions at once: try again".into());
        }
        let mut waits_for = Vec::new();
        for slot in self.slots.iter_mut().chain(&mut self.retiring) {
            for process in slot.processes() {
                process.tell(&ToWorker::Sessions { id, query: query.clone() }, &[]);
                waits_for.push(process.token);
            }
        }
        let until = clock::coarse() + PATIENCE;
        self.inquiries.push(Inquiry { id, waits_for, answers: Vec::new(), until });
        self.end_inquiries();
        Ok(())
    }

    /// A worker answered.
    pub(super) fn handle_found(&mut self, token: Token, id: u64, fds: Vec<OwnedFd>) {
        if let Some(inquiry) = self.inquiries.iter_mut().find(|inquiry| inquiry.id == id) {
            inquiry.waits_for.retain(|waiting| *waiting != token);
            inquiry.answers.extend(fds);
        }
        self.end_inquiries();
    }

    /// A process that is gone says nothing more.
    pub(super) fn forget_in_inquiries(&mut self, token: Token) {
        for inquiry in &mut self.inquiries {
            inquiry.waits_for.retain(|waiting| *waiting != token);
        }
        self.end_inquiries();
    }

    /// Hands over what is complete or due.
    pub(super) fn end_inquiries(&mut self) {
        let now = clock::coarse();
        let over = |inquiry: &Inquiry| inquiry.waits_for.is_empty() || inquiry.until <= now;
        let (over, open) = std::mem::take(&mut self.inquiries).into_iter().partition(over);
        self.inquiries = open;
        for Inquiry { id, waits_for, answers, .. } in over {
            let fds: Vec<BorrowedFd> = answers.iter().map(AsFd::as_fd).collect();
            self.steward.send(&ToSteward::Found { id, silent: waits_for.len() }, &fds);
        }
    }

    /// Hands over what has come so far: another image will not know of them.
    pub(super) fn cut_inquiries(&mut self) {
        self.inquiries.iter_mut().for_each(|inquiry| inquiry.until = 0);
        self.end_inquiries();
    }

    /// When the first is due.
    pub(super) fn inquiry_deadline(&self) -> Option<Millis> {
        self.inquiries.iter().map(Inquiry::deadline).min()
    }
}
