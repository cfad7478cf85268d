//! Run-time support of the programs: address space, command line, signals, progress bars.

pub mod address_space;
pub mod cli;
mod config;
pub mod signals;

pub use crate::progress;
