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
mod rows;
mod write;

pub(crate) use job::{CHUNK, InputHashes};
pub(crate) use measure::TensorStats;
pub(crate) use write::Output;

use anyhow::Result;
use cpift_core::stream::cuts;

use crate::methods::sign_merge::Sparsify;
use crate::methods::spectral::Kind;
use crate::methods::{Along, Pointwise, Rule, Spectral};
use crate::plan::Plan;
use job::{BLOCK, Job, Shared, Tensor};

/// Merges every tensor of every plan into its output and returns the statistics of each; `hashes`,
/// of the first plan, is filled by the same passes.
///
/// Several plans are of the same inputs. Each batch of tensors is merged by all plans before the
/// next one is read.
///
/// # Errors
/// [`cpift_core::BadInput`] naming file, tensor and element if a number is not finite, in an input
/// or after the cast to the output's dtype.
pub(crate) fn run(plans: &[&Plan], hashes: &InputHashes<'_>, outputs: &[Output]) -> Result<Vec<Vec<TensorStats>>> {
    let jobs: Vec<Job<'_>> = plans.iter().map(|plan| Job::of(plan)).collect();
    let shared = |(i, job)| Shared::new(job, (i == 0).then_some(hashes), (i == 0).then_some("merging"));
    let shared: Vec<Shared<'_>> = jobs.iter().enumerate().map(shared).collect();
    let mut stats: Vec<Vec<TensorStats>> = jobs.iter().map(|job| Vec::with_capacity(job.tensors.len())).collect();
    for batch in job::batches(&jobs[0].tensors) {
        for ((shared, output), stats) in shared.iter().zip(outputs).zip(&mut stats) {
            let measured = measure::measure(shared, batch.clone())?;
            write::write(shared, batch.clone(), &measured, output)?;
            stats.extend(measured.into_iter().map(TensorStats::for_report));
        }
    }
    shared[0].bar.finish_and_clear();
    Ok(stats)
}

/// Returns the statistics of every tensor as far as they can be measured without writing: all but
/// the trims.
///
/// # Errors
/// [`cpift_core::BadInput`] if a number that must be measured is not finite.
pub(crate) fn survey(plan: &Plan) -> Result<Vec<TensorStats>> {
    let job = Job::of(plan);
    let shared = Shared::new(&job, None, Some("measuring"));
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
    let trims = |t: &Tensor<'_>| {
        matches!(t.rule, Rule::SignMerge(rule) if matches!(rule.sparsify, Sparsify::Trim | Sparsify::Outliers))
            || matches!(t.rule, Rule::Pointwise(Pointwise::Sce { .. } | Pointwise::Fusion))
    };
    let trim = if job.tensors.iter().any(trims) { 4 * HISTOGRAM + CHUNK * number } else { 0 };
    let per_thread = blocks + CHUNK * job.tensors.iter().map(|t| t.dtype.size()).max().unwrap_or(0) + trim;
    // A hash of 32 bytes for every piece, and its lock.
    let hashes = 2 * plan.bytes_to_read() / CHUNK as u64 * 40;
    // Measurements of one tensor at a time, and bands of rows.
    let of_tensor = |t: &Tensor<'_>| {
        let (numel, k) = (t.numel(), t.operands.len());
        let groups = |along: Along| match (along, t.operands[0].view.shape) {
            (Along::Whole, _) => 0,
            (Along::Rows, [.., row]) => numel / (*row).max(1),
            (Along::Columns, [first, _, ..]) => numel / (*first).max(1),
            _ => 1,
        };
        match t.rule {
            Rule::SignMerge(rule) if matches!(rule.sparsify, Sparsify::Prune | Sparsify::Drop) => k * numel.div_ceil(8),
            Rule::Combine(_, along) => groups(*along) * k * size_of::<f64>(),
            Rule::Pointwise(Pointwise::Sce { .. }) => numel.div_ceil(8),
            Rule::Pointwise(Pointwise::Fusion) => groups(Along::Rows) * size_of::<f64>(),
            // A task vector and sums of its shape; the Gram matrix of its columns with its
            // decomposition.
            Rule::Spectral(Spectral { kind: Kind::Wudi, .. }) => {
                numel * 44 + t.operands[0].view.shape.last().map_or(0, |columns| columns * columns * 40)
            }
            // A task vector in f32 and f64, and the parts of its decomposition, for as many at a
            // time as there are threads.
            Rule::Spectral(_) => numel * 32 * k.min(rayon::current_num_threads()),
            _ => 0,
        }
    };
    let whole = job.tensors.iter().map(of_tensor).max().unwrap_or(0);
    let banded = |t: &Tensor<'_>| of_tensor(t) > 0;
    // Candidates of two cut-offs, with their indices.
    let largest = job.tensors.iter().filter(|t| trims(t)).map(|t| t.numel().min(cuts::LIMIT)).max().unwrap_or(0);
    let candidates = 2 * largest * (size_of::<u64>() + number);
    let bands = if job.tensors.iter().any(banded) { CHUNK * (job.operands + 1) * number } else { 0 };
    (PROGRAM + whole + candidates + rayon::current_num_threads() * (per_thread + bands)) as u64 + hashes
}
