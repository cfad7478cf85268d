//! The only module that opens, maps, stages and renames files.

pub mod naming;
pub mod open;
pub mod staging;

pub use naming::{NewFolders, RECORD_NAME, check_not_input, check_output, check_output_dir};
pub use open::{available_bytes, map, open, read_text, read_text_of, refuse_stand_in};
pub use staging::{StagedDir, StagedFile, StagedPath, create_sized, discard_unfinished, final_name, write_text};
