//! Shuffling examples and padding them into batches.
//!
//! Suffixes: b batch, s sequence.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use super::example::Example;

/// The label that the loss passes over, as PyTorch's cross entropy has it.
pub const IGNORE: i64 = -100;

/// Padded examples; padding is on the right, where causal attention never looks.
pub struct Batch {
    /// Token ids [b, s].
    pub ids_bs: Tensor,
    /// The next token where the loss counts it, else [`IGNORE`]; [b, s].
    pub labels_bs: Tensor,
    /// Tokens that are not padding.
    pub tokens: usize,
    /// Tokens that the loss counts.
    pub targets: usize,
}

impl Batch {
    /// Pads `examples` to the longest of them.
    ///
    /// # Panics
    /// When there are none.
    pub fn new(examples: &[&Example], pad_id: i64, device: Device) -> Self {
        let longest = examples.iter().map(|e| e.ids.len()).max().expect("a batch has examples");
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for example in examples {
            let padding = longest - example.ids.len();
            ids.extend(example.ids.iter().copied().chain(std::iter::repeat_n(pad_id, padding)));
            let next = example.ids.iter().zip(&example.target).skip(1).map(|(&id, &t)| if t { id } else { IGNORE });
            labels.extend(next.chain(std::iter::repeat_n(IGNORE, padding + 1)));
        }
        let shape = [examples.len() as i64, longest as i64];
        Self {
            ids_bs: Tensor::from_slice(&ids).view(shape).to_device(device),
            labels_bs: Tensor::from_slice(&labels).view(shape).to_device(device),
            tokens: examples.iter().map(|e| e.ids.len()).sum(),
            targets: labels.iter().filter(|l| **l != IGNORE).count(),
        }
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
    fn labels_are_the_next_targets_and_padding_is_ignored() {
        let (a, b) = (example(4), example(3));
        let batch = Batch::new(&[&a, &b], 9, Device::Cpu);
        let rows: Vec<Vec<i64>> = Vec::try_from(&batch.labels_bs).unwrap();
        assert_eq!(rows, [[IGNORE, 2, 3, IGNORE], [IGNORE, 2, IGNORE, IGNORE]]);
        let ids: Vec<Vec<i64>> = Vec::try_from(&batch.ids_bs).unwrap();
        assert_eq!(ids, [[0, 1, 2, 3], [0, 1, 2, 9]]);
        assert_eq!((batch.tokens, batch.targets), (7, 3));
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
