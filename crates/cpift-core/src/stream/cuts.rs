//! Thresholds of the k largest of many scores, with the last of the ties that are chosen: one pass
//! over the elements where the guess from a sample is right, else an exact search.
//!
//! A guess is two scores between which the k-th largest almost surely lies, or, if very many scores
//! are equal, that score itself. The result does not depend on the sample or on the number of
//! threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use rayon::prelude::*;

use crate::format::mask::Ties;
use crate::stream::random::splitmix64;
use crate::stream::select::{Cut, GROUP, Score, Source, find_cut, split};
use crate::stream::ties::{HashBand, TieCut, TieKey, find_tie_cut};

/// Largest number of scores that [`Elements::read`] is asked for.
pub const BLOCK: usize = 1 << 10;

/// Elements that a thread reads at a time.
const CHUNK: usize = 1 << 17;

/// Up to this size nothing is sampled: all elements are candidates.
const SMALL: usize = 1 << 14;

/// Consecutive elements per run of the sample, elements for each of which there is one run, and
/// largest number of runs.
const RUN: usize = 64;
const SHARE: usize = 1 << 12;
const RUNS: usize = 1 << 10;

/// Largest number of candidates of a bracket, of 8 bytes each in f32.
pub const LIMIT: usize = 1 << 21;

/// Half width of the bracket, in standard errors of the sample's quantile. Neighbours in a matrix
/// row move alike, so a sample of runs tells less than its size says; the width allows for that.
const SPAN: f64 = 12.0;

/// Assumption about the k-th largest score before all scores are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Guess<T> {
    /// Scores above `high` are chosen, scores below `low` are not; scores from `low` to `high` are
    /// candidates.
    Bracket {
        /// Lowest score of a candidate.
        low: T,
        /// Highest score of a candidate.
        high: T,
    },
    /// The threshold is `score`. Of the elements equal to it, those whose tie hashes lie below
    /// `band` are chosen, those above are not; those inside are candidates.
    Tied {
        /// The threshold.
        score: T,
        /// Hashes that the sample leaves open.
        band: HashBand,
    },
}

impl<T: Score> Guess<T> {
    /// Chooses nothing and keeps nothing.
    pub fn nothing() -> Self {
        Self::Bracket { low: T::from_f64(f64::NAN), high: T::from_f64(f64::INFINITY) }
    }

    /// Keeps everything.
    pub fn everything() -> Self {
        Self::Bracket { low: T::from_f64(0.0), high: T::from_f64(f64::INFINITY) }
    }

    /// Largest number of candidates kept, where `limit` is that of a bracket. A tied candidate is
    /// kept without its score: 2 bytes instead of 6 in f32.
    pub fn limit(&self, limit: usize) -> usize {
        match self {
            Self::Bracket { .. } => limit,
            Self::Tied { .. } => 3 * limit,
        }
    }

    /// Guesses the `k`-th largest of `n` scores, 1 ≤ k ≤ n, from a `sample` that is not empty,
    /// leaving at most about `limit` candidates.
    pub fn from_sample(mut sample: Vec<T>, k: u64, n: u64, limit: usize) -> Self {
        let size = sample.len() as f64;
        let rank = k as f64 / n as f64 * size;
        let slack = SPAN * (rank * (1.0 - rank / size)).max(1.0).sqrt();
        // Positions in descending order of score.
        let at = |sample: &mut [T], position: f64| {
            let place = sample.len() - 1 - (position as usize).min(sample.len() - 1);
            *sample.select_nth_unstable_by_key(place, |score| score.key()).1
        };
        let high = if rank - slack < 0.0 { T::from_f64(f64::INFINITY) } else { at(&mut sample, rank - slack) };
        let low = if rank + slack > size - 1.0 { T::from_f64(0.0) } else { at(&mut sample, rank + slack) };
        let count = |inside: &dyn Fn(&T) -> bool| sample.iter().filter(|s| inside(s)).count() as f64;
        if count(&|s| (low..=high).contains(s)) / size * n as f64 <= limit as f64 {
            return Self::Bracket { low, high };
        }
        let score = at(&mut sample.clone(), rank);
        let tied = count(&|s| *s == score);
        let share = (rank - count(&|s| *s > score)) / tied;
        Self::Tied { score, band: HashBand::around(share, slack / tied) }
    }
}

