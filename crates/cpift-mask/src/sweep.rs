//! One pass over a part: bits of what is surely chosen are written, what may be chosen is kept or counted, all of it is checked
//! and hashed. Then what is left open is settled.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use cpift_core::dispatch;
use cpift_core::format::mask::{MaskWriter, Metric, Ties};
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::stream::select::{Cut, Score};
use rayon::prelude::*;

use crate::bracket::Guess;
use crate::emit::Packer;
use crate::parts::{Chunk, Pair, Part};
use crate::scores::{Arithmetic, Block, refuse_unusable};

/// [`Pass::limit`] of the program: for f32, 6 bytes each and 4 more while they are settled.
pub const LIMIT: usize = 32 << 20;

/// What every pass over the elements needs.
pub struct Pass<'a> {
    /// The quantity that is ranked.
    pub metric: Metric,
    /// The mask under construction.
    pub writer: &'a MaskWriter,
    /// Where the pieces of base, tuned and fisher are hashed, where no digest of theirs is recorded.
    pub hashers: [Option<&'a PieceHasher>; 3],
    /// Most candidates of a part that are kept.
    pub limit: usize,
    /// Told the number of bytes read.
    pub done: &'a (dyn Fn(u64) + Sync),
}

/// What one pass found out about a part.
pub struct ScanResult<T> {
    /// Elements above the guess; their bits are written.
    above: u64,
    open: Open<T>,
}

/// Elements that the guess leaves open.
enum Open<T> {
    /// Those inside the bracket by chunk, in order; none of their bits are written.
    Kept(Vec<Candidates<T>>),
    /// Too many to keep.
    Lost,
    /// The number of elements equal to the score in each chunk; their bits are written in the first `taken` chunks.
    Tied { score: T, counts: Vec<u64>, taken: usize },
}

/// The elements of a chunk that lie inside the bracket, in order.
struct Candidates<T> {
    chunk: usize,
    index: Box<[u16]>,
    score: Box<[T]>,
}

struct Worker<T> {
    block: Block<T>,
    bits: Vec<u8>,
    index: Vec<u16>,
    score: Vec<T>,
    found: Vec<Candidates<T>>,
    /// Elements inside, of each chunk.
    inside: Vec<(usize, u64)>,
    above: u64,
    result: Result<()>,
    /// The first chunk, by position, in which a score was not finite.
    odd: Option<usize>,
}

/// Runs `step` on the indices 0..n in no particular order: every thread takes the next one with a state of its own.
pub fn each<S: Send>(n: usize, init: impl Fn() -> S + Sync, step: impl Fn(&mut S, usize) + Sync) -> Vec<S> {
    let next = AtomicUsize::new(0);
    rayon::broadcast(|_| {
        let mut state = init();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return state;
            }
            step(&mut state, i);
        }
    })
}

/// Adds a chunk of every input to its hasher.
pub fn hash(hashers: [Option<&PieceHasher>; 3], pair: &Pair<'_>, chunk: Chunk) {
    for ((hasher, view), index) in hashers.iter().zip(pair.views()).zip(pair.places) {
        if let Some(hasher) = hasher {
            hasher.add(index, chunk.start, view.slice(chunk.start, chunk.len));
        }
    }
}

/// Sweeps `part`.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the first element, by position, that is NaN or infinite, or a negative square; I/O errors.
pub fn sweep<T: Score + Arithmetic>(part: &Part<'_>, guess: Guess<T>, pass: &Pass<'_>) -> Result<ScanResult<T>> {
    let chunks = part.chunks.len();
    let taken = match guess {
        Guess::Bracket { .. } => 0,
        Guess::Tied { share, .. } => (share * chunks as f64) as usize,
    };
    let kept = AtomicUsize::new(0);
    let workers = each(chunks, Worker::<T>::new, |worker, i| {
        if worker.result.is_ok() {
            worker.result = worker.chunk(part, i, guess, i < taken, pass, &kept);
        }
    });
    if let Some(first) = workers.iter().filter_map(|w| w.odd).min() {
        // Distances can overflow although both values are finite, so the chunks from the first odd one on are read again.
        part.chunks[first..].iter().try_for_each(|chunk| refuse_unusable::<T>(&part.pairs[chunk.pair], *chunk))?;
    }
    let (mut above, mut candidates, mut counts) = (0, Vec::new(), vec![0; chunks]);
    for worker in workers {
        worker.result?;
        above += worker.above;
        candidates.extend(worker.found);
        worker.inside.into_iter().for_each(|(chunk, n)| counts[chunk] = n);
    }
    candidates.sort_unstable_by_key(|c| c.chunk);
    let open = match guess {
        Guess::Tied { score, .. } => Open::Tied { score, counts, taken },
        Guess::Bracket { .. } if kept.into_inner() <= pass.limit => Open::Kept(candidates),
        Guess::Bracket { .. } => Open::Lost,
    };
    Ok(ScanResult { above, open })
}

