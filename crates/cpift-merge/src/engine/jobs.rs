//! Cutting tensors into jobs, and the buffers that the threads share.

use std::ops::Range;
use std::sync::Mutex;

use anyhow::Result;
use rayon::prelude::*;

use super::Tensor;
use super::block::{BLOCK, Block, Number};

/// Elements of a tensor that one job takes: its bytes in two inputs and the output fit a core's second cache, and a write is
/// long enough not to be bound by its call. A power of two, as pieces of a digest are.
pub const CHUNK: usize = 1 << 17;

/// Part of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Index of the tensor.
    pub tensor: usize,
    /// Number of the chunk in it.
    pub chunk: usize,
    /// Its elements.
    pub elements: Range<usize>,
}

impl Piece {
    /// Start and length of each block.
    #[inline(always)]
    pub fn blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        let end = self.elements.end;
        self.elements.clone().step_by(BLOCK).map(move |start| (start, BLOCK.min(end - start)))
    }
}

/// The chunks of some tensors.
pub fn pieces(tensors: &[Tensor<'_>], which: Range<usize>) -> Vec<Piece> {
    which.flat_map(|tensor| of_tensor(tensor, tensors[tensor].numel())).collect()
}

/// The chunks of a tensor of `numel` elements.
pub fn of_tensor(tensor: usize, numel: usize) -> impl Iterator<Item = Piece> {
    (0..numel.div_ceil(CHUNK)).map(move |chunk| Piece {
        tensor,
        chunk,
        elements: chunk * CHUNK..numel.min((chunk + 1) * CHUNK),
    })
}

/// Runs of tensors that keep all threads busy and still fit the last cache where no tensor is large.
pub fn batches(tensors: &[Tensor<'_>]) -> Vec<Range<usize>> {
    let enough = 8 * rayon::current_num_threads();
    let (mut batches, mut start, mut filled) = (Vec::new(), 0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        filled += tensor.numel().div_ceil(CHUNK);
        if filled >= enough || i + 1 == tensors.len() {
            batches.push(start..i + 1);
            (start, filled) = (i + 1, 0);
        }
    }
    batches
}

/// Does `each` for every piece, on all threads; results come in the order of the pieces.
///
/// # Errors
/// The first of the errors, in that order.
pub fn for_each<R: Send>(pieces: &[Piece], each: impl Fn(&Piece) -> Result<R> + Sync + Send) -> Result<Vec<R>> {
    let results: Vec<Result<R>> = pieces.par_iter().with_max_len(1).map(each).collect();
    results.into_iter().collect()
}

/// Buffers that are not in use.
pub struct Pool<T> {
    k: usize,
    free: Mutex<Vec<(Block<T>, Vec<u8>)>>,
}

impl<T: Number> Pool<T> {
    /// No buffers yet; blocks will be for `k` operands.
    pub fn new(k: usize) -> Self {
        Self { k, free: Mutex::new(Vec::new()) }
    }

    /// Calls `with` with a block and a buffer for bytes.
    pub fn with<R>(&self, with: impl FnOnce(&mut Block<T>, &mut Vec<u8>) -> R) -> R {
        let taken = self.free.lock().expect("no thread panics here").pop();
        let (mut block, mut bytes) = taken.unwrap_or_else(|| (Block::new(self.k), Vec::new()));
        let result = with(&mut block, &mut bytes);
        self.free.lock().expect("no thread panics here").push((block, bytes));
        result
    }
}
