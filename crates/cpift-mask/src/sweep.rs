//! The exact choice of a part's `k` largest scores: one pass over the part where the guess of
//! [`crate::bracket`] is right, else an exact search and a second pass.
//!
//! The first pass checks and hashes all elements, writes the bits of those above the guess, and
//! keeps or counts those it leaves open.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use cpift_core::dispatch;
use cpift_core::format::mask::{MaskWriter, Metric, Ties, count_ones};
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::stream::select::{Cut, Score, Source, find_cut};
use rayon::prelude::*;

use crate::bracket::{Guess, guess};
use crate::part::{Arithmetic, Block, Chunk, Pair, Part, PartScores, refuse_not_finite};

/// [`Pass::limit`] of the program. In f32 a candidate takes 6 bytes, and 4 more while it is
/// settled.
pub const LIMIT: usize = 32 << 20;

/// Settings and outputs of a pass over the elements.
pub struct Pass<'a> {
    /// The quantity that is ranked.
    pub metric: Metric,
    /// Writer of the mask.
    pub writer: &'a MaskWriter,
    /// Hashers of base, tuned and fisher; `None` for an input whose digest is recorded.
    pub hashers: [Option<&'a PieceHasher>; 3],
    /// Largest number of candidates kept per part.
    pub limit: usize,
    /// Called with the number of bytes read.
    pub done: &'a (dyn Fn(u64) + Sync),
}

/// Chooses the `k` largest scores of a part and writes their bits. Returns `None` if `k` is 0.
///
/// # Errors
/// As [`sweep`] and [`emit`].
pub(crate) fn choose<T: Score + Arithmetic>(part: &Part<'_>, k: u64, pass: &Pass<'_>) -> Result<Option<Cut<T>>> {
    if k == 0 {
        sweep(part, Guess::<T>::nothing(), pass)?;
        return Ok(None);
    }
    let guess = guess(part, pass.metric, k, pass.limit);
    if let Some(cut) = sweep(part, guess, pass)?.settle(part, k, pass)? {
        return Ok(Some(cut));
    }
    log::info!("{}: the sampled threshold was wrong; searching all scores", part.label);
    let cut = find_cut(&PartScores { part, metric: pass.metric }, k);
    emit(part, &cut, k, pass)?;
    Ok(Some(cut))
}

/// Result of one pass over a part.
pub struct ScanResult<T> {
    /// Number of elements above the guess; their bits are written.
    above: u64,
    open: Open<T>,
}

/// Elements that the guess does not decide.
enum Open<T> {
    /// Elements inside the bracket by chunk, in order; none of their bits are written.
    Kept(Vec<Candidates<T>>),
    /// Too many to keep.
    Lost,
    /// Number of elements equal to `score` per chunk; their bits are written in the first `taken`
    /// chunks.
    Tied { score: T, counts: Vec<u64>, taken: usize },
}

/// Elements of a chunk inside the bracket, in order.
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
    /// Number of elements inside, by chunk.
    inside: Vec<(usize, u64)>,
    above: u64,
    result: Result<()>,
    /// First chunk with a score that is not finite.
    not_finite: Option<usize>,
}

