//! End to end through the binaries of all stages, and the rules of the house.

mod adapters;
mod add_task;
mod config;
mod demo;
mod experiments;
mod help;
mod house;
mod hub;
mod hub_download;
mod limits;
mod needs;
mod pipeline;
mod provenance;
mod storm;
mod up_to_date;
mod writers;
