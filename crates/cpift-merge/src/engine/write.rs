//! Writing tensors: the result of every element, cast, hashed and put in its place while it is in a cache.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use cpift_core::format::digest::Digest;
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::stream::simd;
use cpift_core::{BadInput, CheckpointWriter, Dtype, TensorSpec, TensorView};

use super::block::{Block, Number, not_finite};
use super::jobs::{self, CHUNK, Piece, Pool};
use super::measure::TensorStats;
use super::{Engine, Job, Tensor};
use crate::cli::Space;
use crate::methods::sign_merge::{self, Filter};
use crate::methods::{Rule, magnitude};

/// A checkpoint being written and hashed.
pub struct Output {
    writer: CheckpointWriter,
    hasher: PieceHasher,
    index: BTreeMap<String, usize>,
    /// Bytes written since the disk was last told to hurry.
    fresh: AtomicU64,
}

/// Bytes after which the disk begins to write, so that little is left to wait for at the end.
const FLUSH: u64 = 256 << 20;

impl Output {
    /// Creates the files for `specs` in `folder`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(folder: &Path, specs: &[TensorSpec], shard_size: u64) -> Result<Self> {
        let index = specs.iter().enumerate().map(|(i, spec)| (spec.name.clone(), i)).collect();
        let writer = CheckpointWriter::create(folder, specs, shard_size)?;
        Ok(Self { writer, hasher: PieceHasher::new(specs, CHUNK), index, fresh: AtomicU64::new(0) })
    }

    /// Writes elements of a tensor from `start` on: a chunk.
    fn put(&self, name: &str, start: usize, size: usize, bytes: &[u8]) -> Result<()> {
        self.hasher.add(self.index[name], start, bytes);
        self.fresh.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.writer.write(name, (start * size) as u64, bytes)
    }

    /// Writes a tensor as it is.
    ///
    /// # Errors
    /// I/O errors.
    pub fn copy(&self, view: &TensorView<'_>) -> Result<()> {
        let size = view.dtype.size();
        let pieces: Vec<Piece> = jobs::of_tensor(0, view.numel()).collect();
        let copy = |piece: &Piece| {
            let Range { start, end } = piece.elements;
            self.put(view.name, start, size, &view.bytes[start * size..end * size])
        };
        jobs::for_each(&pieces, copy).map(drop)
    }

    /// Runs `work` while a thread beside it keeps the disk busy with what is written.
    ///
    /// # Errors
    /// Those of `work`, and of the disk.
    pub fn flushed<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let flusher = scope.spawn(|| -> Result<()> {
                while !done.load(Ordering::Acquire) {
                    if self.fresh.load(Ordering::Relaxed) >= FLUSH {
                        self.fresh.store(0, Ordering::Relaxed);
                        self.writer.sync()?;
                    } else {
                        thread::sleep(Duration::from_millis(10));
                    }
                }
                Ok(())
            });
            let result = {
                // Dropped by a panic as well, so that the thread above always ends.
                let _ending = Ending(&done);
                work()
            };
            // The system tells of a failed write once: what this thread was told would not come up again at the end.
            let flushed = flusher.join().expect("the thread does not panic");
            result.and_then(|value| flushed.map(|()| value))
        })
    }

    /// The digest of what was written, with the side files in `folder`.
    ///
    /// # Errors
    /// I/O errors on the side files.
    pub fn finish(self, folder: &Path) -> Result<Digest> {
        self.hasher.finish(Some(folder))
    }
}

/// Says that work is done when it is dropped.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Why a block cannot be written, and which.
enum Fault {
    NotFinite(usize, usize),
    OutOfRange(usize, Vec<f64>),
}

/// Writes the tensors of a batch.
///
/// # Errors
/// [`BadInput`] where a number is not finite, in an input or after the cast to the output's dtype; I/O errors.
pub fn write(engine: &Engine<'_>, batch: Range<usize>, settled: &[TensorStats], output: &Output) -> Result<()> {
    let tensors = &engine.job.tensors;
    let pieces = jobs::pieces(tensors, batch.clone());
    jobs::for_each(&pieces, |piece| {
        let (tensor, settled) = (&tensors[piece.tensor], &settled[piece.tensor - batch.start]);
        if matches!(tensor.rule, Rule::Linear(_)) {
            engine.hash(tensor, piece);
        }
        if tensor.is_wide() {
            write_piece(engine.job, &engine.wide, tensor, settled, piece, output)?;
        } else {
            write_piece(engine.job, &engine.narrow, tensor, settled, piece, output)?;
        }
        engine.bar.inc((piece.elements.len() * tensor.operands[0].dtype.size()) as u64);
        Ok(())
    })
    .map(drop)
}

