//! The write pass: the result of every element, cast to the output dtype, hashed and written while
//! it is in a cache.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use cpift_core::dispatch;
use cpift_core::format::checkpoint::Layout;
use cpift_core::format::digest::Digest;
use cpift_core::format::dtype::Float;
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::{BadInput, CheckpointWriter, Dtype, TensorSpec, TensorView};

use super::job::{self, Block, CHUNK, Job, Piece, Pool, Shared, Tensor};
use super::measure::TensorStats;
use crate::methods::region::magnitude;
use crate::methods::sign_merge::{self, Number};
use crate::methods::{Along, Conflict, Rule};
use crate::request::Space;

/// A checkpoint being written and hashed.
pub(crate) struct Output {
    writer: CheckpointWriter,
    hasher: PieceHasher,
    index: BTreeMap<String, usize>,
    /// Number of bytes written since the last flush began.
    unflushed: AtomicU64,
}

/// Number of bytes after which a flush begins, so that little is left to flush at the end.
const FLUSH: u64 = 64 << 20;

impl Output {
    /// Creates the files for `specs` at `path`, in the layout `layout`.
    ///
    /// # Errors
    /// A file that cannot be created.
    pub fn create(layout: &Layout, path: &Path, specs: &[TensorSpec], shard_size: u64) -> Result<Self> {
        let index = specs.iter().enumerate().map(|(i, spec)| (spec.name.clone(), i)).collect();
        let writer = CheckpointWriter::create_like(layout, path, specs, shard_size)?;
        Ok(Self { writer, hasher: PieceHasher::new(specs, CHUNK), index, unflushed: AtomicU64::new(0) })
    }

    /// Writes a chunk of a tensor, its elements from `start` on.
    fn put(&self, name: &str, start: usize, size: usize, bytes: &[u8]) -> Result<()> {
        self.hasher.add(self.index[name], start, bytes);
        self.unflushed.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.writer.write(name, (start * size) as u64, bytes)
    }

    /// Writes a tensor that is not merged.
    ///
    /// # Errors
    /// A failed write.
    pub fn copy(&self, view: &TensorView<'_>) -> Result<()> {
        let (dtype, pieces) = (view.output_dtype(), job::pieces_of(0, view.numel()).collect::<Vec<Piece>>());
        let copy = |piece: &Piece| {
            let Range { start, end } = piece.elements;
            if view.is_plain() {
                return self.put(view.name, start, dtype.size(), view.slice(start, end - start));
            }
            let (mut values, mut bytes) = (vec![0f64; end - start], Vec::new());
            view.read(start, &mut values);
            f64::write(dtype, &values, &mut bytes);
            self.put(view.name, start, dtype.size(), &bytes)
        };
        job::for_each(&pieces, copy).map(drop)
    }

    /// Runs `work` while another thread flushes the bytes written so far to the disk.
    ///
    /// # Errors
    /// Those of `work`, and a failed flush.
    pub fn flushed<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let flusher = scope.spawn(|| -> Result<()> {
                while !done.load(Ordering::Acquire) {
                    if self.unflushed.load(Ordering::Relaxed) >= FLUSH {
                        self.unflushed.store(0, Ordering::Relaxed);
                        self.writer.sync()?;
                    } else {
                        thread::sleep(Duration::from_millis(10));
                    }
                }
                Ok(())
            });
            let result = {
                // Dropped by a panic too, so that the thread above always ends.
                let _done = SetOnDrop(&done);
                work()
            };
            // The system reports a failed write once: an error that this thread got would not be
            // reported again.
            let flushed = flusher.join().expect("the thread does not panic");
            result.and_then(|value| flushed.map(|()| value))
        })
    }

    /// As [`Output::flushed`], for several outputs.
    ///
    /// # Errors
    /// As [`Output::flushed`].
    pub fn all_flushed<'w, R>(outputs: &'w [Self], work: Box<dyn FnOnce() -> Result<R> + 'w>) -> Result<R> {
        match outputs {
            [] => work(),
            [first, others @ ..] => first.flushed(|| Self::all_flushed(others, work)),
        }
    }

    /// Digest of the tensors written and of the side files in `folder`.
    ///
    /// # Errors
    /// A side file that cannot be read.
    pub fn finish(self, folder: &Path) -> Result<Digest> {
        self.hasher.finish(Some(folder))
    }
}

