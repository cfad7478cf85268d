//! Files and formats of CPI-FT: checkpoints, masks, groups, tasks, scores and provenance.
//!
//! Everything the six stages exchange is a file, and this crate is the one place that knows its form. It holds no
//! stage logic and does not link libtorch.

pub mod checkpoint;
pub mod cli;
pub mod density;
pub mod error;
pub mod files;
pub mod groups;
pub mod json;
pub mod mask;
pub mod once;
pub mod progress;
pub mod provenance;
pub mod safetensors;
pub mod scores;
pub mod select;
pub mod signals;
pub mod simd;
pub mod stale;
pub mod svg;
pub mod tasks;

pub use checkpoint::{Checkpoint, CheckpointWriter, Dtype, TensorSpec, TensorView};
pub use error::{BadInput, Stopped, Usage};
pub use mask::Mask;