fn write_piece<T: Number>(
    job: &Job<'_>,
    pool: &Pool<T>,
    tensor: &Tensor<'_>,
    settled: &TensorStats,
    piece: &Piece,
    output: &Output,
) -> Result<()> {
    pool.with(|block, bytes| {
        let size = job.dtype.size();
        bytes.resize(piece.elements.len() * size, 0);
        let done = simd::dispatch!(write_blocks(job, tensor, settled, piece, block, bytes));
        match done {
            Ok(()) => output.put(tensor.operands[0].name, piece.elements.start, size, bytes),
            Err(Fault::NotFinite(start, len)) => Err(not_finite(tensor, start, len).into()),
            Err(Fault::OutOfRange(start, values)) => Err(out_of_range(job.dtype, tensor, start, &values).into()),
        }
    })
}

#[inline(always)]
fn write_blocks<T: Number>(
    job: &Job<'_>,
    tensor: &Tensor<'_>,
    settled: &TensorStats,
    piece: &Piece,
    block: &mut Block<T>,
    bytes: &mut [u8],
) -> Result<(), Fault> {
    let (about_base, size, limit) = (job.space == Space::Delta, job.dtype.size(), T::from_f64(overflow(job.dtype)));
    let with_base = about_base || job.base_is_separate && (tensor.protected.is_some() || !tensor.masks.is_empty());
    let mut ties: Vec<u64> = settled.filters.iter().map(|f| f.keep.ties_in(piece.chunk)).collect();
    for (start, len) in piece.blocks() {
        if !block.load(tensor, start, len, with_base) {
            return Err(Fault::NotFinite(start, len));
        }
        match tensor.rule {
            Rule::SignMerge(rule) => {
                sign_merge::differences(block);
                thin(tensor, &settled.filters, start, &mut ties, block);
                rule.merge(&settled.filters, block);
            }
            _ => block.combine(&settled.combination.coefficients, len, about_base),
        }
        if !tensor.claims.is_empty() {
            transplant(job, tensor, start, len, block);
        }
        if let Some(bits) = tensor.protected {
            block.keep_backbone(bits, start);
        }
        // A comparison with NaN is false.
        if !block.out.iter().fold(true, |fits, v| fits & (v.abs() < limit)) {
            return Err(Fault::OutOfRange(start, block.out.iter().map(|v| v.to_f64()).collect()));
        }
        let at = (start - piece.elements.start) * size;
        T::store(job.dtype, &block.out, &mut bytes[at..at + len * size]);
    }
    Ok(())
}

/// Leaves of each task vector what its filter keeps; protected elements are no part of any.
#[inline(always)]
fn thin<T: Number>(tensor: &Tensor<'_>, filters: &[Filter], start: usize, ties: &mut [u64], block: &mut Block<T>) {
    if let Some(bits) = tensor.protected {
        block.clear_operands(bits, start);
    }
    for ((values, filter), ties) in block.operands.iter_mut().zip(filters).zip(ties) {
        filter.keep.apply(values, start, ties);
    }
}

/// Puts core elements in place.
fn transplant<T: Number>(job: &Job<'_>, tensor: &Tensor<'_>, start: usize, len: usize, block: &mut Block<T>) {
    let Block { operands, out, .. } = block;
    let mut values = vec![0.0; operands.len() - 1];
    tensor.claims.for_each(start, len, |j| {
        values.iter_mut().zip(&operands[1..]).for_each(|(slot, v)| *slot = v[j].to_f64());
        let moved = |task: usize| {
            let base = tensor.base.as_ref().expect("core regions come with a base");
            magnitude(&tensor.operands[task + 1], base, start + j, operands[task + 1][j].to_f64())
        };
        out[j] = T::from_f64(tensor.claims.resolve(job.conflict, start + j, &values, moved));
    });
}

/// The error for a result that the output's dtype cannot hold.
fn out_of_range(dtype: Dtype, tensor: &Tensor<'_>, start: usize, values: &[f64]) -> BadInput {
    let limit = overflow(dtype);
    let at = values.iter().position(|v| v.is_nan() || v.abs() >= limit).unwrap_or(0);
    let name = dtype.torch_name().unwrap_or(dtype.name());
    BadInput::new(tensor.operands[0].file, format!("a merged weight is out of the range of {name}"))
        .tensor(tensor.operands[0].name)
        .expected(format!("less than {limit:e}"))
        .found(format!("{:e} at element {}", values[at], start + at))
        .hint(match dtype {
            Dtype::F16 => "--dtype bf16 or f32 has a wider range",
            _ => "the inputs' numbers are too large to be merged: check them",
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use cpift_core::format::dtype::Float;

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