/// Elements with scores, which are read in any order.
pub trait Elements<T>: Sync {
    /// Working space of a thread.
    type Space: Send;

    /// Number of elements.
    fn count(&self) -> usize;

    /// New working space.
    fn space(&self) -> Self::Space;

    /// Puts the scores of the elements from `start` on into `scores`, at most [`BLOCK`]: none
    /// negative or −0.0, and NaN for an element that takes no part. Returns false if an element has
    /// no score, which ends the search.
    fn read(&self, start: usize, scores: &mut [T], space: &mut Self::Space) -> bool;
}

/// The k largest of the scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Largest<T> {
    /// Smallest chosen score, and its ties.
    pub cut: Cut<T>,
    /// Last of the ties that are chosen; `None` if all are, or if their score is zero.
    pub last: Option<(TieKey, TieCut)>,
}

/// Result of [`largest`].
#[derive(Debug, Clone, PartialEq)]
pub enum Found<T> {
    /// One entry per number asked for.
    All(Vec<Largest<T>>),
    /// Start and length of the first block with an element that has no score.
    NoScore(usize, usize),
}

/// Finds the `k` largest scores of `elements` for every k of `ks`, each from 1 to `n`, the number
/// of elements that take part. `key` gives the key of the tie hashes; it is called if there are
/// ties.
///
/// # Errors
/// Those of `key`.
///
/// # Panics
/// If fewer than `n` elements take part.
pub fn largest<T: Score, E: Elements<T>>(
    elements: &E,
    n: u64,
    ks: &[u64],
    key: impl Fn() -> Result<TieKey>,
) -> Result<Found<T>> {
    let guesses = guesses(elements, n, ks);
    let tied = |guess: &Guess<T>| matches!(guess, Guess::Tied { score, .. } if *score != T::default());
    let known = if guesses.iter().any(tied) { Some(key()?) } else { None };
    let open = match sweep(elements, &guesses, known) {
        Ok(open) => open,
        Err((start, len)) => return Ok(Found::NoScore(start, len)),
    };
    let settle = |((guess, open), k): ((&Guess<T>, Open<T>), &u64)| match open.settle(*guess, *k, known, &key)? {
        Some(largest) => Ok(largest),
        None => exact(elements, *k, &key),
    };
    Ok(Found::All(guesses.iter().zip(open).zip(ks).map(settle).collect::<Result<_>>()?))
}

fn guesses<T: Score, E: Elements<T>>(elements: &E, n: u64, ks: &[u64]) -> Vec<Guess<T>> {
    if elements.count() <= SMALL {
        return vec![Guess::everything(); ks.len()];
    }
    let sample = sample(elements);
    let guess = |k: &u64| match sample.is_empty() {
        true => Guess::everything(),
        false => Guess::from_sample(sample.clone(), *k, n, LIMIT.min(n as usize / 8)),
    };
    ks.iter().map(guess).collect()
}

/// Scores of runs spread evenly over the elements, each at a random offset in its stretch. The same
/// on every machine.
fn sample<T: Score, E: Elements<T>>(elements: &E) -> Vec<T> {
    let count = elements.count();
    let runs = (count / SHARE).clamp(1, RUNS);
    let stretch = count / runs;
    let mut scores = vec![T::default(); runs * RUN];
    let read = |space: &mut E::Space, (run, scores): (usize, &mut [T])| {
        let offset = splitmix64(0, run as u64) as usize % (stretch - RUN + 1);
        dispatch!(elements.read(run * stretch + offset, scores, space));
    };
    scores.par_chunks_mut(RUN).with_min_len(64).enumerate().for_each_init(|| elements.space(), read);
    scores.retain(|score| score.is_finite());
    scores
}

/// Elements that a guess leaves open, and the numbers of those that it decides.
struct Open<T> {
    above: u64,
    /// Inside the bracket, or equal to the guessed threshold.
    inside: u64,
    /// Those of the equal ones whose hashes lie below the band.
    taken: u64,
    /// Number of candidates.
    open: u64,
    /// The candidates that were kept, with their scores unless all are equal.
    index: Vec<u64>,
    score: Vec<T>,
}

impl<T> Default for Open<T> {
    fn default() -> Self {
        Self { above: 0, inside: 0, taken: 0, open: 0, index: Vec::new(), score: Vec::new() }
    }
}

