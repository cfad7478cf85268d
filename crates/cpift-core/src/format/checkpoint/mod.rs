//! Hugging Face checkpoints: folders (single file or shards with an index) and bare safetensors files.

pub mod config;
mod found;
mod prefix;
pub mod reader;
pub mod sidecar;
pub mod writer;

pub use config::{read_config, with_head_of, with_torch_dtype};
pub use reader::{Checkpoint, Excluded, TensorView, check_same_parameters};
pub use sidecar::{SIDECAR_FILES, copy_sidecars};
pub use writer::CheckpointWriter;
