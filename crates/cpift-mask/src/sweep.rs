//! The exact choice of a part's `k` largest scores: a guess at the threshold from a sample of the
//! scores, and one pass over the part where the guess is right, else an exact search and a second
//! pass.
//!
//! The first pass checks and hashes all elements, writes the bits of those above the guess, and
//! keeps those it leaves open. Equal scores are chosen in the order of
//! [`cpift_core::stream::ties`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use cpift_core::dispatch;
use cpift_core::format::mask::{MaskWriter, Metric, Ties, clear_flagged, count_ones, flags_of};
use cpift_core::stream::cuts::Guess;
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::stream::random::splitmix64;
use cpift_core::stream::select::{Cut, GROUP, Score, Source, find_cut, split};
use cpift_core::stream::ties::{HashBand, TieCut, TieKey, find_tie_cut};
use rayon::prelude::*;

use crate::inputs::InputDigests;
use crate::part::{Arithmetic, Block, CHUNK, Chunk, Pair, Part, PartScores, refuse_not_finite};

/// [`Pass::limit`] of the program. In f32 a candidate takes 6 bytes, and 4 more while it is
/// settled.
pub const LIMIT: usize = 32 << 20;

/// Consecutive elements per run of the sample.
const RUN: usize = 64;

/// Largest number of runs; a small part has one run per [`SHARE`] elements.
const RUNS: usize = 16 * 1024;
const SHARE: usize = 1024;

/// Parts up to this size are not sampled: all their elements are candidates, if `limit` allows.
const SMALL: u64 = 64 * 1024;

/// Settings and outputs of a pass over the elements.
pub struct Pass<'a> {
    /// The quantity that is ranked.
    pub metric: Metric,
    /// Writer of the mask.
    pub writer: &'a MaskWriter,
    /// Digests of the inputs, computed in the passes that read them.
    pub digests: &'a InputDigests<'a>,
    /// Largest number of candidates kept per part.
    pub limit: usize,
    /// Called with the number of bytes read.
    pub done: &'a (dyn Fn(u64) + Sync),
}

/// The elements chosen in a part.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice<T> {
    /// Smallest chosen score, and its ties.
    pub cut: Cut<T>,
    /// Flags of the chunks that have elements chosen among equals.
    pub flags: Vec<ChunkFlags>,
}

/// One bit per chosen element of a chunk: true if it was chosen among equals.
#[derive(Debug, Clone, PartialEq)]
pub struct ChunkFlags {
    /// Index in the part's chunks.
    pub chunk: usize,
    /// The packed bits.
    pub flags: Box<[u8]>,
}

/// Guesses the `k`-th largest score of `part`, 1 ≤ k ≤ its size, leaving at most about `limit`
/// candidates.
pub fn guess<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric, k: u64, limit: usize) -> Guess<T> {
    let n = part.numel();
    if n <= SMALL.min(limit as u64) {
        return Guess::everything();
    }
    Guess::from_sample(sample(part, metric), k, n, limit)
}

/// Scores of runs spread evenly over the part, each at a random offset in its stretch. The same on
/// every machine.
fn sample<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric) -> Vec<T> {
    let runs = (part.numel() as usize / SHARE).clamp(1, RUNS);
    let chunks = part.chunks.len();
    let scores = (0..runs).into_par_iter().with_min_len(256).map_init(Block::<T>::new, |block, run| {
        let (from, to) = (run * chunks / runs, (run + 1) * chunks / runs);
        let random = splitmix64(0, run as u64);
        let Chunk { pair, start, len } = part.chunks[from + random as usize % (to - from).max(1)];
        let offset = (random >> 32) as usize % (len.saturating_sub(RUN) + 1);
        dispatch!(block.scores(part, pair, metric, start + offset, RUN.min(len)).to_vec())
    });
    scores.flatten_iter().collect()
}

