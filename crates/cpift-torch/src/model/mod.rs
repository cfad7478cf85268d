//! Decoder-only language models, leaf to root, under their checkpoints' own names.
//!
//! The trainer calls [`CausalLM::embed`], the blocks one at a time, and the head, so that it can hold, drop or recompute
//! what lies between them.

mod config;
mod decoder;
mod rope;

pub use config::ModelConfig;
pub use decoder::{Attended, Block, CausalLM, KvCache};
pub use rope::{Rope, RopeScaling};