/// Open elements by guess, or start and length of the first block with an element that has no
/// score.
type Swept<T> = Result<Vec<Open<T>>, (usize, usize)>;

/// Reads all elements once and holds every guess against them. The error is the first block with an
/// element that has no score.
fn sweep<T: Score, E: Elements<T>>(elements: &E, guesses: &[Guess<T>], key: Option<TieKey>) -> Swept<T> {
    let kept: Vec<AtomicUsize> = guesses.iter().map(|_| AtomicUsize::new(0)).collect();
    let chunk = |(scores, space): &mut (Vec<T>, E::Space), chunk: usize| {
        let mut found: Vec<Open<T>> = guesses.iter().map(|_| Open::default()).collect();
        let end = elements.count().min((chunk + 1) * CHUNK);
        let result = dispatch!({
            let mut result = Ok(());
            for start in (chunk * CHUNK..end).step_by(BLOCK) {
                let scores = &mut scores[..BLOCK.min(end - start)];
                if !elements.read(start, scores, space) {
                    result = Err((start, scores.len()));
                    break;
                }
                for ((guess, open), kept) in guesses.iter().zip(&mut found).zip(&kept) {
                    let room = kept.load(Ordering::Relaxed) <= guess.limit(2 * LIMIT);
                    open.add(*guess, key, start, scores, room);
                }
            }
            result
        });
        for (open, kept) in found.iter().zip(&kept) {
            kept.fetch_add(open.index.len(), Ordering::Relaxed);
        }
        result.map(|()| found)
    };
    let space = || (vec![T::default(); BLOCK], elements.space());
    let chunks: Vec<Swept<T>> =
        (0..elements.count().div_ceil(CHUNK)).into_par_iter().with_max_len(1).map_init(space, chunk).collect();
    let mut sums: Vec<Open<T>> = guesses.iter().map(|_| Open::default()).collect();
    for found in chunks {
        sums.iter_mut().zip(found?).for_each(|(sum, open)| sum.join(open));
    }
    Ok(sums)
}

impl<T: Score> Open<T> {
    /// Adds the elements from `start` on; candidates are kept if there is room for them.
    #[inline(always)]
    fn add(&mut self, guess: Guess<T>, key: Option<TieKey>, start: usize, scores: &[T], room: bool) {
        for (group, values) in scores.chunks(GROUP).enumerate() {
            let first = start + GROUP * group;
            let (low, high) = match guess {
                Guess::Bracket { low, high } => (low, high),
                Guess::Tied { score, .. } => (score, score),
            };
            let (over, inside) = split(values, low, high);
            self.above += u64::from(over.count_ones());
            self.inside += u64::from(inside.count_ones());
            if inside == 0 {
                continue;
            }
            let (taken, mut open) = match (guess, key) {
                (Guess::Bracket { .. }, _) => (0, inside),
                (Guess::Tied { score, band }, Some(key)) if score != T::default() => key.split(first, inside, band),
                // Ties of zero are not told apart.
                _ => (0, 0),
            };
            self.taken += u64::from(taken.count_ones());
            self.open += u64::from(open.count_ones());
            while open != 0 && room {
                let bit = open.trailing_zeros() as usize;
                self.index.push((first + bit) as u64);
                if matches!(guess, Guess::Bracket { .. }) {
                    self.score.push(values[bit]);
                }
                open &= open - 1;
            }
        }
    }

    fn join(&mut self, other: Self) {
        self.above += other.above;
        self.inside += other.inside;
        self.taken += other.taken;
        self.open += other.open;
        self.index.extend(other.index);
        self.score.extend(other.score);
    }

