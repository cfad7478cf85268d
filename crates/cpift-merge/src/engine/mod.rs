//! The passes over the tensors, in small pieces on all threads.
//!
//! Tensors are taken a few at a time: what a method must know of a whole tensor is measured, then the tensor is written
//! while its bytes are still in a cache. The unit of work is a chunk of one tensor, and what a chunk yields does not
//! depend on which thread takes it; sums over chunks are taken in the order of the tensor. So the output has the
//! same bytes at any number of threads, and a thread holds a few blocks of numbers and one chunk of output, whatever
//! the size of a tensor.

mod block;
mod hashes;
mod jobs;
mod measure;
mod trim;
mod write;

pub use block::{Block, Number};
pub use hashes::InputHashes;
pub use jobs::CHUNK;
pub use measure::TensorStats;
pub use write::Output;

use anyhow::Result;
use cpift_core::run::progress;
use cpift_core::{Dtype, TensorView};
use indicatif::ProgressBar;

use crate::cli::Space;
use crate::methods::{Claims, Conflict, Rule, Sparsify};
use jobs::{Piece, Pool};

/// One parameter in all inputs, and what is to be done with it.
pub struct Tensor<'a> {
    /// The operands' elements.
    pub operands: Vec<TensorView<'a>>,
    /// The base's elements, for methods that have one.
    pub base: Option<TensorView<'a>>,
    /// Which elements are core to which task (operand 1 is task 0), for `cpi`.
    pub claims: Claims<'a>,
    /// Outside its bits an operand counts as the backbone; empty where no operand has a mask.
    pub masks: Vec<Option<&'a [u8]>>,
    /// Where the result is the backbone.
    pub protected: Option<&'a [u8]>,
    /// How it is merged.
    pub rule: &'a Rule,
}

impl Tensor<'_> {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.operands[0].numel()
    }

    /// Whether an input is F64, which f32 cannot hold.
    pub fn is_wide(&self) -> bool {
        self.operands.iter().chain(&self.base).any(|view| view.dtype == Dtype::F64)
    }
}

/// What the passes need to know of a merge as a whole.
pub struct Job<'a> {
    /// The parameters in bytewise name order.
    pub tensors: Vec<Tensor<'a>>,
    /// Whether weights or differences from the base are combined.
    pub space: Space,
    /// Whether the base is read apart from the operands.
    pub base_is_separate: bool,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: f64,
    /// What becomes of an element in several core regions.
    pub conflict: Conflict,
    /// Dtype of the result.
    pub dtype: Dtype,
}

/// Everything the passes share.
struct Engine<'a> {
    job: &'a Job<'a>,
    hashes: Option<&'a InputHashes<'a>>,
    narrow: Pool<f32>,
    wide: Pool<f64>,
    bar: ProgressBar,
}

impl<'a> Engine<'a> {
    fn new(job: &'a Job<'a>, hashes: Option<&'a InputHashes<'a>>, what: &'static str, bytes: u64) -> Self {
        let k = job.tensors.first().map_or(0, |t| t.operands.len());
        Self { job, hashes, narrow: Pool::new(k), wide: Pool::new(k), bar: progress::bytes(what, bytes) }
    }

    /// Adds a piece of every input to its digest, where that is not known.
    fn hash(&self, tensor: &Tensor<'_>, piece: &Piece) {
        let Some(hashes) = self.hashes else { return };
        let base = tensor.base.iter().filter(|_| self.job.base_is_separate);
        for (source, view) in tensor.operands.iter().chain(base).enumerate() {
            hashes.add(source, view, piece);
        }
    }
}

/// Merges every tensor into `output` and returns what was found out about each; input digests come from the same passes.
///
/// # Errors
/// [`cpift_core::BadInput`] naming file, tensor and element where a number is not finite, in an input or after the cast to the
/// output's dtype; I/O errors.
pub fn run(job: &Job<'_>, hashes: &InputHashes<'_>, output: &Output) -> Result<Vec<TensorStats>> {
    let engine = Engine::new(job, Some(hashes), "merging", bytes_of(&job.tensors));
    let mut settled = Vec::with_capacity(job.tensors.len());
    for batch in jobs::batches(&job.tensors) {
        let found = measure::measure(&engine, batch.clone())?;
        write::write(&engine, batch, &found, output)?;
        settled.extend(found);
    }
    engine.bar.finish_and_clear();
    Ok(settled)
}

/// Finds out what [`run`] would, as far as it can be told of each tensor before it is written, and writes nothing.
///
/// # Errors
/// [`cpift_core::BadInput`] where a number that must be measured is not finite.
pub fn survey(job: &Job<'_>) -> Result<Vec<TensorStats>> {
    let engine = Engine::new(job, None, "measuring", bytes_of(&job.tensors));
    let mut settled = Vec::with_capacity(job.tensors.len());
    for batch in jobs::batches(&job.tensors) {
        let bytes = bytes_of(&job.tensors[batch.clone()]);
        settled.extend(measure::survey(&engine, batch)?);
        engine.bar.inc(bytes);
    }
    engine.bar.finish_and_clear();
    Ok(settled)
}

/// About how much memory [`run`] takes beside the mapped files, when it reads `bytes`.
pub fn peak_memory(job: &Job<'_>, bytes: u64) -> u64 {
    /// The program itself, with the stacks of its threads.
    const PROGRAM: usize = 16 << 20;
    const HISTOGRAM: usize = (1 << 16) * size_of::<u64>();
    let k = job.tensors.first().map_or(0, |t| t.operands.len());
    let number = if job.tensors.iter().any(Tensor::is_wide) { size_of::<f64>() } else { size_of::<f32>() };
    let blocks = ((k + 2) * number + 2 * size_of::<f64>()) * block::BLOCK;
    let trims = |t: &Tensor<'_>| matches!(t.rule, Rule::SignMerge(c) if c.sparsify == Sparsify::Trim);
    let trim = if job.tensors.iter().any(trims) { 4 * HISTOGRAM + CHUNK * number } else { 0 };
    let per_thread = blocks + CHUNK * job.dtype.size() + trim;
    // A hash of 32 bytes for every piece, and its lock.
    let hashes = 2 * bytes / CHUNK as u64 * 40;
    (PROGRAM + rayon::current_num_threads() * per_thread) as u64 + hashes
}

fn bytes_of(tensors: &[Tensor<'_>]) -> u64 {
    tensors.iter().map(|t| t.operands[0].bytes.len() as u64).sum()
}
