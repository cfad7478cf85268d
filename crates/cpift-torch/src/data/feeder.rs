//! Which examples each optimizer step sees.

use super::batch::Sampler;

/// How examples make batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedConfig {
    /// Examples in a batch.
    pub batch_size: usize,
    /// Batches in a step.
    pub grad_accum: usize,
}

/// An endless, seeded stream of steps; each step is `grad_accum` batches of indices into the examples.
pub struct Feeder {
    sampler: Sampler,
    config: FeedConfig,
}

impl Feeder {
    /// A stream over `examples` examples.
    pub fn new(examples: usize, config: FeedConfig, seed: u64) -> Self {
        Self { sampler: Sampler::new(examples, seed), config }
    }

    /// The next step's batches.
    pub fn next_step(&mut self) -> Vec<Vec<usize>> {
        (0..self.config.grad_accum).map(|_| self.sampler.take(self.config.batch_size)).collect()
    }
}