/// Sets a flag when it is dropped.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A block that cannot be written.
enum Fault {
    /// An input has a number that is not finite in the block of this start and length.
    NotFinite(usize, usize),
    /// A result in the block of this start is out of the range of the dtype; all results of the
    /// block.
    OutOfRange(usize, Vec<f64>),
}

/// Writes the tensors of a batch.
///
/// # Errors
/// [`BadInput`] if a number is not finite, in an input or after the cast to the output's dtype; a
/// failed write.
pub(super) fn write(shared: &Shared<'_>, batch: Range<usize>, stats: &[TensorStats], output: &Output) -> Result<()> {
    let tensors = &shared.job.tensors;
    let pieces = job::pieces(tensors, batch.clone());
    job::for_each(&pieces, |piece| {
        let (tensor, stats) = (&tensors[piece.tensor], &stats[piece.tensor - batch.start]);
        // This pass is the first to read a tensor that needs no measurement.
        if !tensor.rule.reads_chunks_first() {
            shared.hash(tensor, piece);
        }
        if tensor.is_wide() {
            write_piece(shared.job, &shared.wide, tensor, stats, piece, output)?;
        } else {
            write_piece(shared.job, &shared.narrow, tensor, stats, piece, output)?;
        }
        shared.bar.inc((piece.elements.len() * tensor.operands[0].view.dtype.size()) as u64);
        Ok(())
    })
    .map(drop)
}

fn write_piece<T: Number>(
    job: &Job<'_>,
    pool: &Pool<T>,
    tensor: &Tensor<'_>,
    stats: &TensorStats,
    piece: &Piece,
    output: &Output,
) -> Result<()> {
    pool.with(|block, bytes| {
        let size = tensor.dtype.size();
        bytes.resize(piece.elements.len() * size, 0);
        let done = dispatch!(write_blocks(job, tensor, stats, piece, block, bytes));
        match done {
            Ok(()) => output.put(tensor.name, piece.elements.start, size, bytes),
            Err(Fault::NotFinite(start, len)) => Err(tensor.not_finite(start, len).into()),
            Err(Fault::OutOfRange(start, values)) => Err(out_of_range(tensor.dtype, tensor, start, &values).into()),
        }
    })
}

#[inline(always)]
fn write_blocks<T: Number>(
    job: &Job<'_>,
    tensor: &Tensor<'_>,
    stats: &TensorStats,
    piece: &Piece,
    block: &mut Block<T>,
    bytes: &mut [u8],
) -> Result<(), Fault> {
    let (about_base, size, limit) =
        (job.space == Space::Delta, tensor.dtype.size(), T::from_f64(overflow(tensor.dtype)));
    let with_base = about_base || job.base_is_separate && (tensor.protected.is_some() || tensor.is_masked());
    let one = &tensor.operands[0];
    // The bytes of the only operand, which are read for numbers that are not finite.
    let unchanged = matches!(tensor.rule, Rule::Linear(factors) if factors[..] == [1.0])
        && !about_base
        && one.mask.is_none()
        && tensor.protected.is_none()
        && one.view.is_plain()
        && one.view.dtype == tensor.dtype;
    for (start, len) in piece.blocks() {
        if !block.load(tensor, start, len, with_base) {
            return Err(Fault::NotFinite(start, len));
        }
        let at = (start - piece.elements.start) * size;
        if unchanged {
            bytes[at..at + len * size].copy_from_slice(tensor.operands[0].view.slice(start, len));
            continue;
        }
        block.out.resize(len, T::default());
        match tensor.rule {
            Rule::SignMerge(rule) => {
                sign_merge::subtract_base(&mut block.operands, &block.base);
                thin(tensor, stats, start, block);
                let Block { operands, base, out, .. } = &mut *block;
                rule.merge(&stats.filters, operands, base, out);
            }
            Rule::Pointwise(rule) => {
                let Block { operands, base, out, .. } = &mut *block;
                rule.merge(&stats.figures, start, operands, base, out);
            }
            Rule::Combine(_, Along::Rows | Along::Columns) => {
                let Block { operands, base, out, .. } = &mut *block;
                stats.grouped.apply(start, operands, about_base.then_some(&base[..]), out);
            }
            Rule::Spectral(rule) => {
                let changes = block.base.iter().zip(&stats.change[start..start + len]);
                let sums = changes.map(|(b, change)| T::from_f64(b.to_f64() + rule.lambda * f64::from(*change)));
                block.out.iter_mut().zip(sums).for_each(|(o, v)| *o = v);
            }
            Rule::Linear(_) | Rule::Fold(_) | Rule::SphericalMean(..) | Rule::Combine(_, Along::Whole) => {
                let Block { operands, base, out, sums, .. } = &mut *block;
                stats.combination.apply(operands, about_base.then_some(&base[..]), &mut sums[..len], out);
            }
        }
        if let Some(conflict) = job.conflict {
            transplant(conflict, tensor, start, len, block);
        }
        if let Some(bits) = tensor.protected {
            block.keep_backbone(bits, start);
        }
        // A comparison with NaN is false.
        if !block.out.iter().fold(true, |fits, v| fits & (v.abs() < limit)) {
            return Err(Fault::OutOfRange(start, block.out.iter().map(|v| v.to_f64()).collect()));
        }
        T::store(tensor.dtype, &block.out, &mut bytes[at..at + len * size]);
    }
    Ok(())
}

