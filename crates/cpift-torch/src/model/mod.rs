//! Decoder-only language models, leaf to root, with the names of their checkpoints: `families` has
//! their differences, `config` and `expert_fields` read config.json, `layers` has the leaves,
//! `cache` keys and values, then `attention` and `experts`, then `decoder` with Block and CausalLM.
//!
//! The trainer calls [`CausalLM::embed`], the blocks one at a time, and the head, so that it can
//! keep, drop or recompute the activations between them.

mod attention;
mod cache;
mod config;
mod config_fields;
mod decoder;
mod expert_fields;
mod experts;
mod families;
mod layers;

pub use attention::Attended;
pub use cache::KvCache;
pub use config::{Activation, EMBEDDING, ModelConfig};
pub use decoder::{Block, CausalLM};
pub use expert_fields::ExpertsConfig;
pub(crate) use experts::Routed;
pub use families::{BlockNorms, Family, NormWeight, QkNorm};
pub use layers::Rope;