/// Chooses the `k` largest scores of a part and writes their bits. Returns `None` if `k` is 0.
///
/// # Errors
/// As [`sweep`] and [`emit`].
pub(crate) fn choose<T: Score + Arithmetic>(part: &Part<'_>, k: u64, pass: &Pass<'_>) -> Result<Option<Choice<T>>> {
    if k == 0 {
        sweep(part, Guess::<T>::nothing(), pass)?;
        return Ok(None);
    }
    let guess = guess(part, pass.metric, k, pass.limit);
    if let Some(choice) = sweep(part, guess, pass)?.settle(part, k, pass)? {
        return Ok(Some(choice));
    }
    log::info!("{}: the sampled threshold was wrong; searching all scores", part.label);
    let cut = find_cut(&PartScores { part, metric: pass.metric }, k);
    let flags = emit(part, &cut, k, pass)?;
    Ok(Some(Choice { cut, flags }))
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
    /// Elements equal to `score`.
    Tied {
        score: T,
        /// Number of all of them.
        tied: u64,
        /// Number of those whose hashes lie below the band; their bits are written, with `flags`.
        taken: u64,
        flags: Vec<ChunkFlags>,
        /// Those whose hashes lie in the band, by chunk; none of their bits are written.
        open: Vec<Candidates<T>>,
    },
}

/// Elements of a chunk that are left open, in order.
struct Candidates<T> {
    chunk: usize,
    index: Box<[u16]>,
    /// Their scores; empty if all are equal.
    score: Box<[T]>,
}

/// Keys of the tie hashes of each pair of `part`; they need the digest of the tuned checkpoint.
fn tie_keys(part: &Part<'_>, pass: &Pass<'_>) -> Result<Vec<TieKey>> {
    let salt = pass.digests.tie_salt()?;
    Ok(part.pairs.iter().map(|pair| salt.key(pair.base.name)).collect())
}

/// Order of the elements of a part whose hashes are equal.
#[inline(always)]
fn place(chunk: usize, index: u16) -> u64 {
    (chunk * CHUNK) as u64 + u64::from(index)
}

struct Worker<T> {
    block: Block<T>,
    bits: Vec<u8>,
    taken: Vec<u8>,
    index: Vec<u16>,
    score: Vec<T>,
    found: Vec<Candidates<T>>,
    flags: Vec<ChunkFlags>,
    sums: Counts,
    result: Result<()>,
    /// First chunk with a score that is not finite.
    not_finite: Option<usize>,
}

/// Numbers of elements.
#[derive(Clone, Copy, Default)]
struct Counts {
    above: u64,
    /// Inside the bracket, or equal to the guessed threshold.
    inside: u64,
    /// Those of them whose hashes lie below the band.
    taken: u64,
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
        if let (Some(hasher), Some(index)) = (hasher, index) {
            hasher.add(index, chunk.start, view.slice(chunk.start, chunk.len));
        }
    }
}

/// Reads `part` once: checks and hashes its elements, writes the bits above `guess`, and keeps
/// those that the guess leaves open.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the first element, by position, that is NaN or infinite, or a
/// negative square; I/O errors.
pub fn sweep<T: Score + Arithmetic>(part: &Part<'_>, guess: Guess<T>, pass: &Pass<'_>) -> Result<ScanResult<T>> {
    let keys = match guess {
        Guess::Bracket { .. } => Vec::new(),
        Guess::Tied { .. } => tie_keys(part, pass)?,
    };
    let hashers = pass.digests.hashers();
    let (kept, limit) = (AtomicUsize::new(0), guess.limit(pass.limit));
    let workers = each(part.chunks.len(), Worker::<T>::new, |worker, i| {
        if worker.result.is_ok() {
            hash(hashers, &part.pairs[part.chunks[i].pair], part.chunks[i]);
            worker.result = worker.chunk(part, i, guess, &keys, pass, (&kept, limit));
        }
    });
    if let Some(first) = workers.iter().filter_map(|w| w.not_finite).min() {
        // |Δ| can overflow although both values are finite, so look for the value from this chunk
        // on.
        part.chunks[first..].iter().try_for_each(|chunk| refuse_not_finite::<T>(&part.pairs[chunk.pair], *chunk))?;
    }
    let (mut sums, mut candidates, mut flags) = (Counts::default(), Vec::new(), Vec::new());
    for worker in workers {
        worker.result?;
        sums.add(worker.sums);
        candidates.extend(worker.found);
        flags.extend(worker.flags);
    }
    candidates.sort_unstable_by_key(|c| c.chunk);
    flags.sort_unstable_by_key(|f: &ChunkFlags| f.chunk);
    let open = match guess {
        _ if kept.into_inner() > limit => Open::Lost,
        Guess::Tied { score, .. } => {
            Open::Tied { score, tied: sums.inside, taken: sums.taken, flags, open: candidates }
        }
        Guess::Bracket { .. } => Open::Kept(candidates),
    };
    Ok(ScanResult { above: sums.above, open })
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.above += other.above;
        self.inside += other.inside;
        self.taken += other.taken;
    }
}

