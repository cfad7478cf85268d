//! The two passes over the tensors: inner products, then the combination, in small pieces on all threads.
//!
//! The unit of work is a chunk of one tensor, and what a chunk yields does not depend on which thread takes it; sums over
//! chunks are taken in the order of the tensor. So the output has the same bytes at any number of threads, and a
//! thread holds a few blocks of numbers and one chunk of output, whatever the size of a tensor.

use anyhow::{Result, bail};
use cpift_core::checkpoint::{Dtype, Float};
use cpift_core::{BadInput, CheckpointWriter, TensorView, progress};
use rayon::prelude::*;

use crate::cli::Space;
use crate::plan::Plan;
use crate::region::{Claims, magnitude};
use crate::sphere::Gram;

/// Elements of a tensor that one job takes.
pub const CHUNK: usize = 1 << 16;

/// Elements held as numbers at a time: those of all operands fit the first caches.
const BLOCK: usize = 1 << 10;

/// One parameter in all inputs.
pub struct Tensor<'a> {
    /// The operands' elements.
    pub operands: Vec<TensorView<'a>>,
    /// The base's elements, for `cpi`.
    pub base: Option<TensorView<'a>>,
    /// Which elements are core to which task (operand 1 is task 0).
    pub claims: Claims<'a>,
}

impl Tensor<'_> {
    fn numel(&self) -> usize {
        self.operands[0].numel()
    }
}

/// What the first pass finds out about one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Measure {
    /// Inner products of the operands, or of their differences from the base, over the non-core elements.
    pub gram: Gram,
    /// Elements in at least one core region.
    pub core: u64,
    /// Elements in at least two.
    pub conflicts: u64,
}

impl Measure {
    fn zero(k: usize) -> Self {
        Self { gram: Gram::zero(k), core: 0, conflicts: 0 }
    }

    fn add(&mut self, other: &Self) {
        self.gram.add(&other.gram);
        self.core += other.core;
        self.conflicts += other.conflicts;
    }
}

struct Job {
    tensor: usize,
    start: usize,
    len: usize,
}

fn jobs(tensors: &[Tensor<'_>]) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (tensor, t) in tensors.iter().enumerate() {
        let starts = (0..t.numel()).step_by(CHUNK);
        jobs.extend(starts.map(|start| Job { tensor, start, len: CHUNK.min(t.numel() - start) }));
    }
    jobs
}

/// The numbers a thread works on, as f64 whatever the dtype: reading is exact, and results are rounded once.
struct Block {
    operands: Vec<Vec<f64>>,
    base: Vec<f64>,
    out: Vec<f64>,
}

impl Block {
    fn new(k: usize) -> Self {
        Self { operands: vec![Vec::new(); k], base: Vec::new(), out: Vec::new() }
    }

    /// Reads elements `start..start + len` of the operands, and of the base where asked.
    fn load(&mut self, tensor: &Tensor<'_>, start: usize, len: usize, with_base: bool) -> Result<()> {
        for (values, view) in self.operands.iter_mut().zip(&tensor.operands) {
            read_finite(view, start, len, values)?;
        }
        self.base.clear();
        if let (true, Some(view)) = (with_base, &tensor.base) {
            read_finite(view, start, len, &mut self.base)?;
        }
        Ok(())
    }

    /// Turns the operands into differences from the base.
    fn subtract_base(&mut self) {
        for values in &mut self.operands {
            values.iter_mut().zip(&self.base).for_each(|(v, b)| *v -= b);
        }
    }

    /// Puts the combination of the operands into `out`: Σ cᵢ vᵢ, or base + Σ cᵢ (vᵢ − base) where the base was loaded.
    fn combine(&mut self, coefficients: &[f64], len: usize, about_base: bool) {
        self.out.clear();
        self.out.resize(len, 0.0);
        // Terms without weight are left out and the first is not added to 0: then −0.0 stays what it is.
        let terms = coefficients.iter().zip(&self.operands).filter(|(c, _)| **c != 0.0);
        for (n, (c, values)) in terms.enumerate() {
            let pairs = self.out.iter_mut().zip(values);
            match (about_base, n) {
                (true, _) => pairs.zip(&self.base).for_each(|((o, v), b)| *o += c * (v - b)),
                (false, 0) => pairs.for_each(|(o, v)| *o = c * v),
                (false, _) => pairs.for_each(|(o, v)| *o += c * v),
            }
        }
        if about_base {
            self.out.iter_mut().zip(&self.base).for_each(|(o, b)| *o += b);
        }
    }
}

