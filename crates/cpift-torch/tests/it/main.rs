//! Training, generation and ranks, beside what transformers and PyTorch compute.

mod adamw_8bit;
mod dist;
mod freeze;
mod generate;
mod golden;
mod hub_models;
mod importance;
mod lora;
mod parity;
mod schedule;
mod training;
