//! Durations and sizes as a person writes them.
