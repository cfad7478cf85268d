//! Tests of the program and of its library.

mod cli;
mod common;
mod ends;
mod extract;
mod fisher;
mod inputs;
mod objects;
mod property;
mod random;
mod stats;
mod sweep;
mod tensors;
mod ties;
