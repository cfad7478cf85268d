//! Formats of the files that the stages exchange.

pub mod checkpoint;
pub mod digest;
pub mod dtype;
pub mod groups;
pub mod json;
pub mod mask;
pub mod names;
pub mod rope;
pub mod safetensors;
pub mod scores;
pub mod svg;
pub mod tasks;
pub mod tokens;
