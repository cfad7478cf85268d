//! Run-time support of the programs: command line, signals, progress bars.

pub mod cli;
mod config;
pub mod progress;
pub mod signals;
