//! Passes over the tensors, in small pieces on all threads.
//!
//! Tensors are taken a few at a time: what a method needs to know of a whole tensor is measured,
//! then the tensor is written while its bytes are still in a cache. The unit of work is a chunk of
//! one tensor, and its result does not depend on the thread that computes it; sums over chunks are
//! taken in the order of the tensor. The output therefore has the same bytes at any number of
//! threads, and a thread needs a few blocks of numbers and one chunk of output, whatever the size
//! of a tensor.

mod job;
mod measure;
mod tensor;
mod write;

pub(crate) use job::{CHUNK, InputHashes};
pub(crate) use measure::TensorStats;
pub(crate) use write::Output;

use anyhow::Result;

use crate::methods::Rule;
use crate::methods::sign_merge::Sparsify;
use crate::plan::Plan;
use job::{Job, Shared};
use tensor::{BLOCK, Tensor};

/// Merges every tensor into `output` and returns the statistics of each; `hashes` is filled by the
/// same passes.
///
/// # Errors
/// [`cpift_core::BadInput`] naming file, tensor and element if a number is not finite, in an input
/// or after the cast to the output's dtype.
pub(crate) fn run(plan: &Plan, hashes: &InputHashes<'_>, output: &Output) -> Result<Vec<TensorStats>> {
    let job = Job::of(plan);
    let shared = Shared::new(&job, Some(hashes), "merging");
    let mut stats = Vec::with_capacity(job.tensors.len());
    for batch in job::batches(&job.tensors) {
        let measured = measure::measure(&shared, batch.clone())?;
        write::write(&shared, batch, &measured, output)?;
        stats.extend(measured);
    }
    shared.bar.finish_and_clear();
    Ok(stats)
}

/// Returns the statistics of every tensor as far as they can be measured without writing: all but
/// the trims.
///
/// # Errors
/// [`cpift_core::BadInput`] if a number that must be measured is not finite.
pub(crate) fn survey(plan: &Plan) -> Result<Vec<TensorStats>> {
    let job = Job::of(plan);
    let shared = Shared::new(&job, None, "measuring");
    let mut stats = Vec::with_capacity(job.tensors.len());
    for batch in job::batches(&job.tensors) {
        let bytes = job::bytes_of(&job.tensors[batch.clone()]);
        stats.extend(measure::survey(&shared, batch)?);
        shared.bar.inc(bytes);
    }
    shared.bar.finish_and_clear();
    Ok(stats)
}

/// Estimate in bytes of the memory that [`run`] takes besides the mapped files.
pub(crate) fn peak_memory(plan: &Plan) -> u64 {
    /// The program itself, with the stacks of its threads.
    const PROGRAM: usize = 16 << 20;
    const HISTOGRAM: usize = (1 << 16) * size_of::<u64>();
    let job = Job::of(plan);
    let number = if job.tensors.iter().any(Tensor::is_wide) { size_of::<f64>() } else { size_of::<f32>() };
    let blocks = ((job.operands + 2) * number + 2 * size_of::<f64>()) * BLOCK;
    let trims = |t: &Tensor<'_>| matches!(t.rule, Rule::SignMerge(rule) if rule.sparsify == Sparsify::Trim);
    let trim = if job.tensors.iter().any(trims) { 4 * HISTOGRAM + CHUNK * number } else { 0 };
    let per_thread = blocks + CHUNK * job.dtype.size() + trim;
    // A hash of 32 bytes for every piece, and its lock.
    let hashes = 2 * plan.bytes_to_read() / CHUNK as u64 * 40;
    (PROGRAM + rayon::current_num_threads() * per_thread) as u64 + hashes
}
