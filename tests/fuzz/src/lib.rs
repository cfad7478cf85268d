//! What every reader of files holds to, whatever the bytes: no panic, no more memory than its
//! bound, and the properties that each target names. `driver/` gives the targets to libFuzzer;
//! `tests/replay.rs` runs them over the inputs in `corpora/`.

mod bounds;
mod config;
pub mod corpus;
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

pub use bounds::clean;

/// A reader with its checks, run on the bytes of an input; whether it was read, not refused.
pub type Target = fn(&[u8]) -> bool;

/// All targets by their names.
pub const TARGETS: [(&str, Target); 11] = [
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
];

/// The target called `name`.
///
/// # Panics
/// When there is none.
pub fn target(name: &str) -> Target {
    TARGETS.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no target {name}")).1
}
