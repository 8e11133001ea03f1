#[allow(dead_code)]
pub(super) fn step() {}