/// Runs `step` on the indices 0..n in no particular order; every thread has its own state.
fn each<S: Send>(n: usize, init: impl Fn() -> S + Sync, step: impl Fn(&mut S, usize) + Sync) -> Vec<S> {
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

/// Hashes a chunk of every input.
pub(crate) fn hash(hashers: [Option<&PieceHasher>; 3], pair: &Pair<'_>, chunk: Chunk) {
    for ((hasher, view), index) in hashers.iter().zip(pair.views()).zip(pair.positions) {
        if let Some(hasher) = hasher {
            hasher.add(index, chunk.start, view.slice(chunk.start, chunk.len));
        }
    }
}

/// Reads `part` once: checks and hashes its elements, writes the bits above `guess`, and keeps or
/// counts those that the guess leaves open.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the first element, by position, that is NaN or infinite, or a
/// negative square; I/O errors.
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
    if let Some(first) = workers.iter().filter_map(|w| w.not_finite).min() {
        // |Δ| can overflow although both values are finite, so look for the value from this chunk
        // on.
        part.chunks[first..].iter().try_for_each(|chunk| refuse_not_finite::<T>(&part.pairs[chunk.pair], *chunk))?;
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
            not_finite: None,
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
            self.not_finite = Some(self.not_finite.map_or(i, |o| o.min(i)));
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

    /// Puts the bits above the guess into `bits`, with ties if `take` is true, and the candidates
    /// of a bracket into `index` and `score`. Returns the numbers above and inside, and true if all
    /// scores are finite.
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
    /// Chooses among the open elements so that the `k` largest scores are chosen, and writes their
    /// bits. Returns `None` if the guess was wrong or left too many elements open.
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

/// Distributes `chosen` ties over chunks with `counts` ties, in order of position.
fn allot(mut chosen: u64, counts: impl Iterator<Item = u64>) -> impl Iterator<Item = u64> {
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
    let jobs: Vec<(&Candidates<T>, u64)> = candidates.iter().zip(allot(cut.ties.chosen, ties)).collect();
    jobs.into_par_iter().try_for_each(|(found, room)| found.write(part, cut.threshold, room, writer))?;
    Ok(cut)
}

/// Writes the bits of the first `k` ties. Only chunks between the guessed and the real last one are
/// read again.
fn settle_tied<T: Score + Arithmetic>(
    threshold: T,
    counts: &[u64],
    taken: usize,
    part: &Part<'_>,
    k: u64,
    pass: &Pass<'_>,
) -> Result<Cut<T>> {
    let rooms: Vec<u64> = allot(k, counts.iter().copied()).collect();
    let wrong = |i: &usize| rooms[*i] != if *i < taken { counts[*i] } else { 0 };
    let jobs: Vec<usize> = (0..counts.len()).filter(wrong).collect();
    jobs.into_par_iter()
        .map_init(Packer::new, |packer, i| packer.write(part, i, threshold, rooms[i], pass))
        .try_for_each(|written| written.map(drop))?;
    let at_threshold = counts.iter().sum();
    let decided_by_position = if k < at_threshold { k } else { 0 };
    Ok(Cut { threshold, ties: Ties { at_threshold, chosen: k, decided_by_position } })
}

/// Threshold of the `k` largest candidates.
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
    /// Sets the bits of the candidates above the threshold and of the first `room` candidates equal
    /// to it.
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

/// Writes the bits of chunks whose threshold is known.
struct Packer<T> {
    scores: Vec<T>,
    bytes: Vec<u8>,
}

impl<T: Score + Arithmetic> Packer<T> {
    pub fn new() -> Self {
        Self { scores: Vec::new(), bytes: Vec::new() }
    }

    /// Writes the bits of chunk `i`: the elements above the threshold and the first `room` equal to
    /// it. Returns the number of bits set.
    pub fn write(&mut self, part: &Part<'_>, i: usize, threshold: T, room: u64, pass: &Pass<'_>) -> Result<u64> {
        let chunk = part.chunks[i];
        PartScores { part, metric: pass.metric }.scores(i, &mut self.scores);
        pack(&self.scores, threshold, room, &mut self.bytes);
        pass.writer.write(part.pairs[chunk.pair].base.name, chunk.start as u64 / 8, &self.bytes)?;
        Ok(count_ones(&self.bytes))
    }
}

impl<T: Score + Arithmetic> Default for Packer<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes all bits of `part`, of which `k` are set, once `cut` is known from an exact search.
///
/// # Errors
/// I/O errors; inputs that changed while they were read.
pub fn emit<T: Score + Arithmetic>(part: &Part<'_>, cut: &Cut<T>, k: u64, pass: &Pass<'_>) -> Result<()> {
    let position_decides = cut.ties.decided_by_position > 0;
    let before = position_decides.then(|| ties_before(part, pass.metric, cut.threshold));
    let selected = (0..part.chunks.len())
        .into_par_iter()
        .map_init(Packer::new, |packer, i| {
            // Ties that this chunk may still choose: all of them if position decides nothing.
            let room = before.as_ref().map_or(u64::MAX, |counts| cut.ties.chosen.saturating_sub(counts[i]));
            packer.write(part, i, cut.threshold, room, pass)
        })
        .try_reduce(|| 0, |a, b| Ok(a + b))?;
    ensure!(
        selected == k,
        "chose {selected} elements where {k} were asked for: the checkpoints changed while they were read"
    );
    Ok(())
}

/// Number of elements equal to the threshold before each chunk.
fn ties_before<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric, threshold: T) -> Vec<u64> {
    let source = PartScores { part, metric };
    let count = |scores: &mut Vec<T>, i| {
        source.scores(i, scores);
        scores.iter().filter(|s| **s == threshold).count() as u64
    };
    let mut counts: Vec<u64> = (0..part.chunks.len()).into_par_iter().map_init(Vec::new, count).collect();
    let mut before = 0;
    for count in &mut counts {
        before += std::mem::replace(count, before);
    }
    counts
}

/// Packs `score > threshold`, and the first `room` elements equal to it; bit b of byte a is element
/// 8a + b.
fn pack<T: Score>(scores: &[T], threshold: T, mut room: u64, bytes: &mut Vec<u8>) {
    match room {
        0 => pack_where(scores, bytes, |s| s > threshold),
        // Room for every element: no need to count ties.
        _ if room >= scores.len() as u64 => pack_where(scores, bytes, |s| s >= threshold),
        _ => pack_where(scores, bytes, |s| {
            let tie = s == threshold && room > 0;
            room -= u64::from(tie);
            tie || s > threshold
        }),
    }
}

fn pack_where<T: Copy>(scores: &[T], bytes: &mut Vec<u8>, mut chosen: impl FnMut(T) -> bool) {
    bytes.clear();
    let (eights, rest) = scores.as_chunks::<8>();
    let mut byte = |values: &[T]| (0..).zip(values).fold(0u8, |byte, (b, s)| byte | u8::from(chosen(*s)) << b);
    bytes.extend(eights.iter().map(|eight| byte(eight)));
    if !rest.is_empty() {
        bytes.push(byte(rest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_packed_little_end_first_and_ties_fill_the_room_in_order() {
        let scores = [3f32, 1.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 5.0, 2.0];
        let packed = |room| {
            let mut bytes = Vec::new();
            pack(&scores, 2.0, room, &mut bytes);
            bytes
        };
        assert_eq!(packed(0), [0b0000_0001, 0b01]);
        assert_eq!(packed(2), [0b0000_1101, 0b01]);
        assert_eq!(packed(3), [0b0010_1101, 0b01]);
        assert_eq!(packed(u64::MAX), [0b0010_1101, 0b11]);
    }
}
