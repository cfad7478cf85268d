//! Bit-exact freezing of single elements: their values are saved before a stage and restored after
//! every update.
//!
//! Multiplying the update by a mask would not be bit-exact (−0.0 becomes +0.0) and would not cover
//! weight decay; saved values are restored whatever the optimizer did.

use std::collections::BTreeMap;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::mask::{Mask, indices};
use tch::{Kind, Tensor, no_grad};

use crate::placement::{Piece, Pieces};

/// The frozen elements of a set of parameters.
pub struct Freeze {
    frozen: BTreeMap<String, Frozen>,
}

/// Frozen elements of a parameter's piece; indices are flat in it, int64 and ascending, values in
/// the parameter's dtype.
enum Frozen {
    /// These elements.
    Elements { index: Tensor, saved: Tensor },
    /// All but these elements; `saved` is the whole parameter.
    AllBut { index: Tensor, saved: Tensor },
}

impl Frozen {
    fn elements(parameter: &Tensor, index: Tensor) -> Self {
        let saved = no_grad(|| parameter.flatten(0, -1).index_select(0, &index));
        Self::Elements { index, saved }
    }

    fn len(&self) -> u64 {
        match self {
            Self::Elements { index, .. } => index.numel() as u64,
            Self::AllBut { index, saved } => (saved.numel() - index.numel()) as u64,
        }
    }
}

impl Freeze {
    /// Freezes every element that is set in any of `masks` at its current value. The masks must
    /// have been checked against the base checkpoint.
    ///
    /// # Errors
    /// [`BadInput`] if a mask lacks a parameter.
    pub fn new(pieces: &Pieces, masks: &[&Mask]) -> Result<Self> {
        let mut frozen = BTreeMap::new();
        for (name, piece) in pieces {
            let index = positions(&union(name, piece, masks)?, piece);
            if index.numel() > 0 {
                frozen.insert(name.clone(), Frozen::elements(&piece.tensor, index));
            }
        }
        Ok(Self { frozen })
    }

    /// Freezes the parameters that `whole` accepts as well, at their current values.
    pub(crate) fn and_whole(mut self, pieces: &Pieces, whole: impl Fn(&str) -> bool) -> Self {
        for (name, piece) in pieces.iter().filter(|(name, _)| whole(name)) {
            let saved = no_grad(|| piece.tensor.flatten(0, -1).copy());
            let index = Tensor::zeros([0], (Kind::Int64, saved.device()));
            self.frozen.insert(name.clone(), Frozen::AllBut { index, saved });
        }
        self
    }

    /// Freezes all but the elements that are set in any mask of `own` and in none of `earlier`.
    /// Keeps a copy of every parameter.
    ///
    /// # Errors
    /// [`BadInput`] if a mask lacks a parameter.
    pub(crate) fn all_but(pieces: &Pieces, own: &[&Mask], earlier: &[&Mask]) -> Result<Self> {
        let mut frozen = BTreeMap::new();
        for (name, piece) in pieces {
            let mut free = union(name, piece, own)?;
            let taken = union(name, piece, earlier)?;
            free.iter_mut().zip(taken).for_each(|(f, t)| *f &= !t);
            let index = positions(&free, piece);
            let saved = no_grad(|| piece.tensor.flatten(0, -1).copy());
            frozen.insert(name.clone(), Frozen::AllBut { index, saved });
        }
        Ok(Self { frozen })
    }

    /// Freezes the elements with indices `positions` (flat in the piece, int64, by parameter) at
    /// their current values.
    pub(crate) fn at(pieces: &Pieces, positions: &BTreeMap<String, Tensor>) -> Self {
        let frozen = |(name, index): (&String, &Tensor)| {
            let tensor = &pieces[name].tensor;
            (name.clone(), Frozen::elements(tensor, index.to_device(tensor.device())))
        };
        Self { frozen: positions.iter().map(frozen).collect() }
    }

    /// Freezes about `percent` of the elements, evenly spread, for benchmarks.
    pub fn every(pieces: &Pieces, percent: f64) -> Self {
        let gap = (100.0 / percent).round().max(1.0) as i64;
        let frozen = |(name, piece): (&String, &Piece)| {
            let index = Tensor::arange_start_step(0, piece.len(), gap, (Kind::Int64, piece.tensor.device()));
            (name.clone(), Frozen::elements(&piece.tensor, index))
        };
        Self { frozen: pieces.iter().map(frozen).collect() }
    }

    /// Number of frozen elements of the pieces.
    pub fn len(&self) -> u64 {
        self.frozen.values().map(Frozen::len).sum()
    }

    /// Returns true if nothing is frozen.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Zeroes the gradients of the frozen elements of the parameter `name`, so that the clip norm
    /// counts only trainable elements.
    pub fn zero_frozen_grads(&self, name: &str, grad: &mut Tensor) {
        let Some(frozen) = self.frozen.get(name) else { return };
        no_grad(|| {
            // The backward pass may return a gradient that is not contiguous.
            *grad = grad.contiguous();
            let mut flat = grad.view([-1]);
            // The weights, and with them the indices, may lie in host memory.
            match frozen {
                Frozen::Elements { index, .. } => {
                    drop(flat.index_fill_(0, &index.to_device(flat.device()), 0.0));
                }
                Frozen::AllBut { index, .. } => {
                    let index = index.to_device(flat.device());
                    let free = flat.index_select(0, &index);
                    let _ = flat.zero_();
                    let _ = flat.index_copy_(0, &index, &free);
                }
            }
        });
    }

    /// Restores the saved values of the parameter `name`.
    pub fn restore(&self, name: &str, parameter: &Tensor) {
        let Some(frozen) = self.frozen.get(name) else { return };
        no_grad(|| {
            let mut flat = parameter.view([-1]);
            match frozen {
                Frozen::Elements { index, saved } => drop(flat.index_copy_(0, index, saved)),
                Frozen::AllBut { index, saved } => {
                    let free = flat.index_select(0, index);
                    flat.copy_(saved);
                    let _ = flat.index_copy_(0, index, &free);
                }
            }
        });
    }
}

/// Union of the bits of `masks` for the whole parameter `name`.
fn union(name: &str, piece: &Piece, masks: &[&Mask]) -> Result<Vec<u8>> {
    let mut union = vec![0u8; (piece.whole_len() as usize).div_ceil(8)];
    for mask in masks {
        let bits =
            mask.bits(name).ok_or_else(|| BadInput::new(mask.path(), "a mask tensor is missing").tensor(name))?;
        union.iter_mut().zip(bits).for_each(|(u, b)| *u |= b);
    }
    Ok(union)
}

/// Indices of the set bits within `piece`, from its first element on.
fn positions(bits: &[u8], piece: &Piece) -> Tensor {
    let held = piece.start..piece.start + piece.len();
    let of_piece = indices(bits).map(|i| i as i64).filter(|i| held.contains(i)).map(|i| i - held.start);
    Tensor::from_slice(&of_piece.collect::<Vec<i64>>()).to_device(piece.tensor.device())
}
