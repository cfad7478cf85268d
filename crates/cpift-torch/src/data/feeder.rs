//! Which examples each optimizer step sees.

use super::batch::Sampler;
use cpift_data::Example;

/// How examples make batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedConfig {
    /// Examples in a batch; with packing, rows.
    pub batch_size: usize,
    /// Batches in a step.
    pub grad_accum: usize,
    /// Packing: the tokens of a row, at least those of the longest example.
    pub row: Option<usize>,
}

/// An endless, seeded stream of steps; each step is `grad_accum` batches of places in the list of examples.
pub struct Feeder {
    lengths: Vec<usize>,
    sampler: Sampler,
    config: FeedConfig,
    /// Packing: drawn, and left over by the batch before for want of room.
    waiting: Option<usize>,
}

impl Feeder {
    /// A stream over `examples`.
    pub fn new(examples: &[Example], config: FeedConfig, seed: u64) -> Self {
        let lengths: Vec<usize> = examples.iter().map(|e| e.ids.len()).collect();
        Self { sampler: Sampler::new(lengths.len(), seed), lengths, config, waiting: None }
    }

    /// The next step's batches.
    pub fn next_step(&mut self) -> Vec<Vec<usize>> {
        (0..self.config.grad_accum).map(|_| self.next_batch()).collect()
    }

    /// Passes over `steps` steps.
    pub fn skip(&mut self, steps: usize) {
        (0..steps).for_each(|_| drop(self.next_step()));
    }

    fn next_batch(&mut self) -> Vec<usize> {
        let Some(row) = self.config.row else { return self.sampler.take(self.config.batch_size) };
        let mut batch = Vec::new();
        for _ in 0..self.config.batch_size {
            let mut room = row;
            loop {
                let place = self.waiting.take().unwrap_or_else(|| self.sampler.take(1)[0]);
                if self.lengths[place] > room {
                    self.waiting = Some(place);
                    break;
                }
                room -= self.lengths[place];
                batch.push(place);
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(lengths: &[usize]) -> Vec<Example> {
        let example = |&n: &usize| Example { ids: vec![0; n], target: vec![true; n], ..Example::default() };
        lengths.iter().map(example).collect()
    }

    #[test]
    fn packed_rows_hold_whole_examples_and_nothing_is_lost() {
        let lengths = [30, 50, 20, 64, 10, 45, 64, 1];
        let config = FeedConfig { batch_size: 2, grad_accum: 1, row: Some(64) };
        let mut packed = Feeder::new(&examples(&lengths), config, 3);
        let stream: Vec<usize> = (0..40).flat_map(|_| packed.next_step().concat()).collect();
        assert_eq!(stream, Sampler::new(lengths.len(), 3).take(stream.len()), "the order of an unpacked run");
        let mut packed = Feeder::new(&examples(&lengths), config, 3);
        for _ in 0..40 {
            let tokens: usize = packed.next_step().concat().iter().map(|&i| lengths[i]).sum();
            assert!((65..=128).contains(&tokens), "{tokens} tokens in two rows of 64");
        }
    }

    #[test]
    fn skipping_leads_to_the_same_step() {
        for row in [None, Some(64)] {
            let config = FeedConfig { batch_size: 3, grad_accum: 2, row };
            let all = examples(&[30, 50, 20, 64, 10]);
            let (mut walked, mut skipped) = (Feeder::new(&all, config, 9), Feeder::new(&all, config, 9));
            (0..7).for_each(|_| drop(walked.next_step()));
            skipped.skip(7);
            assert_eq!(walked.next_step(), skipped.next_step());
        }
    }
}
