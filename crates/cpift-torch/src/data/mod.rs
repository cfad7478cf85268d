//! From data files to batches.
//!
//! | step | where |
//! | --- | --- |
//! | a file (.jsonl, .json, .parquet) to its rows' fields | `files` |
//! | fields to a conversation: a known format, or templates of tasks.toml | `formats`, `layout` |
//! | a conversation checked, with its place in the file | `rows`, `place` |
//! | a conversation to token ids, the loss on the assistant's | `example` |
//! | examples to batches: shuffling, sampling, joining | `feeder`, `batch` |

mod batch;
mod example;
mod feeder;
mod files;
mod formats;
mod layout;
mod place;
mod rows;

pub use batch::{Batch, Sampler, balanced_sample};
pub use example::{Encoded, Example, Overlong, Tokenised, digest, encode_rows, report, tokenise};
pub use feeder::{FeedConfig, Feeder};
pub use files::{Fields, FileKind};
pub use layout::{Layout, Templates};
pub use place::Place;
pub use rows::{Message, Row, read_rows};
