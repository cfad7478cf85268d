//! Decoder-only language models, leaf to root, under their checkpoints' own names.
//!
//! The trainer calls [`Llama::embed`], the blocks one at a time, and the head, so that it can hold, drop or recompute
//! what lies between them.

mod config;
mod llama;
mod rope;

pub use config::LlamaConfig;
pub use llama::{Attended, Block, KvCache, Llama};
pub use rope::{Rope, RopeScaling};
