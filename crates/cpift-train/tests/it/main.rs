//! Tests of the program on small models.

mod adding;
mod average;
mod cli;
mod common;
mod isolation;
mod lora;
mod mixture;
mod optim;
mod options;
mod plan;
mod preview;
mod ranks;
mod ranks_bad_input;
mod resume;
mod schedule;
mod signals;
