//! From examples to batches: shuffling, sampling, the batches of each step, joining rows.
//!
//! Shape suffixes: b batch, s sequence, n targets.

use cpift_core::stream::random::splitmix64;
use cpift_data::Example;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use crate::device::to_device;
use crate::transfer::pinned;

/// Examples concatenated in a single row without padding; each is a document that attends only to
/// itself.
///
/// The tensors are made on the host; [`Batch::to_device`] copies them.
pub struct Batch {
    /// Token ids [1, s].
    pub ids_bs: Tensor,
    /// Positions whose next token is a target, int64 `[n]`.
    pub places_n: Tensor,
    /// The target tokens, int64 `[n]`.
    pub labels_n: Tensor,
    /// Number of tokens of each example.
    pub lengths: Vec<i64>,
}

impl Batch {
    /// Concatenates `examples`.
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

    /// The batch of the examples at `places`.
    pub fn at(examples: &[Example], places: &[usize]) -> Self {
        Self::new(&places.iter().map(|&i| &examples[i]).collect::<Vec<_>>())
    }

    /// Copies the batch to `device` without waiting for the device.
    #[must_use]
    pub fn to_device(&self, device: Device) -> Self {
        self.map(|t| to_device(t, device))
    }

    /// The batch in pinned host memory, for asynchronous copies; unchanged if `device` is the CPU.
    #[must_use]
    pub fn pinned(&self, device: Device) -> Self {
        self.map(|t| if device.is_cuda() { pinned(t) } else { t.shallow_clone() })
    }

    fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            ids_bs: change(&self.ids_bs),
            places_n: change(&self.places_n),
            labels_n: change(&self.labels_n),
            lengths: self.lengths.clone(),
        }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum::<i64>() as usize
    }

    /// Number of tokens that the loss counts.
    pub fn targets(&self) -> usize {
        self.labels_n.numel()
    }
}

/// Consecutive examples, for instance those of a task, and how many of them an epoch has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Number of examples.
    pub rows: usize,
    /// Examples in an epoch; more than `rows` repeat some.
    pub drawn: usize,
}

/// An endless stream of indices into examples, determined by the seed: epochs in random order.
pub(crate) struct Sampler {
    order: Vec<usize>,
    next: usize,
    rng: ChaCha8Rng,
    /// Parts of a mixture: first index, the part's own stream, examples in an epoch.
    parts: Vec<(usize, Sampler, usize)>,
}

impl Sampler {
    /// A sampler over `n` examples: every epoch is a new permutation.
    pub fn new(n: usize, seed: u64) -> Self {
        Self { order: (0..n).collect(), next: n, rng: ChaCha8Rng::seed_from_u64(seed), parts: Vec::new() }
    }

    /// A sampler over the examples of `mixture`. Each part has its own stream of permutations, and
    /// an epoch takes the next examples from each, so that those left out of one epoch come in a
    /// later one. Without parts, a sampler over `n` examples.
    pub fn mixed(n: usize, mixture: &[Part], seed: u64) -> Self {
        if mixture.is_empty() {
            return Self::new(n, seed);
        }
        assert_eq!(n, mixture.iter().map(|part| part.rows).sum::<usize>(), "the parts are all examples");
        let mut start = 0;
        let mut sampler = Self::new(0, seed);
        for (k, part) in mixture.iter().enumerate() {
            sampler.parts.push((start, Self::new(part.rows, splitmix64(seed, k as u64)), part.drawn));
            start += part.rows;
        }
        sampler
    }

    /// The next `count` indices.
    pub fn take(&mut self, count: usize) -> Vec<usize> {
        (0..count)
            .map(|_| {
                if self.next == self.order.len() {
                    self.start_epoch();
                }
                self.next += 1;
                self.order[self.next - 1]
            })
            .collect()
    }

    fn start_epoch(&mut self) {
        if !self.parts.is_empty() {
            let drawn = self.parts.iter_mut().map(|(start, stream, n)| (*start, stream.take(*n)));
            self.order = drawn.flat_map(|(start, taken)| taken.into_iter().map(move |i| start + i)).collect();
        }
        self.order.shuffle(&mut self.rng);
        self.next = 0;
    }
}

/// The indices of `n` examples in random order, and again in another order without end.
pub struct Shuffled(Sampler);

impl Shuffled {
    /// A stream over `n` examples; empty if there are none.
    pub fn new(n: usize, seed: u64) -> Self {
        Self(Sampler::new(n, seed))
    }
}

impl Iterator for Shuffled {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.0.order.is_empty() { None } else { self.0.take(1).pop() }
    }
}