    /// Chooses among the open elements so that the `k` largest scores are chosen. Returns `None` if
    /// the guess was wrong or left too many elements open.
    fn settle(
        mut self,
        guess: Guess<T>,
        k: u64,
        known: Option<TieKey>,
        key: impl Fn() -> Result<TieKey>,
    ) -> Result<Option<Largest<T>>> {
        if k <= self.above || k > self.above + self.inside || self.open > self.index.len() as u64 {
            return Ok(None);
        }
        let k = k - self.above;
        match guess {
            Guess::Bracket { .. } => {
                let mut order = self.score.clone();
                let place = order.len() - k as usize;
                let threshold = *order.select_nth_unstable_by_key(place, |score| score.key()).1;
                let tied = order.iter().filter(|score| **score == threshold).count() as u64;
                let chosen = k - order.iter().filter(|score| **score > threshold).count() as u64;
                if chosen == tied || threshold == T::default() {
                    return Ok(Some(Largest::new(threshold, tied, chosen, None)));
                }
                let mut equal = self.score.iter().map(|score| *score == threshold);
                self.index.retain(|_| equal.next() == Some(true));
                let key = known.map_or_else(key, Ok)?;
                Ok(Some(Largest::new(threshold, tied, chosen, Some((key, self.cut(key, chosen))))))
            }
            Guess::Tied { score, .. } if k == self.inside || score == T::default() => {
                Ok(Some(Largest::new(score, self.inside, k, None)))
            }
            Guess::Tied { score, .. } => {
                let open = self.taken < k && k <= self.taken + self.open;
                let (true, Some(key)) = (open, known) else { return Ok(None) };
                let last = self.cut(key, k - self.taken);
                Ok(Some(Largest::new(score, self.inside, k, Some((key, last)))))
            }
        }
    }

    /// Last of the first `k` candidates in the order of their hashes.
    fn cut(&self, key: TieKey, k: u64) -> TieCut {
        let mut hashes: Vec<(u64, u64)> = self.index.iter().map(|i| (key.hash(*i as usize), *i)).collect();
        TieCut::among(&mut hashes, k)
    }
}

impl<T: Score> Largest<T> {
    /// Bits of those of the at most 64 elements from `start` on that are chosen. Call inside
    /// [`crate::dispatch!`].
    #[inline(always)]
    pub fn chosen(&self, start: usize, scores: &[T]) -> u64 {
        let (above, tied) = split(scores, self.cut.threshold, self.cut.threshold);
        // Not by a closure, which would be compiled for the baseline CPU.
        match self.last {
            Some((key, last)) => above | key.chosen(start, tied, last),
            None => above | tied,
        }
    }
}

impl<T> Largest<T> {
    /// The first `chosen` of `tied` elements equal to `threshold`, and all above it.
    fn new(threshold: T, tied: u64, chosen: u64, last: Option<(TieKey, TieCut)>) -> Self {
        let decided_by_hash = if chosen < tied { chosen } else { 0 };
        Self { cut: Cut { threshold, ties: Ties { at_threshold: tied, chosen, decided_by_hash } }, last }
    }
}

/// Finds the `k` largest scores without a guess.
fn exact<T: Score, E: Elements<T>>(elements: &E, k: u64, key: impl Fn() -> Result<TieKey>) -> Result<Largest<T>> {
    let source = Chunks { elements, spare: Mutex::new(Vec::new()) };
    let cut = find_cut(&source, k);
    let Ties { at_threshold, chosen, .. } = cut.ties;
    if chosen == at_threshold || cut.threshold == T::default() {
        return Ok(Largest { cut, last: None });
    }
    let key = key()?;
    let last = find_tie_cut(source.chunks(), at_threshold, chosen, |chunk, count| {
        source.visit(chunk, |start, scores| {
            for (i, _) in scores.iter().enumerate().filter(|(_, score)| **score == cut.threshold) {
                count.add(key.hash(start + i), (start + i) as u64);
            }
        });
    });
    Ok(Largest { cut, last: Some((key, last)) })
}

/// The scores chunk by chunk, for the exact search.
struct Chunks<'a, T, E: Elements<T>> {
    elements: &'a E,
    spare: Mutex<Vec<(Vec<T>, E::Space)>>,
}

impl<T: Score, E: Elements<T>> Chunks<'_, T, E> {
    /// Calls `each` with the first index and the scores of every block of a chunk.
    fn visit(&self, chunk: usize, mut each: impl FnMut(usize, &[T])) {
        let taken = self.spare.lock().expect("no thread panics here").pop();
        let (mut scores, mut space) = taken.unwrap_or_else(|| (vec![T::default(); BLOCK], self.elements.space()));
        let end = self.elements.count().min((chunk + 1) * CHUNK);
        for start in (chunk * CHUNK..end).step_by(BLOCK) {
            let scores = &mut scores[..BLOCK.min(end - start)];
            dispatch!(self.elements.read(start, scores, &mut space));
            each(start, scores);
        }
        self.spare.lock().expect("no thread panics here").push((scores, space));
    }
}