impl<T: Score + Arithmetic> Worker<T> {
    fn new() -> Self {
        Self {
            block: Block::new(),
            bits: Vec::new(),
            taken: Vec::new(),
            index: Vec::new(),
            score: Vec::new(),
            found: Vec::new(),
            flags: Vec::new(),
            sums: Counts::default(),
            result: Ok(()),
            not_finite: None,
        }
    }

    fn chunk(
        &mut self,
        part: &Part<'_>,
        i: usize,
        guess: Guess<T>,
        keys: &[TieKey],
        pass: &Pass<'_>,
        (kept, limit): (&AtomicUsize, usize),
    ) -> Result<()> {
        let chunk = part.chunks[i];
        let pair = &part.pairs[chunk.pair];
        self.bits.clear();
        self.taken.clear();
        self.index.clear();
        self.score.clear();
        let (counts, finite) = match guess {
            Guess::Bracket { low, high } => dispatch!(self.classify(part, chunk, (low, high), pass.metric)),
            Guess::Tied { score, band } => {
                dispatch!(self.draw(part, chunk, score, (keys[chunk.pair], band), pass.metric))
            }
        };
        if !finite {
            self.not_finite = Some(self.not_finite.map_or(i, |o| o.min(i)));
        }
        self.sums.add(counts);
        if counts.above + counts.taken > 0 {
            pass.writer.write(pair.base.name, chunk.start as u64 / 8, &self.bits)?;
        }
        if counts.taken > 0 {
            self.flags.push(ChunkFlags { chunk: i, flags: dispatch!(flags_of(&self.bits, &self.taken)).into() });
        }
        let open = self.index.len();
        if open > 0 && kept.fetch_add(open, Ordering::Relaxed) <= limit {
            let (index, score) = (self.index.as_slice().into(), self.score.as_slice().into());
            self.found.push(Candidates { chunk: i, index, score });
        }
        (pass.done)(part.chunk_bytes(chunk));
        Ok(())
    }

    /// Puts the bits above the bracket into `bits`, and the candidates inside it into `index` and
    /// `score`. Returns true if all scores are finite.
    #[inline(always)]
    fn classify(&mut self, part: &Part<'_>, chunk: Chunk, (low, high): (T, T), metric: Metric) -> (Counts, bool) {
        let (mut counts, mut finite) = (Counts::default(), true);
        self.bits.resize(chunk.len.div_ceil(GROUP) * 8, 0);
        for (start, len) in chunk.blocks() {
            let scores = self.block.scores(part, chunk.pair, metric, start, len);
            finite &= scores.iter().fold(true, |all, s| all & s.is_finite());
            let first = (start - chunk.start) / GROUP;
            let words = &mut self.bits.as_chunks_mut::<8>().0[first..];
            for ((group, values), word) in scores.chunks(GROUP).enumerate().zip(words) {
                // Most groups hold nothing of interest.
                if !values.iter().fold(false, |any, s| any | (*s >= low)) {
                    continue;
                }
                let (over, mut inside) = split(values, low, high);
                counts.above += u64::from(over.count_ones());
                counts.inside += u64::from(inside.count_ones());
                *word = over.to_le_bytes();
                while inside != 0 {
                    let bit = inside.trailing_zeros() as usize;
                    self.index.push((start - chunk.start + GROUP * group + bit) as u16);
                    self.score.push(values[bit]);
                    inside &= inside - 1;
                }
            }
        }
        self.bits.truncate(chunk.len.div_ceil(8));
        (counts, finite)
    }

