//! Stage 1 of CPI-FT: the core region of a task, the exact top p % of a model's parameters by the
//! size of their update.
//!
//! | step of `extract` | module |
//! | --- | --- |
//! | flags to a checked plan | `cli` |
//! | open, compare and hash the inputs; cut the parameters into parts that are ranked together | [`inputs`] |
//! | number of elements to choose in each part | `rules` |
//! | the score of each element, chunk by chunk | [`part`] |
//! | guess the threshold of a part from a sample | [`sweep::guess`] |
//! | read the part, write the mask's bits; search exactly where the guess was wrong | [`sweep`] |
//! | flags of the elements chosen among equals | `output` |
//! | header, record, summary | `extract` |
//!
//! `rules` also has the selections of `extract` and `tall` that are not the top p % of single
//! elements. `tensors` chooses whole tensors, `random` draws a control, `sets` combines masks,
//! `apply` keeps a part of a change, `convert` reads and writes boolean arrays, and `stats` shows
//! the density of a mask. `vocabulary` matches rows of embeddings by token if two checkpoints have
//! other tokens.

mod apply;
mod cli;
mod convert;
mod extract;
pub mod inputs;
mod output;
pub mod part;
mod random;
mod rules;
mod sets;
mod stats;
pub mod sweep;
mod tensors;
mod vocabulary;

pub use cli::{Args, run};
