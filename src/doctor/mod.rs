//! What is the matter with this host, this address, this kernel?

pub mod matrix;
