//! A hook for tests of an upgrade: a new image that misbehaves.
//!
//! `$EVENKEEL_TEST_UPGRADE` names a file; what is written there is the step at
//! which whoever asks is to fail. Two copies of one program differ in nothing
//! else. A release build does not know it.

/// Whether this step is to fail.
#[cfg(debug_assertions)]
pub fn is_told(step: &str) -> bool {
    let Some(file) = std::env::var_os("EVENKEEL_TEST_UPGRADE") else { return false };
    std::fs::read_to_string(file).is_ok_and(|told| told.trim() == step)
}

/// Never.
#[cfg(not(debug_assertions))]
pub fn is_told(_: &str) -> bool {
    false
}