impl<T: Score + Arithmetic> Worker<T> {
    fn new() -> Self {
        Self {
            block: Block::new(),
            bits: Vec::new(),
            index: Vec::new(),
            score: Vec::new(),
            found: Vec::new(),
            inside: Vec::new(),
            above: 0,
            result: Ok(()),
            odd: None,
        }
    }

    fn chunk(
        &mut self,
        part: &Part<'_>,
        i: usize,
        guess: Guess<T>,
        take: bool,
        pass: &Pass<'_>,
        kept: &AtomicUsize,
    ) -> Result<()> {
        let chunk = part.chunks[i];
        let pair = &part.pairs[chunk.pair];
        hash(pass.hashers, pair, chunk);
        let (above, inside, finite) = dispatch!(self.classify(part, chunk, guess, take, pass.metric));
        if !finite {
            self.odd = Some(self.odd.map_or(i, |o| o.min(i)));
        }
        self.above += above;
        if above > 0 || take && inside > 0 {
            pass.writer.write(pair.base.name, chunk.start as u64 / 8, &self.bits)?;
        }
        if inside > 0 && matches!(guess, Guess::Tied { .. }) {
            self.inside.push((i, inside));
        } else if inside > 0 && kept.fetch_add(inside as usize, Ordering::Relaxed) <= pass.limit {
            let (index, score) = (self.index.as_slice().into(), self.score.as_slice().into());
            self.found.push(Candidates { chunk: i, index, score });
        }
        (pass.done)(part.chunk_bytes(chunk));
        Ok(())
    }

    /// Puts the chunk's bits above the guess into `bits`, ties as well where they are taken, and the candidates of a bracket into
    /// `index` and `score`; returns the numbers above and inside, and whether all scores are finite.
    #[inline(always)]
    fn classify(
        &mut self,
        part: &Part<'_>,
        chunk: Chunk,
        guess: Guess<T>,
        take: bool,
        metric: Metric,
    ) -> (u64, u64, bool) {
        let (low, high, keep) = match guess {
            Guess::Bracket { low, high } => (low, high, true),
            Guess::Tied { score, .. } => (score, score, false),
        };
        let (mut above, mut within, mut finite) = (0, 0, true);
        self.bits.clear();
        self.index.clear();
        self.score.clear();
        for (start, len) in chunk.blocks() {
            let scores = self.block.scores(part, chunk.pair, metric, start, len);
            finite &= scores.iter().fold(true, |all, s| all & s.is_finite());
            for (group, values) in scores.chunks(64).enumerate() {
                let count = values.len().div_ceil(8);
                if !values.iter().fold(false, |any, s| any | (*s >= low)) {
                    // Most groups hold nothing of interest.
                    self.bits.extend_from_slice(&[0; 8][..count]);
                    continue;
                }
                let (mut over, mut inside) = (0u64, 0u64);
                for (bit, score) in values.iter().enumerate() {
                    over |= u64::from(*score > high) << bit;
                    inside |= u64::from(*score >= low) << bit;
                }
                inside &= !over;
                above += u64::from(over.count_ones());
                within += u64::from(inside.count_ones());
                let bits = if take { over | inside } else { over };
                self.bits.extend_from_slice(&bits.to_le_bytes()[..count]);
                while keep && inside != 0 {
                    let bit = inside.trailing_zeros() as usize;
                    self.index.push((start - chunk.start + 64 * group + bit) as u16);
                    self.score.push(values[bit]);
                    inside &= inside - 1;
                }
            }
        }
        (above, within, finite)
    }
}