    /// Puts the bits above `score` into `bits`. Of the elements equal to it, those whose hashes lie
    /// below the band go into `bits` and `taken`, those in the band into `index`. Returns true if
    /// all scores are finite.
    #[inline(always)]
    fn draw(
        &mut self,
        part: &Part<'_>,
        chunk: Chunk,
        score: T,
        (key, band): (TieKey, HashBand),
        metric: Metric,
    ) -> (Counts, bool) {
        let (mut counts, mut finite) = (Counts::default(), true);
        self.bits.resize(chunk.len.div_ceil(GROUP) * 8, 0);
        self.taken.resize(self.bits.len(), 0);
        for (start, len) in chunk.blocks() {
            let scores = self.block.scores(part, chunk.pair, metric, start, len);
            finite &= scores.iter().fold(true, |all, s| all & s.is_finite());
            let first = (start - chunk.start) / GROUP;
            let words = self.bits.as_chunks_mut::<8>().0[first..].iter_mut();
            let words = words.zip(&mut self.taken.as_chunks_mut::<8>().0[first..]);
            for ((group, values), (word, taken_word)) in scores.chunks(GROUP).enumerate().zip(words) {
                let (over, inside) = split(values, score, score);
                if over | inside == 0 {
                    continue;
                }
                counts.above += u64::from(over.count_ones());
                counts.inside += u64::from(inside.count_ones());
                let (taken, mut open) = key.split(start + GROUP * group, inside, band);
                while open != 0 {
                    self.index.push((start - chunk.start + GROUP * group + open.trailing_zeros() as usize) as u16);
                    open &= open - 1;
                }
                counts.taken += u64::from(taken.count_ones());
                *word = (over | taken).to_le_bytes();
                *taken_word = taken.to_le_bytes();
            }
        }
        self.bits.truncate(chunk.len.div_ceil(8));
        self.taken.truncate(chunk.len.div_ceil(8));
        (counts, finite)
    }
}

impl<T: Score + Arithmetic> ScanResult<T> {
    /// Chooses among the open elements so that the `k` largest scores are chosen, and writes their
    /// bits. Returns `None` if the guess was wrong or left too many elements open.
    pub fn settle(self, part: &Part<'_>, k: u64, pass: &Pass<'_>) -> Result<Option<Choice<T>>> {
        let count = |candidates: &[Candidates<T>]| candidates.iter().map(|c| c.index.len() as u64).sum::<u64>();
        let above = self.above;
        match self.open {
            Open::Kept(found) if above < k && k <= above + count(&found) => {
                settle_kept(&found, part, k - above, pass).map(Some)
            }
            Open::Tied { score, tied, taken, flags, open } => {
                let fits = above < k && above + taken <= k && k <= above + taken + count(&open);
                if !fits {
                    return Ok(None);
                }
                let flags = settle_tied(&open, flags, part, k - above - taken, pass)?;
                Ok(Some(Choice::new(score, tied, k - above, flags)))
            }
            _ => Ok(None),
        }
    }
}

impl<T> Choice<T> {
    /// A choice of `chosen` of `tied` elements equal to `threshold`.
    fn new(threshold: T, tied: u64, chosen: u64, flags: Vec<ChunkFlags>) -> Self {
        let split = chosen < tied;
        let ties = Ties { at_threshold: tied, chosen, decided_by_hash: if split { chosen } else { 0 } };
        Self { cut: Cut { threshold, ties }, flags: if split { flags } else { Vec::new() } }
    }
}

/// Writes the bits of the `k` largest candidates.
fn settle_kept<T: Score>(candidates: &[Candidates<T>], part: &Part<'_>, k: u64, pass: &Pass<'_>) -> Result<Choice<T>> {
    let cut = cut(candidates, k);
    let Ties { at_threshold, chosen, decided_by_hash } = cut.ties;
    let keys = if decided_by_hash > 0 { Some(tie_keys(part, pass)?) } else { None };
    let last = keys.as_ref().map_or(TieCut::ALL, |keys| {
        find_tie_cut(candidates.len(), at_threshold, chosen, |i, count| {
            let Candidates { chunk, index, score } = &candidates[i];
            let hash = hash_of(part, keys, *chunk);
            for (at, score) in index.iter().zip(score) {
                if *score == cut.threshold {
                    count.add(hash(*at), place(*chunk, *at));
                }
            }
        })
    });
    let write = |found: &Candidates<T>| {
        let mut chunk = ChunkBits::read(part, found.chunk, &[], pass.writer)?;
        let hash = keys.as_ref().map(|keys| hash_of(part, keys, found.chunk));
        for (&at, &score) in found.index.iter().zip(&found.score) {
            if score > cut.threshold {
                chunk.choose(at, false);
            } else if score == cut.threshold {
                let first = hash.as_ref().map(|hash| last.chooses(hash(at), place(found.chunk, at)));
                if first.unwrap_or(true) {
                    chunk.choose(at, first.is_some());
                }
            }
        }
        chunk.write(part, pass.writer)
    };
    let flags: Vec<Option<ChunkFlags>> = candidates.par_iter().map(write).collect::<Result<_>>()?;
    Ok(Choice { cut, flags: flags.into_iter().flatten().collect() })
}

