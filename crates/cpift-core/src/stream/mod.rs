//! Passes over large arrays: hashing, exact top-k selection, ties, SIMD dispatch, random numbers.

pub mod cuts;
pub mod guess;
pub mod hashing;
pub mod random;
pub mod select;
pub mod simd;
pub mod ties;
