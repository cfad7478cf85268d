//! The only module that opens, maps, stages and renames files.

pub(crate) mod naming;
pub(crate) mod open;
pub(crate) mod staging;

pub use naming::{NewFolders, RECORD_NAME, check_not_input, check_output, check_output_dir};
pub(crate) use open::list;
pub use open::{available_bytes, map, open, read_text};
pub use staging::{StagedDir, StagedFile, StagedPath, discard_unfinished, write_text};