/// Writes the bits of the first `k` open ties. Returns all flags.
fn settle_tied<T: Score>(
    open: &[Candidates<T>],
    flags: Vec<ChunkFlags>,
    part: &Part<'_>,
    k: u64,
    pass: &Pass<'_>,
) -> Result<Vec<ChunkFlags>> {
    if k == 0 {
        return Ok(flags);
    }
    let keys = tie_keys(part, pass)?;
    let n = open.iter().map(|c| c.index.len() as u64).sum();
    let last = find_tie_cut(open.len(), n, k, |i, count| {
        let Candidates { chunk, index, .. } = &open[i];
        let hash = hash_of(part, &keys, *chunk);
        index.iter().for_each(|at| count.add(hash(*at), place(*chunk, *at)));
    });
    let mut flags: BTreeMap<usize, Box<[u8]>> = flags.into_iter().map(|f| (f.chunk, f.flags)).collect();
    let write = |found: &Candidates<T>| {
        let known = flags.get(&found.chunk).map_or(&[][..], |flags| flags);
        let mut chunk = ChunkBits::read(part, found.chunk, known, pass.writer)?;
        let hash = hash_of(part, &keys, found.chunk);
        for at in &found.index {
            if last.chooses(hash(*at), place(found.chunk, *at)) {
                chunk.choose(*at, true);
            }
        }
        chunk.write(part, pass.writer)
    };
    let changed: Vec<Option<ChunkFlags>> = open.par_iter().map(write).collect::<Result<_>>()?;
    flags.extend(changed.into_iter().flatten().map(|f| (f.chunk, f.flags)));
    Ok(flags.into_iter().map(|(chunk, flags)| ChunkFlags { chunk, flags }).collect())
}

/// Tie hashes of the elements of a chunk.
#[inline(always)]
fn hash_of(part: &Part<'_>, keys: &[TieKey], chunk: usize) -> impl Fn(u16) -> u64 {
    let Chunk { pair, start, .. } = part.chunks[chunk];
    let key = keys[pair];
    move |at| key.hash(start + usize::from(at))
}

/// Threshold of the `k` largest candidates.
fn cut<T: Score>(candidates: &[Candidates<T>], k: u64) -> Cut<T> {
    let mut keys: Vec<T> = candidates.iter().flat_map(|c| c.score.iter().copied()).collect();
    let place = keys.len() - k as usize;
    let order = |a: &T, b: &T| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal);
    let threshold = *keys.select_nth_unstable_by(place, order).1;
    let at_threshold = keys.iter().filter(|s| **s == threshold).count() as u64;
    let chosen = k - keys.iter().filter(|s| **s > threshold).count() as u64;
    Choice::new(threshold, at_threshold, chosen, Vec::new()).cut
}

/// The bits of a chunk whose first pass is done, to choose more elements.
struct ChunkBits {
    chunk: usize,
    bits: Vec<u8>,
    /// Elements chosen among equals.
    tied: Vec<u8>,
    changed: bool,
}

impl ChunkBits {
    /// Reads the bits back; `flags` are those of the elements chosen so far, none if it is empty.
    fn read(part: &Part<'_>, chunk: usize, flags: &[u8], writer: &MaskWriter) -> Result<Self> {
        let Chunk { pair, start, len } = part.chunks[chunk];
        let mut bits = vec![0; len.div_ceil(8)];
        writer.read(part.pairs[pair].base.name, start as u64 / 8, &mut bits)?;
        let mut tied = vec![0; bits.len()];
        if !flags.is_empty() {
            tied.copy_from_slice(&bits);
            dispatch!(clear_flagged(&mut tied, flags, 0));
            tied.iter_mut().zip(&bits).for_each(|(t, b)| *t ^= b);
        }
        Ok(Self { chunk, bits, tied, changed: false })
    }

    fn choose(&mut self, at: u16, tied: bool) {
        let (byte, bit) = (usize::from(at) / 8, 1 << (at % 8));
        self.bits[byte] |= bit;
        self.tied[byte] |= if tied { bit } else { 0 };
        self.changed = true;
    }