impl<T: Score + Arithmetic> ScanResult<T> {
    /// Settles what the guess left open, so that the `k` largest scores are chosen, and writes the bits; `None` where the guess
    /// was wrong or left too much open.
    ///
    /// # Errors
    /// I/O errors.
    pub fn settle(&self, part: &Part<'_>, k: u64, pass: &Pass<'_>) -> Result<Option<Cut<T>>> {
        let open: u64 = match &self.open {
            Open::Kept(candidates) => candidates.iter().map(|c| c.index.len() as u64).sum(),
            Open::Tied { counts, .. } => counts.iter().sum(),
            Open::Lost => return Ok(None),
        };
        if self.above >= k || self.above + open < k {
            return Ok(None);
        }
        let k = k - self.above;
        match &self.open {
            Open::Kept(candidates) => settle_kept(candidates, part, k, pass.writer).map(Some),
            Open::Tied { score, counts, taken } => settle_tied(*score, counts, *taken, part, k, pass).map(Some),
            Open::Lost => Ok(None),
        }
    }
}

/// Hands out room for `chosen` ties to chunks with so many ties each, in order of position.
fn hand_out(mut chosen: u64, counts: impl Iterator<Item = u64>) -> impl Iterator<Item = u64> {
    counts.map(move |ties| {
        let here = chosen.min(ties);
        chosen -= here;
        here
    })
}

/// Writes the bits of the `k` largest candidates.
fn settle_kept<T: Score>(candidates: &[Candidates<T>], part: &Part<'_>, k: u64, writer: &MaskWriter) -> Result<Cut<T>> {
    let cut = cut(candidates, k);
    let ties = candidates.iter().map(|c| c.score.iter().filter(|s| **s == cut.threshold).count() as u64);
    let jobs: Vec<(&Candidates<T>, u64)> = candidates.iter().zip(hand_out(cut.ties.chosen, ties)).collect();
    jobs.into_par_iter().try_for_each(|(found, room)| found.write(part, cut.threshold, room, writer))?;
    Ok(cut)
}

/// Writes the bits of the first `k` ties: only the chunks between the guessed and the real end of them are read again.
fn settle_tied<T: Score + Arithmetic>(
    threshold: T,
    counts: &[u64],
    taken: usize,
    part: &Part<'_>,
    k: u64,
    pass: &Pass<'_>,
) -> Result<Cut<T>> {
    let rooms: Vec<u64> = hand_out(k, counts.iter().copied()).collect();
    let wrong = |i: &usize| rooms[*i] != if *i < taken { counts[*i] } else { 0 };
    let jobs: Vec<usize> = (0..counts.len()).filter(wrong).collect();
    jobs.into_par_iter()
        .map_init(Packer::new, |packer, i| packer.write(part, i, threshold, rooms[i], pass))
        .try_for_each(|written| written.map(drop))?;
    let at_threshold = counts.iter().sum();
    let decided_by_position = if k < at_threshold { k } else { 0 };
    Ok(Cut { threshold, ties: Ties { at_threshold, chosen: k, decided_by_position } })
}

/// Where the candidates are cut so that the `k` largest are chosen.
fn cut<T: Score>(candidates: &[Candidates<T>], k: u64) -> Cut<T> {
    let mut keys: Vec<T> = candidates.iter().flat_map(|c| c.score.iter().copied()).collect();
    let place = keys.len() - k as usize;
    let order = |a: &T, b: &T| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal);
    let threshold = *keys.select_nth_unstable_by(place, order).1;
    let at_threshold = keys.iter().filter(|s| **s == threshold).count() as u64;
    let chosen = k - keys.iter().filter(|s| **s > threshold).count() as u64;
    let decided_by_position = if chosen < at_threshold { chosen } else { 0 };
    Cut { threshold, ties: Ties { at_threshold, chosen, decided_by_position } }
}

impl<T: Score> Candidates<T> {
    /// Sets the bits of what is above the threshold and of the first `room` elements equal to it.
    fn write(&self, part: &Part<'_>, threshold: T, mut room: u64, writer: &MaskWriter) -> Result<()> {
        let chunk = part.chunks[self.chunk];
        let (name, offset) = (part.pairs[chunk.pair].base.name, chunk.start as u64 / 8);
        let mut bits = vec![0; chunk.len.div_ceil(8)];
        writer.read(name, offset, &mut bits)?;
        let mut any = false;
        for (&at, &score) in self.index.iter().zip(&self.score) {
            let tie = score == threshold && room > 0;
            room -= u64::from(tie);
            if tie || score > threshold {
                bits[usize::from(at) / 8] |= 1 << (at % 8);
                any = true;
            }
        }
        if any { writer.write(name, offset, &bits) } else { Ok(()) }
    }
}
