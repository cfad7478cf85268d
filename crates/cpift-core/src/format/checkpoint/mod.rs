//! Hugging Face checkpoints: directories (one file, or shards with an index) and bare safetensors
//! files.

mod adapter;
mod adapter_files;
mod derive;
mod diagnose;
pub(crate) mod layout;
mod open;
pub(crate) mod reader;
pub(crate) mod sidecar;

pub use adapter::{LoraFile, LoraPair, model_of, read_lora};
pub use adapter_files::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Factor, PeftConfig, peft_names, write_factors};
pub use derive::{Row, Rows};
pub use layout::{CheckpointWriter, Layout};
pub use open::{check_readable, quantization, without_quantization};
pub use reader::{Checkpoint, Excluded, TensorView, check_same_parameters};
pub use sidecar::{OtherFiles, copy_sidecars, is_sidecar, read_config, with_head_of, with_torch_dtype};
