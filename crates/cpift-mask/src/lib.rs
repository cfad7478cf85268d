//! Stage 1 of CPI-FT: the core region of a task, the exact top p % of a model's parameters by how far they moved.
//!
//! The order of work: [`Percent`] says how many elements are chosen, [`parts`] cuts the parameters into the parts they
//! compete in, [`select`] finds each part's threshold, [`emit`] writes the bits.

mod args;
pub mod emit;
mod extract;
pub mod parts;
mod percent;
pub mod select;
pub mod stats;

pub use args::{Args, run};
pub use extract::{Summary, extract};
pub use percent::Percent;