impl<T: Score, E: Elements<T>> Source<T> for Chunks<'_, T, E> {
    fn chunks(&self) -> usize {
        self.elements.count().div_ceil(CHUNK)
    }

    fn scores(&self, i: usize, out: &mut Vec<T>) {
        out.clear();
        // Infinite scores take part.
        self.visit(i, |_, scores| out.extend(scores.iter().filter(|score| **score >= T::default())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::digest::Digest;
    use crate::stream::ties::TieSalt;

    struct Scores<F>(usize, F);

    impl<F: Fn(usize) -> f32 + Sync> Elements<f32> for Scores<F> {
        type Space = ();

        fn count(&self) -> usize {
            self.0
        }

        fn space(&self) {}

        #[inline(always)]
        fn read(&self, start: usize, scores: &mut [f32], _: &mut ()) -> bool {
            scores.iter_mut().enumerate().for_each(|(i, score)| *score = (self.1)(start + i));
            scores.iter().all(|score| *score != f32::INFINITY)
        }
    }

    /// Checks the choice against sorting, for numbers of elements on both sides of the sampled
    /// size.
    fn check(score: impl Fn(usize) -> f32 + Sync + Copy, name: &str) {
        let key = TieSalt::new(&Digest::blank()).key("w");
        for count in [1, 1000, 400_000] {
            let mut sorted: Vec<usize> = (0..count).filter(|i| !score(*i).is_nan()).collect();
            sorted.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(key.hash(*a).cmp(&key.hash(*b))));
            let n = sorted.len();
            let ks: Vec<u64> = [1, n / 100, n / 5, n / 2, n].into_iter().filter(|k| *k > 0).map(|k| k as u64).collect();
            let Found::All(found) = largest(&Scores(count, score), n as u64, &ks, || Ok(key)).unwrap() else {
                panic!("every element has a score")
            };
            for (k, Largest { cut, last }) in ks.iter().zip(found) {
                let chosen = |i: &usize| {
                    let tied = || last.is_none_or(|(key, last)| last.chooses(key.hash(*i), *i as u64));
                    score(*i) > cut.threshold || score(*i) == cut.threshold && tied()
                };
                let case = format!("{name}: {k} of {count}");
                assert_eq!(score(sorted[*k as usize - 1]), cut.threshold, "{case}");
                let above = sorted.iter().filter(|i| score(**i) > cut.threshold).count() as u64;
                let equal = sorted.iter().filter(|i| score(**i) == cut.threshold).count() as u64;
                assert_eq!((cut.ties.at_threshold, cut.ties.chosen), (equal, k - above), "{case}");
                let all = if cut.threshold == 0.0 { above + equal } else { *k };
                assert!(sorted[..all as usize].iter().all(chosen), "{case}");
                assert!(!sorted[all as usize..].iter().any(chosen), "{case}");
            }
        }
    }

    #[test]
    fn the_choice_is_that_of_sorting() {
        let random = |i: usize| splitmix64(5, i as u64) >> 40;
        check(|i| random(i) as f32, "distinct");
        check(|i| (random(i) % 4) as f32, "few levels, and zero");
        check(|i| 1.0 + (random(i) % 3) as f32, "few levels");
        check(|_| 2.0, "one level");
        check(|i| if random(i) % 3 == 0 { f32::NAN } else { (random(i) % 1000) as f32 }, "a third takes no part");
        // The sample sees nothing of the end.
        check(|i| if i > 399_000 { 9.0 + (i % 7) as f32 } else { (i % 2) as f32 }, "uneven");
        check(|i| if i % 390 == 389 { f32::NAN } else { (i / 1000) as f32 }, "in order");
    }

    #[test]
    fn the_first_block_without_a_score_is_named() {
        for count in [2000, 400_000] {
            let scores = Scores(count, |i| if i % 1999 == 1998 { f32::INFINITY } else { (i % 977) as f32 });
            let found = largest(&scores, count as u64, &[1], || panic!("it ends before that")).unwrap();
            assert_eq!(found, Found::NoScore(1024, 1024.min(count - 1024)));
        }
    }
}
