//! Hugging Face checkpoints: directories (one file, or shards with an index) and bare safetensors
//! files.

mod adapter;
mod derive;
mod diagnose;
mod fp8;
pub(crate) mod layout;
mod open;
pub(crate) mod reader;
pub(crate) mod sidecar;
mod wrappers;
mod writer;

pub use adapter::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, Factor, LoraFile, LoraPair, PeftConfig, model_of, peft_names, read_lora,
    write_factors,
};
pub use derive::{Row, Rows};
pub use fp8::{check_readable, quantization, without_quantization};
pub use layout::Layout;
pub use reader::{Checkpoint, Excluded, TensorView, check_same_parameters};
pub use sidecar::{OtherFiles, copy_sidecars, is_sidecar, read_config, with_head_of, with_torch_dtype};
pub use writer::CheckpointWriter;
