//! Shuffling examples and joining them into batches.
//!
//! Suffixes: b batch, s sequence.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use crate::model::to_device;
use cpift_data::Example;

/// Examples one after another in a single row, without padding; each is a document that sees only itself.
///
/// The tensors are made on the host; [`Batch::to_device`] moves them.
pub struct Batch {
    /// Token ids [1, s].
    pub ids_bs: Tensor,
    /// Where in the row the next token is a target, int64 [n].
    pub places_n: Tensor,
    /// Those next tokens, int64 [n].
    pub labels_n: Tensor,
    /// Tokens of each example.
    pub lengths: Vec<i64>,
}

impl Batch {
    /// Joins `examples`.
    pub fn new(examples: &[&Example]) -> Self {
        let (mut ids, mut places, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for example in examples {
            let start = ids.len() as i64;
            ids.extend_from_slice(&example.ids);
            for next in (1..example.ids.len()).filter(|&next| example.target[next]) {
                places.push(start + next as i64 - 1);
                labels.push(example.ids[next]);
            }
        }
        Self {
            ids_bs: Tensor::from_slice(&ids).unsqueeze(0),
            places_n: Tensor::from_slice(&places),
            labels_n: Tensor::from_slice(&labels),
            lengths: examples.iter().map(|e| e.ids.len() as i64).collect(),
        }
    }

    /// The batch on `device`; the copies do not wait for the device.
    #[must_use]
    pub fn to_device(&self, device: Device) -> Self {
        self.map(|t| to_device(t, device))
    }

    /// The batch in host memory from which `device` can copy by itself; as it is where that is the CPU.
    #[must_use]
    pub fn pinned(&self, device: Device) -> Self {
        self.map(|t| if device.is_cuda() { t.pin_memory(device) } else { t.shallow_clone() })
    }

    fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            ids_bs: change(&self.ids_bs),
            places_n: change(&self.places_n),
            labels_n: change(&self.labels_n),
            lengths: self.lengths.clone(),
        }
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum::<i64>() as usize
    }

    /// Tokens that the loss counts.
    pub fn targets(&self) -> usize {
        self.labels_n.numel()
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
        Example { ids: (0..n as i64).collect(), target: (0..n).map(|i| i >= 2).collect(), ..Example::default() }
    }

    #[test]
    fn labels_are_the_next_targets_within_each_example() {
        let (a, b) = (example(4), example(3));
        let batch = Batch::new(&[&a, &b]);
        let list = |t: &Tensor| Vec::<i64>::try_from(t).unwrap();
        assert_eq!(list(&batch.ids_bs.squeeze()), [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!((list(&batch.places_n), list(&batch.labels_n)), (vec![1, 2, 5], vec![2, 3, 2]));
        assert_eq!((batch.tokens(), batch.targets(), batch.lengths), (7, 3, vec![4, 3]));
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