/// Draws `count` of `examples` without replacement, in their own order; all of them if there are no
/// more.
pub fn balanced_sample(examples: &[Example], count: usize, seed: u64) -> Vec<Example> {
    if count >= examples.len() {
        return examples.to_vec();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Selection sampling keeps the order: each example is taken with probability wanted /
    // remaining.
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

/// Sizes of batches and steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FeedConfig {
    /// Examples per batch of all ranks together; with packing, rows.
    pub batch_size: usize,
    /// Batches per step.
    pub grad_accum: usize,
    /// Ranks that share each batch.
    pub ranks: usize,
    /// With packing, tokens per row, at least as many as the longest example has.
    pub row: Option<usize>,
}

impl FeedConfig {
    /// The same sizes without packing.
    pub fn unpacked(self) -> Self {
        Self { row: None, ..self }
    }
}

/// An endless, seeded stream of steps. The rows of a step are dealt to `grad_accum` · `ranks`
/// micro-batches of indices into the examples; which rows they are does not depend on the number
/// of ranks.
pub(crate) struct Feeder {
    lengths: Vec<usize>,
    sampler: Sampler,
    config: FeedConfig,
    /// With packing, the example that did not fit in the previous row.
    waiting: Option<usize>,
}

impl Feeder {
    /// A stream over `examples`, each once per epoch.
    pub fn new(examples: &[Example], config: FeedConfig, seed: u64) -> Self {
        Self::mixed(examples, &[], config, seed)
    }

    /// A stream over `examples`, of whose parts an epoch has the numbers in `mixture`; without
    /// parts, each once.
    pub fn mixed(examples: &[Example], mixture: &[Part], config: FeedConfig, seed: u64) -> Self {
        let lengths: Vec<usize> = examples.iter().map(|e| e.ids.len()).collect();
        Self { sampler: Sampler::mixed(lengths.len(), mixture, seed), lengths, config, waiting: None }
    }

    /// Returns the next step's micro-batches. With N ranks, those of rank r are the r-th, the
    /// (r + N)-th and so on: the order in which one process adds their gradients.
    pub fn next_step(&mut self) -> Vec<Vec<usize>> {
        let rows = self.next_rows();
        let tokens: Vec<usize> = rows.iter().map(|row| row.iter().map(|&i| self.lengths[i]).sum()).collect();
        let parts = deal(&tokens, self.config.grad_accum * self.config.ranks);
        parts.into_iter().map(|part| part.into_iter().flat_map(|row| rows[row].iter().copied()).collect()).collect()
    }

    /// Skips `steps` steps.
    pub fn skip(&mut self, steps: usize) {
        (0..steps).for_each(|_| drop(self.next_rows()));
    }

    /// The rows of the next step, each of one example, or with packing of as many as fit.
    fn next_rows(&mut self) -> Vec<Vec<usize>> {
        let count = self.config.batch_size * self.config.grad_accum;
        let Some(room) = self.config.row else {
            return self.sampler.take(count).into_iter().map(|i| vec![i]).collect();
        };
        (0..count).map(|_| self.next_packed(room)).collect()
    }

    fn next_packed(&mut self, mut room: usize) -> Vec<usize> {
        let mut row = Vec::new();
        loop {
            let place = self.waiting.take().unwrap_or_else(|| self.sampler.take(1)[0]);
            if self.lengths[place] > room {
                self.waiting = Some(place);
                return row;
            }
            room -= self.lengths[place];
            row.push(place);
        }
    }
}

/// This process's share of a step, on the host.
pub(crate) struct StepShare {
    /// Indices of the examples of all ranks.
    pub chosen: Vec<usize>,
    /// This process's micro-batches.
    batches: Vec<Batch>,
    /// Number of micro-batches of all ranks.
    pub micro_batches: usize,
    /// Target tokens of all ranks.
    pub targets: usize,
    /// Tokens of all ranks.
    pub tokens: usize,
}

impl StepShare {
    /// The share of rank `rank` of `world` in the micro-batches `dealt`, of indices into
    /// `examples`.
    pub fn new(examples: &[Example], dealt: Vec<Vec<usize>>, rank: usize, world: usize) -> Self {
        let own = dealt.iter().skip(rank).step_by(world);
        let batches = own.map(|places| Batch::at(examples, places)).collect();
        let chosen = dealt.concat();
        let of_all = |count: fn(&Example) -> usize| chosen.iter().map(|&i| count(&examples[i])).sum();
        // The first token of an example has no prediction.
        let targets = of_all(|e| e.target.iter().skip(1).filter(|t| **t).count());
        let tokens = of_all(|e| e.ids.len());
        Self { chosen, batches, micro_batches: dealt.len(), targets, tokens }
    }

    /// The same in pinned host memory for `device`, if that is a CUDA device.
    pub fn pinned(self, device: Device) -> Self {
        Self { batches: self.batches.iter().map(|b| b.pinned(device)).collect(), ..self }
    }

    /// The micro-batches on `device`.
    pub fn on(&self, device: Device) -> Vec<Batch> {
        self.batches.iter().map(|b| b.to_device(device)).collect()
    }
}

/// Deals rows with these numbers of tokens to `parts` parts of at least one row each, so that the
/// largest part has few tokens. Contiguous parts of equal numbers of rows if no other deal is
/// better; else each row, longest first, goes to the part with the fewest tokens. Rows keep their
/// order within a part, and parts that of their first rows.
///
/// # Panics
/// If there are fewer rows than parts.
fn deal(tokens: &[usize], parts: usize) -> Vec<Vec<usize>> {
    assert!(tokens.len() >= parts, "{} rows for {parts} parts", tokens.len());
    let largest = |dealt: &[Vec<usize>]| {
        dealt.iter().map(|rows| rows.iter().map(|&row| tokens[row]).sum::<usize>()).max().unwrap_or(0)
    };
    let start = |part: usize| part * tokens.len() / parts;
    let contiguous: Vec<Vec<usize>> = (0..parts).map(|part| (start(part)..start(part + 1)).collect()).collect();
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    order.sort_by_key(|&row| (std::cmp::Reverse(tokens[row]), row));
    let mut balanced: Vec<Vec<usize>> = vec![Vec::new(); parts];
    let mut sums = vec![0; parts];
    for row in order {
        let fewest = (0..parts).min_by_key(|&part| (sums[part], balanced[part].len(), part));
        let part = fewest.expect("at least one part");
        balanced[part].push(row);
        sums[part] += tokens[row];
    }
    if largest(&contiguous) <= largest(&balanced) {
        return contiguous;
    }
    balanced.iter_mut().for_each(|rows| rows.sort_unstable());
    balanced.sort();
    balanced
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
    fn an_epoch_of_a_mixture_has_the_numbers_asked_for_and_no_row_waits_for_ever() {
        let parts = [Part { rows: 10, drawn: 4 }, Part { rows: 2, drawn: 5 }];
        let mut sampler = Sampler::mixed(12, &parts, 3);
        let (mut large, mut small) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let epoch = sampler.take(9);
            let (first, second): (Vec<usize>, Vec<usize>) = epoch.into_iter().partition(|i| *i < 10);
            assert_eq!((first.len(), second.len()), (4, 5));
            large.extend(first);
            small.extend(second);
        }
        // 20 draws from 10 rows, 25 from 2.
        assert!((0..10).all(|row| large.iter().filter(|i| **i == row).count() == 2), "{large:?}");
        let of_first = small.iter().filter(|i| **i == 10).count();
        assert!((12..=13).contains(&of_first), "{small:?}");
        assert_eq!(Sampler::mixed(12, &parts, 3).take(40), Sampler::mixed(12, &parts, 3).take(40));
        assert_eq!(Sampler::mixed(12, &[], 3).take(40), Sampler::new(12, 3).take(40));
    }

    #[test]
    fn a_balanced_sample_has_the_size_asked_for() {
        let all: Vec<Example> = (3..103).map(example).collect();
        let sample = balanced_sample(&all, 30, 5);
        assert_eq!(sample.len(), 30);
        assert!(sample.windows(2).all(|w| w[0].ids.len() < w[1].ids.len()));
        assert_eq!(balanced_sample(&all, 1000, 5).len(), 100);
    }

    fn examples(lengths: &[usize]) -> Vec<Example> {
        let example = |&n: &usize| Example { ids: vec![0; n], target: vec![true; n], ..Example::default() };
        lengths.iter().map(example).collect()
    }

    #[test]
    fn packed_rows_hold_whole_examples_and_nothing_is_lost() {
        let lengths = [30, 50, 20, 64, 10, 45, 64, 1];
        let config = FeedConfig { batch_size: 2, grad_accum: 1, ranks: 1, row: Some(64) };
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
            let config = FeedConfig { batch_size: 3, grad_accum: 2, ranks: 1, row };
            let all = examples(&[30, 50, 20, 64, 10]);
            let (mut walked, mut skipped) = (Feeder::new(&all, config, 9), Feeder::new(&all, config, 9));
            (0..7).for_each(|_| drop(walked.next_step()));
            skipped.skip(7);
            assert_eq!(walked.next_step(), skipped.next_step());
        }
    }

    #[test]
    fn ranks_share_the_rows_that_one_process_accumulates() {
        for row in [None, Some(80)] {
            let all = examples(&[30, 50, 20, 64, 10, 7, 44, 3, 71, 12]);
            let one = FeedConfig { batch_size: 2, grad_accum: 4, ranks: 1, row };
            let (mut alone, mut shared) = (
                Feeder::new(&all, one, 5),
                Feeder::new(&all, FeedConfig { batch_size: 8, grad_accum: 1, ranks: 4, row }, 5),
            );
            let mut both = Feeder::new(&all, FeedConfig { batch_size: 4, grad_accum: 2, ranks: 2, row }, 5);
            for _ in 0..6 {
                let step = alone.next_step();
                assert_eq!((step.len(), &step), (4, &shared.next_step()));
                assert_eq!(step, both.next_step());
            }
        }
    }

    #[test]
    fn rows_are_dealt_by_tokens() {
        assert_eq!(deal(&[5, 5, 5, 5, 5], 2), [vec![0, 1], vec![2, 3, 4]], "contiguous if nothing is better");
        assert_eq!(deal(&[100, 90, 1, 2], 2), [vec![0], vec![1, 2, 3]]);
        assert_eq!(deal(&[1, 1, 1, 50], 3), [vec![0, 2], vec![1], vec![3]]);
        assert_eq!(deal(&[9], 1), [vec![0]]);
        // A part always has a row.
        assert!(deal(&[0, 0, 7, 7, 0], 4).iter().all(|rows| !rows.is_empty()));
    }
}
