//! From examples to batches: shuffling, sampling, joining.

mod batch;
mod feeder;

pub use batch::{Batch, Sampler, balanced_sample};
pub use feeder::{FeedConfig, Feeder};