fn read_finite(view: &TensorView<'_>, start: usize, len: usize, out: &mut Vec<f64>) -> Result<()> {
    out.resize(len, 0.0);
    view.read(start, out);
    match out.iter().position(|v| !Float::is_finite(*v)) {
        None => Ok(()),
        Some(at) => Err(BadInput::new(view.file, "a weight that is not a finite number")
            .tensor(view.name)
            .expected("finite numbers")
            .found(format!("{} at element {}", out[at], start + at))
            .hint("the training run behind this checkpoint has diverged, or the file is damaged")
            .into()),
    }
}

/// The ranges of [`BLOCK`] elements in a job.
fn blocks(job: &Job) -> impl Iterator<Item = (usize, usize)> {
    let end = job.start + job.len;
    (job.start..end).step_by(BLOCK).map(move |start| (start, BLOCK.min(end - start)))
}

/// The first pass: inner products and core counts of every tensor. Finds every number in any input that is not finite.
///
/// # Errors
/// [`BadInput`] naming file, tensor and element.
pub fn measure(plan: &Plan, tensors: &[Tensor<'_>]) -> Result<Vec<Measure>> {
    let (jobs, k) = (jobs(tensors), plan.operands.len());
    let bar = progress::bytes("measuring", bytes_of(tensors));
    let run = |block: &mut Block, job: &Job| {
        let tensor = &tensors[job.tensor];
        let part = measure_chunk(plan, tensor, job, block);
        bar.inc((job.len * tensor.operands[0].dtype.size()) as u64);
        part
    };
    let parts: Vec<Result<Measure>> = jobs.par_iter().map_init(|| Block::new(k), run).collect();
    bar.finish_and_clear();
    let mut measures = vec![Measure::zero(k); tensors.len()];
    for (job, part) in jobs.iter().zip(parts) {
        measures[job.tensor].add(&part?);
    }
    for (tensor, measure) in tensors.iter().zip(&measures) {
        let view = tensor.operands[0];
        if !measure.gram.is_finite() {
            return Err(BadInput::new(view.file, "weights so large that their norm overflows")
                .tensor(view.name)
                .into());
        }
    }
    Ok(measures)
}

fn measure_chunk(plan: &Plan, tensor: &Tensor<'_>, job: &Job, block: &mut Block) -> Result<Measure> {
    let mut sum = Measure::zero(plan.operands.len());
    for (start, len) in blocks(job) {
        block.load(tensor, start, len, plan.space == Space::Delta || plan.base_is_separate())?;
        if plan.space == Space::Delta {
            block.subtract_base();
        }
        // Core elements are set to zero, which takes them out of every inner product.
        for values in &mut block.operands {
            tensor.claims.for_each(start, len, |j| values[j] = 0.0);
        }
        sum.gram.accumulate(&block.operands);
        let (core, conflicts) = tensor.claims.count(start, len);
        sum.core += core;
        sum.conflicts += conflicts;
    }
    Ok(sum)
}

/// The second pass: writes the combination of each tensor with its `coefficients`, core elements in place.
///
/// # Errors
/// [`BadInput`] where a number is not finite, in an input or after the cast to the output's dtype; I/O errors.
pub fn write(plan: &Plan, tensors: &[Tensor<'_>], coefficients: &[&[f64]], writer: &CheckpointWriter) -> Result<()> {
    let jobs = jobs(tensors);
    let bar = progress::bytes("writing", bytes_of(tensors));
    let run = |(block, bytes): &mut (Block, Vec<u8>), job: &Job| {
        let tensor = &tensors[job.tensor];
        bytes.clear();
        for (start, len) in blocks(job) {
            fuse_block(plan, tensor, (start, len), coefficients[job.tensor], block)?;
            f64::write(plan.output.dtype, &block.out, bytes);
        }
        bar.inc((job.len * tensor.operands[0].dtype.size()) as u64);
        writer.write(tensor.operands[0].name, (job.start * plan.output.dtype.size()) as u64, bytes)
    };
    let state = || (Block::new(plan.operands.len()), Vec::new());
    let results: Vec<Result<()>> = jobs.par_iter().map_init(state, run).collect();
    bar.finish_and_clear();
    results.into_iter().collect()
}

/// Fills `block.out` with the result for one range of a tensor.
fn fuse_block(
    plan: &Plan,
    tensor: &Tensor<'_>,
    (start, len): (usize, usize),
    coefficients: &[f64],
    block: &mut Block,
) -> Result<()> {
    let about_base = plan.space == Space::Delta;
    block.load(tensor, start, len, about_base)?;
    block.combine(coefficients, len, about_base);
    let (operands, out) = (&block.operands, &mut block.out);
    let mut values = vec![0.0; operands.len() - 1];
    tensor.claims.for_each(start, len, |j| {
        values.iter_mut().zip(&operands[1..]).for_each(|(slot, v)| *slot = v[j]);
        let moved = |task: usize| {
            let base = tensor.base.as_ref().expect("core regions come with a base");
            magnitude(&tensor.operands[task + 1], base, start + j, operands[task + 1][j])
        };
        out[j] = tensor.claims.resolve(plan.conflict, start + j, &values, moved);
    });
    if !tensor.operands.iter().chain(&tensor.base).any(|view| view.dtype == Dtype::F64) {
        // Merging is defined in f32: the result is rounded to it even where a wider dtype is written.
        out.iter_mut().for_each(|v| *v = f64::from(*v as f32));
    }
    check_range(plan, tensor, start, out)
}

/// Refuses a result that the output's dtype cannot hold.
fn check_range(plan: &Plan, tensor: &Tensor<'_>, start: usize, out: &[f64]) -> Result<()> {
    let dtype = plan.output.dtype;
    let limit = overflow(dtype);
    let Some(at) = out.iter().position(|v| v.is_nan() || v.abs() >= limit) else { return Ok(()) };
    let Some(name) = dtype.torch_name() else { bail!("{dtype} is not a dtype for parameters") };
    Err(BadInput::new(tensor.operands[0].file, format!("a merged weight is out of the range of {name}"))
        .tensor(tensor.operands[0].name)
        .expected(format!("less than {limit:e}"))
        .found(format!("{:e} at element {}", out[at], start + at))
        .hint("--dtype bf16 or f32 has a wider range")
        .into())
}

/// The smallest number that a cast to `dtype` rounds to infinity.
fn overflow(dtype: Dtype) -> f64 {
    let half_ulp_over = |max_exponent: i32, bits: i32| (2.0 - 0.5f64.powi(bits)) * 2f64.powi(max_exponent);
    match dtype {
        Dtype::F16 => half_ulp_over(15, 11),
        Dtype::BF16 => half_ulp_over(127, 8),
        Dtype::F32 => half_ulp_over(127, 24),
        _ => f64::INFINITY,
    }
}

fn bytes_of(tensors: &[Tensor<'_>]) -> u64 {
    tensors.iter().map(|t| t.operands[0].bytes.len() as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflow_is_where_the_cast_gives_infinity() {
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
            let limit = overflow(dtype);
            for (value, infinite) in [(limit, true), (limit * (1.0 - 1e-6), false)] {
                let (mut bytes, mut back) = (Vec::new(), [0f64]);
                f64::write(dtype, &[value], &mut bytes);
                f64::read(dtype, &bytes, &mut back);
                assert_eq!(back[0].is_infinite(), infinite, "{dtype} {value:e}");
            }
        }
    }
}
