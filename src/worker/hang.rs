//! A worker that hangs or writes nonsense on purpose, for the tests of what is
//! done about it. Not in a release build.
//!
//! `$EVENKEEL_TEST_HANG` names a file. The worker whose slot's number is
//! written there takes the file away and burns CPU for ever; with `corrupt` in
//! front it says of its first session what is not so.

use std::path::PathBuf;

use crate::keep::Keep;

/// Whether and where a worker is told to hang.
#[derive(Debug)]
pub struct Hang {
    slot: usize,
    file: Option<PathBuf>,
}

impl Hang {
    /// As the environment has it.
    pub fn of_environment(slot: usize) -> Hang {
        Hang { slot, file: std::env::var_os("EVENKEEL_TEST_HANG").map(PathBuf::from) }
    }

    /// Called once a turn.
    pub fn spin_if_told(&self, keep: &mut Keep) {
        let Some(file) = &self.file else { return };
        let told = std::fs::read_to_string(file).unwrap_or_default();
        if told.trim() == format!("corrupt {}", self.slot) && std::fs::remove_file(file).is_ok() {
            keep.preface(0, 7);
        }
        if told.trim() == self.slot.to_string() && std::fs::remove_file(file).is_ok() {
            loop {
                std::hint::spin_loop();
            }
        }
    }
}
