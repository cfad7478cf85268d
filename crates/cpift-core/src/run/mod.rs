//! Run-time support of the programs: address space, command line, signals, progress bars.

pub mod address_space;
pub mod cli;
mod config;
pub mod progress;
pub mod signals;
