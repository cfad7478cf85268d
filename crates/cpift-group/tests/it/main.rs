//! Tests of the program and of its library.

mod cli;
mod common;
mod grouping;
mod layers;
mod partition;
mod ties;
