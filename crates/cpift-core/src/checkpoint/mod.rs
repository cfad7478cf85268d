//! Hugging Face checkpoints: folders (single file or shards with an index) and bare safetensors files.

mod config;
mod digest;
mod dtype;
mod found;
mod kinds;
pub mod names;
mod pieces;
mod prefix;
mod reader;
pub mod rope;
mod sidecar;
mod writer;

pub use crate::safetensors::TensorSpec;
pub use config::{read_config, with_head_of, with_torch_dtype};
pub use digest::{Digest, DigestRecord};
pub use dtype::{Dtype, Float, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use kinds::TensorKind;
pub use pieces::PieceHasher;
pub use reader::{Checkpoint, Excluded, TensorView, check_same_parameters};
pub use sidecar::{SIDECAR_FILES, copy_sidecars};
pub use writer::CheckpointWriter;
