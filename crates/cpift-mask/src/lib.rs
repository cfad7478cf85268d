//! Stage 1 of CPI-FT: the core region of a task, the exact top p % of a model's parameters by the
//! size of their update.
//!
//! | step of `extract` | module |
//! | --- | --- |
//! | flags to a checked plan | `cli` |
//! | open, compare and hash the inputs; cut the parameters into parts that are ranked together | [`inputs`] |
//! | number of elements to choose in each part | `percent` |
//! | the score of each element, chunk by chunk | [`part`] |
//! | guess the threshold of a part from a sample | [`bracket`] |
//! | read the part, write the mask's bits; search exactly where the guess was wrong | [`sweep`] |
//! | header, record, summary | `extract` |
//!
//! `tensors` chooses whole tensors, `random` draws a control, and `stats` shows the density of a
//! mask.

pub mod bracket;
mod cli;
mod extract;
pub mod inputs;
mod output;
pub mod part;
mod percent;
mod random;
mod stats;
pub mod sweep;
mod tensors;

pub use cli::{Args, run};
