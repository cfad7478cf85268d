//! Decoder-only language models, leaf to root, with the names of their checkpoints: `families` has
//! their differences, `config` and `config_fields` read config.json, `layers` has the leaves, then
//! `attention` with the key-value cache and `experts`, then `decoder` with Block and CausalLM.
//!
//! The trainer calls [`CausalLM::embed`], the blocks one at a time, and the head, so that it can
//! keep, drop or recompute the activations between them.

mod attention;
mod config;
mod config_fields;
mod decoder;
mod experts;
mod families;
mod layers;

pub use attention::{Attended, KvCache};
pub use config::{Activation, EMBEDDING, ModelConfig};
pub use config_fields::ExpertsConfig;
pub(crate) use decoder::CachedRows;
pub use decoder::{Block, CausalLM};
pub(crate) use experts::Routed;
pub use families::{BlockNorms, Family, NormWeight, QkNorm};
pub use layers::{LowRank, Rope};
