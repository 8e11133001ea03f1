//! Health checks.

mod command;
mod dial;
mod exchange;
mod http;
mod probe;
