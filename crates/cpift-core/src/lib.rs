//! Files and formats of CPI-FT: checkpoints, masks, groups, tasks, scores and provenance.
//!
//! The stages exchange files only, and this crate is the one place that knows their form. It holds no
//! stage logic and does not link libtorch. Its modules are layers; each uses those above it in this list:
//!
//! 1. [`error`], [`log_once`]
//! 2. [`files`]: opening, staging and renaming
//! 3. [`format`]: what is inside the files
//! 4. [`stream`]: passes over large arrays
//! 5. [`record`]: provenance and the up-to-date rule
//! 6. [`run`]: command line, signals, progress

pub mod error;
pub mod files;
pub mod format;
pub mod log_once;
pub mod record;
pub mod run;
pub mod stream;

pub use error::{BadInput, Stopped, Usage};
pub use format::checkpoint::{Checkpoint, CheckpointWriter, TensorView};
pub use format::dtype::Dtype;
pub use format::mask::Mask;
pub use format::safetensors::TensorSpec;
