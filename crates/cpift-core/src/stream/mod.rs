//! Passes over large arrays: hashing, exact top-k selection, ties, SIMD dispatch, random numbers.

// First: the modules after it may use its macro.
#[macro_use]
pub mod simd;

pub mod cuts;
pub mod hashing;
pub mod random;
pub mod select;
pub mod ties;
