//! Files and formats of CPI-FT: checkpoints, masks, groups, tasks, scores and provenance.
//!
//! The stages communicate only through files, and this crate defines the formats. It contains no
//! stage logic and does not link libtorch. Its modules form layers; each uses only those listed
//! before it:
//!
//! 1. [`error`], [`log_once`], [`progress`]
//! 2. [`files`]: opening, staging and renaming
//! 3. [`hub`]: the Hugging Face Hub, its cache and downloads
//! 4. [`mod@format`]: file formats
//! 5. [`stream`]: passes over large arrays
//! 6. [`record`]: provenance and the up-to-date rule
//! 7. [`run`]: command line, signals

pub mod error;
pub mod files;
pub mod format;
pub mod hub;
pub mod log_once;
pub mod progress;
pub mod record;
pub mod run;
pub mod stream;

pub use error::{BadInput, Stopped, Usage};
pub use format::checkpoint::{Checkpoint, CheckpointWriter, TensorView};
pub use format::dtype::Dtype;
pub use format::mask::Mask;
pub use format::safetensors::TensorSpec;
