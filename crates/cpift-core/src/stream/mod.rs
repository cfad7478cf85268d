//! Passes over large arrays: hashing, exact selection, vector instructions, random numbers.

pub mod hashing;
pub mod random;
pub mod select;
pub mod simd;