    /// Writes the bits if any was added; returns their flags if any is set.
    fn write(&self, part: &Part<'_>, writer: &MaskWriter) -> Result<Option<ChunkFlags>> {
        let Chunk { pair, start, .. } = part.chunks[self.chunk];
        if self.changed {
            writer.write(part.pairs[pair].base.name, start as u64 / 8, &self.bits)?;
        }
        Ok(ChunkFlags::of(self.chunk, &self.bits, &self.tied))
    }
}

impl ChunkFlags {
    /// Flags of the `bits` of a chunk that are set in `tied`; `None` if none is.
    fn of(chunk: usize, bits: &[u8], tied: &[u8]) -> Option<Self> {
        let any = tied.iter().any(|byte| *byte != 0);
        any.then(|| Self { chunk, flags: dispatch!(flags_of(bits, tied)).into() })
    }
}

/// Writes all bits of `part`, of which `k` are set, once `cut` is known from an exact search.
///
/// # Errors
/// I/O errors; inputs that changed while they were read.
pub fn emit<T: Score + Arithmetic>(part: &Part<'_>, cut: &Cut<T>, k: u64, pass: &Pass<'_>) -> Result<Vec<ChunkFlags>> {
    let Ties { at_threshold, chosen, decided_by_hash } = cut.ties;
    let source = PartScores { part, metric: pass.metric };
    let keys = if decided_by_hash > 0 { Some(tie_keys(part, pass)?) } else { None };
    let last = keys.as_ref().map_or(TieCut::ALL, |keys| {
        find_tie_cut(part.chunks.len(), at_threshold, chosen, |i, count| {
            let mut scores = Vec::<T>::new();
            source.scores(i, &mut scores);
            let hash = hash_of(part, keys, i);
            for (at, score) in (0u16..=u16::MAX).zip(&scores) {
                if *score == cut.threshold {
                    count.add(hash(at), place(i, at));
                }
            }
        })
    });
    let write = |(scores, bits, tied): &mut (Vec<T>, Vec<u8>, Vec<u8>), i: usize| -> Result<_> {
        let chunk = part.chunks[i];
        source.scores(i, scores);
        pack(scores, bits, |_, s| s > cut.threshold || keys.is_none() && s == cut.threshold);
        let mut flags = None;
        if let Some(keys) = &keys {
            let hash = hash_of(part, keys, i);
            let chosen = |at: usize| last.chooses(hash(at as u16), place(i, at as u16));
            pack(scores, tied, |at, s| s == cut.threshold && chosen(at));
            bits.iter_mut().zip(&*tied).for_each(|(b, t)| *b |= t);
            flags = ChunkFlags::of(i, bits, tied);
        }
        pass.writer.write(part.pairs[chunk.pair].base.name, chunk.start as u64 / 8, bits)?;
        Ok((count_ones(bits), flags))
    };
    let written: Vec<(u64, Option<ChunkFlags>)> =
        (0..part.chunks.len()).into_par_iter().map_init(Default::default, write).collect::<Result<_>>()?;
    let selected: u64 = written.iter().map(|(n, _)| n).sum();
    ensure!(
        selected == k,
        "chose {selected} elements where {k} were asked for: the checkpoints changed while they were read"
    );
    Ok(written.into_iter().filter_map(|(_, flags)| flags).collect())
}

/// Packs the elements for which `chosen(index, score)` is true; bit b of byte a is element 8a + b.
pub(crate) fn pack<T: Copy>(scores: &[T], bytes: &mut Vec<u8>, chosen: impl Fn(usize, T) -> bool) {
    bytes.clear();
    let byte = |(a, values): (usize, &[T])| {
        values.iter().enumerate().fold(0u8, |byte, (b, s)| byte | u8::from(chosen(8 * a + b, *s)) << b)
    };
    bytes.extend(scores.chunks(8).enumerate().map(byte));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_packed_little_end_first() {
        let scores = [3f32, 1.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 5.0, 2.0];
        let packed = |chosen: &dyn Fn(usize, f32) -> bool| {
            let mut bytes = Vec::new();
            pack(&scores, &mut bytes, chosen);
            bytes
        };
        assert_eq!(packed(&|_, s| s > 2.0), [0b0000_0001, 0b01]);
        assert_eq!(packed(&|at, s| s > 2.0 || s == 2.0 && at > 3), [0b0010_0001, 0b11]);
    }
}
