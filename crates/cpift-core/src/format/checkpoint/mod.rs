//! Hugging Face checkpoints: directories (one file, or shards with an index) and bare safetensors
//! files.

mod diagnose;
pub(crate) mod reader;
pub(crate) mod sidecar;
mod wrappers;
mod writer;

pub use reader::{Checkpoint, Excluded, TensorView, check_same_parameters};
pub use sidecar::{copy_sidecars, read_config, with_head_of, with_torch_dtype};
pub use writer::CheckpointWriter;
