//! Tests of the program and of its library on small models.

mod adding;
mod cli;
mod common;
mod figures;
mod gsm8k;
mod join;
mod judge;
mod judge_failures;
mod judge_server;
mod metrics;
mod prompts;
mod ranks;
