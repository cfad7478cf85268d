//! From data files to batches: rows, token examples with the loss on assistant tokens, shuffling, padding.

mod batch;
mod example;
mod feeder;
mod place;
mod rows;

pub use batch::{Batch, Sampler, balanced_sample};
pub use example::{Encoded, Example, Overlong, encode_rows, report};
pub use feeder::{FeedConfig, Feeder};
pub use place::Place;
pub use rows::{Message, Row, read_rows};
