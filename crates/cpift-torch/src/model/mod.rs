//! Decoder-only language models, leaf to root, under their checkpoints' own names.
//!
//! The trainer calls [`CausalLM::embed`], the blocks one at a time, and the head, so that it can hold, drop or recompute
//! what lies between them.

mod attention;
mod config;
mod decoder;
mod layers;
mod rope;

pub use attention::{Attended, KvCache};
pub use config::{Activation, Family, ModelConfig};
pub(crate) use decoder::to_device;
pub use decoder::{Block, CausalLM, EMBEDDING};
pub use rope::Rope;
