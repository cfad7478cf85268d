//! Files and formats of CPI-FT: checkpoints, masks, groups, tasks, scores and provenance.
//!
//! The stages communicate only through files, and this crate defines the formats. It contains no
//! stage logic and does not link libtorch. Its modules form layers; each uses only those listed
//! before it:
//!
//! 1. [`error`], [`log_once`], [`closest`]
//! 2. [`files`]: opening, staging and renaming
//! 3. [`mod@format`]: file formats
//! 4. [`stream`]: passes over large arrays
//! 5. [`record`]: provenance and the up-to-date rule
//! 6. [`run`]: command line, signals, progress

pub mod closest;
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
