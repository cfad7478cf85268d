//! Shuffling examples and joining them into batches.
//!
//! Suffixes: b batch, s sequence.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use super::example::Example;

/// The label that the loss passes over, as PyTorch's cross entropy has it.
pub const IGNORE: i64 = -100;

/// Examples one after another in a single row, without padding; each is a document that sees only itself.
pub struct Batch {
    /// Token ids [1, s].
    pub ids_bs: Tensor,
    /// The next token where the loss counts it, else [`IGNORE`]; [1, s].
    pub labels_bs: Tensor,
    /// Tokens of each example.
    pub lengths: Vec<i64>,
    /// Tokens that the loss counts.
    pub targets: usize,
}

impl Batch {
    /// Joins `examples`.
    pub fn new(examples: &[&Example], device: Device) -> Self {
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for example in examples {
            ids.extend_from_slice(&example.ids);
            let next = example.ids.iter().zip(&example.target).skip(1).map(|(&id, &t)| if t { id } else { IGNORE });
            labels.extend(next.chain([IGNORE]));
        }
        Self {
            ids_bs: Tensor::from_slice(&ids).unsqueeze(0).to_device(device),
            labels_bs: Tensor::from_slice(&labels).unsqueeze(0).to_device(device),
            lengths: examples.iter().map(|e| e.ids.len() as i64).collect(),
            targets: labels.iter().filter(|l| **l != IGNORE).count(),
        }
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum::<i64>() as usize
    }
}

/// Endless indices into `n` examples: every epoch a new permutation, the same for the same seed.
pub struct Sampler {
    order: Vec<usize>,
    next: usize,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler over `n` examples.
    pub fn new(n: usize, seed: u64) -> Self {
        Self { order: (0..n).collect(), next: n, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// The next `count` indices.
    pub fn take(&mut self, count: usize) -> Vec<usize> {
        (0..count)
            .map(|_| {
                if self.next == self.order.len() {
                    self.order.shuffle(&mut self.rng);
                    self.next = 0;
                }
                self.next += 1;
                self.order[self.next - 1]
            })
            .collect()
    }
}

/// `count` of `examples` drawn without replacement, in their own order; all of them when there are no more.
pub fn balanced_sample(examples: &[Example], count: usize, seed: u64) -> Vec<Example> {
    if count >= examples.len() {
        return examples.to_vec();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Selection sampling keeps the order: each example with the chance that fills the rest exactly.
    let mut wanted = count;
    let mut out = Vec::with_capacity(count);
    for (i, example) in examples.iter().enumerate() {
        if rng.random_range(0..examples.len() - i) < wanted {
            out.push(example.clone());
            wanted -= 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(n: usize) -> Example {
        Example { ids: (0..n as i64).collect(), target: (0..n).map(|i| i >= 2).collect() }
    }

    #[test]
    fn labels_are_the_next_targets_within_each_example() {
        let (a, b) = (example(4), example(3));
        let batch = Batch::new(&[&a, &b], Device::Cpu);
        let labels: Vec<i64> = Vec::try_from(&batch.labels_bs.squeeze()).unwrap();
        assert_eq!(labels, [IGNORE, 2, 3, IGNORE, IGNORE, 2, IGNORE]);
        let ids: Vec<i64> = Vec::try_from(&batch.ids_bs.squeeze()).unwrap();
        assert_eq!(ids, [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!((batch.tokens(), batch.targets, batch.lengths), (7, 3, vec![4, 3]));
    }

    #[test]
    fn every_epoch_is_a_permutation_and_seeds_repeat() {
        let mut sampler = Sampler::new(10, 1);
        for _ in 0..3 {
            let mut epoch = sampler.take(10);
            epoch.sort_unstable();
            assert_eq!(epoch, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(Sampler::new(50, 7).take(120), Sampler::new(50, 7).take(120));
        assert_ne!(Sampler::new(50, 7).take(50), Sampler::new(50, 8).take(50));
    }

    #[test]
    fn a_balanced_sample_has_the_size_asked_for() {
        let all: Vec<Example> = (3..103).map(example).collect();
        let sample = balanced_sample(&all, 30, 5);
        assert_eq!(sample.len(), 30);
        assert!(sample.windows(2).all(|w| w[0].ids.len() < w[1].ids.len()));
        assert_eq!(balanced_sample(&all, 1000, 5).len(), 100);
    }
}