/// Sets the elements of each task vector to zero that its filter drops, that are too large, or that
/// are protected.
#[inline(always)]
fn thin<T: Number>(tensor: &Tensor<'_>, stats: &TensorStats, start: usize, block: &mut Block<T>) {
    if let Some(bits) = tensor.protected {
        block.clear_operands(bits, start);
    }
    for (i, (values, filter)) in block.operands.iter_mut().zip(&stats.filters).enumerate() {
        filter.keep.apply(stats.outliers.get(i).map(|large| &large.keep), values, start);
    }
}

/// Puts the elements of the core regions into the result.
fn transplant<T: Number>(conflict: Conflict, tensor: &Tensor<'_>, start: usize, len: usize, block: &mut Block<T>) {
    let Block { operands, out, .. } = block;
    let mut values = vec![0.0; operands.len() - 1];
    tensor.claims.for_each(start, len, |j| {
        values.iter_mut().zip(&operands[1..]).for_each(|(slot, v)| *slot = v[j].to_f64());
        let moved = |task: usize| {
            let base = tensor.base.as_ref().expect("core regions come with a base");
            let mut origin = [0f64];
            base.read(start + j, &mut origin);
            let wide = [tensor.operands[task + 1].view.dtype, base.dtype].contains(&Dtype::F64);
            magnitude(operands[task + 1][j].to_f64(), origin[0], wide)
        };
        out[j] = T::from_f64(tensor.claims.resolve(conflict, start + j, &values, moved));
    });
}

/// The error for a result that is out of the range of the output dtype.
fn out_of_range(dtype: Dtype, tensor: &Tensor<'_>, start: usize, values: &[f64]) -> BadInput {
    let limit = overflow(dtype);
    let at = values.iter().position(|v| v.is_nan() || v.abs() >= limit).unwrap_or(0);
    let name = dtype.torch_name().unwrap_or(dtype.name());
    let view = &tensor.operands[0].view;
    BadInput::new(view.file, format!("a merged weight is out of the range of {name}"))
        .tensor(view.name)
        .expected(format!("less than {limit:e}"))
        .found(format!("{:e} at element {}", values[at], start + at))
        .hint(match dtype {
            Dtype::F16 | Dtype::F8E4M3 | Dtype::F8E5M2 => "--dtype bf16 or f32 has a wider range",
            _ => "the numbers in the inputs are too large to be merged: check them",
        })
}

/// Smallest number that a cast to `dtype` rounds to infinity.
fn overflow(dtype: Dtype) -> f64 {
    let half_ulp_over = |max_exponent: i32, bits: i32| (2.0 - 0.5f64.powi(bits)) * 2f64.powi(max_exponent);
    match dtype {
        Dtype::F16 => half_ulp_over(15, 11),
        Dtype::BF16 => half_ulp_over(127, 8),
        Dtype::F32 => half_ulp_over(127, 24),
        // The cast gives NaN above it: there is no infinity.
        Dtype::F8E4M3 => 464.0,
        Dtype::F8E5M2 => half_ulp_over(15, 3),
        _ => f64::INFINITY,
    }
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
