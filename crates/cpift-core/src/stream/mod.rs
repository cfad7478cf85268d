//! Passes over large arrays: hashing, exact top-k selection, SIMD dispatch, random numbers.

pub mod hashing;
pub mod random;
pub mod select;
pub mod simd;
