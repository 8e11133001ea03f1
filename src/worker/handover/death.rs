//! A worker that is killed in the middle of a hand-over, for the tests of what
//! is left of it then. Not in a release build.
//!
//! `$EVENKEEL_TEST_DIE` names a file. The worker that comes to the moment
//! which is written there takes the file away and kills itself.

/// The moments of a bundle's way.
pub const RECEIVED: &str = "received";
pub const TAKEN: &str = "taken";
pub const SENT: &str = "sent";
pub const ACKNOWLEDGED: &str = "acknowledged";

/// Called at each of them.
pub fn die_if_told(moment: &str) {
    if !cfg!(debug_assertions) {
        return;
    }
    let Some(file) = std::env::var_os("EVENKEEL_TEST_DIE") else { return };
    let told = std::fs::read_to_string(&file).unwrap_or_default();
    if told.trim() == moment && std::fs::remove_file(&file).is_ok() {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}
