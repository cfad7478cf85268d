//! Fuzz targets of all file readers. For any input a reader must not panic, must stay within its
//! memory bound, and must keep the properties that its target checks. `driver/` runs the targets
//! under libFuzzer, `tests/replay.rs` on the inputs in `corpora/`.

mod adapter;
mod bounds;
mod config;
mod data;
mod groups;
mod header;
mod index;
mod mask;
mod recipe;
mod scores;
mod state;
mod tasks;
mod tokenizer;
mod vocabulary;

pub use bounds::clean;

/// Reader with its checks. Takes an input and returns true if the reader accepted it.
pub type Target = fn(&[u8]) -> bool;

/// All targets by name.
pub const TARGETS: [(&str, Target); 13] = [
    ("adapter", adapter::run),
    ("config", config::run),
    ("data", data::run),
    ("groups", groups::run),
    ("header", header::run),
    ("index", index::run),
    ("mask", mask::run),
    ("recipe", recipe::run),
    ("scores", scores::run),
    ("state", state::run),
    ("tasks", tasks::run),
    ("tokenizer", tokenizer::run),
    ("vocabulary", vocabulary::run),
];

/// Returns the target called `name`.
///
/// # Panics
/// If there is none.
pub fn target(name: &str) -> Target {
    TARGETS.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no target {name}")).1
}

/// Splits a packed corpus into its inputs, each preceded by its length as a little-endian u32.
///
/// # Panics
/// If the file is truncated.
pub fn unpack(mut packed: &[u8]) -> Vec<&[u8]> {
    let mut inputs = Vec::new();
    while let Some((length, rest)) = packed.split_first_chunk() {
        let (input, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        inputs.push(input);
        packed = rest;
    }
    assert!(packed.is_empty(), "a truncated corpus");
    inputs
}
