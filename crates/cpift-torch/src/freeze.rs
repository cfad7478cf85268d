//! Bit-exact freezing of single elements: their values are saved before a stage and put back after every update.
//!
//! Multiplying the update with a mask would not be bit-exact (−0.0 becomes +0.0) and would leave weight decay to be dealt
//! with; saved values are restored whatever the optimizer did.

use std::collections::BTreeMap;

use anyhow::Result;
use cpift_core::mask::{Mask, indices};
use tch::{Kind, Tensor, no_grad};

use crate::weights::Parameters;

/// The frozen elements of a set of parameters.
pub struct Freeze {
    frozen: BTreeMap<String, Frozen>,
}

struct Frozen {
    /// Flat positions, int64, ascending.
    index: Tensor,
    /// Their values, in the parameter's dtype.
    saved: Tensor,
}

impl Frozen {
    fn new(parameter: &Tensor, index: Tensor) -> Self {
        let saved = no_grad(|| parameter.flatten(0, -1).index_select(0, &index));
        Self { index, saved }
    }
}

impl Freeze {
    /// Freezes every element that is set in any of `masks` at its present value in `parameters`. The masks must have been checked
    /// against the base checkpoint.
    ///
    /// # Errors
    /// When a mask lacks a parameter.
    pub fn new(parameters: &Parameters, masks: &[&Mask]) -> Result<Self> {
        let mut frozen = BTreeMap::new();
        for (name, parameter) in parameters {
            let mut union = vec![0u8; parameter.numel().div_ceil(8)];
            for mask in masks {
                let bits = mask
                    .bits(name)
                    .ok_or_else(|| cpift_core::BadInput::new(mask.path(), "a mask tensor is missing").tensor(name))?;
                union.iter_mut().zip(bits).for_each(|(u, b)| *u |= b);
            }
            let positions: Vec<i64> = indices(&union).map(|i| i as i64).collect();
            if !positions.is_empty() {
                let index = Tensor::from_slice(&positions).to_device(parameter.device());
                frozen.insert(name.clone(), Frozen::new(parameter, index));
            }
        }
        Ok(Self { frozen })
    }

    /// Freezes about `percent` of the elements, evenly spread, for benchmarks.
    pub fn every(parameters: &Parameters, percent: f64) -> Self {
        let gap = (100.0 / percent).round().max(1.0) as i64;
        let frozen = |(name, parameter): (&String, &Tensor)| {
            let index = Tensor::arange_start_step(0, parameter.numel() as i64, gap, (Kind::Int64, parameter.device()));
            (name.clone(), Frozen::new(parameter, index))
        };
        Self { frozen: parameters.iter().map(frozen).collect() }
    }

    /// Number of frozen elements.
    pub fn len(&self) -> u64 {
        self.frozen.values().map(|f| f.index.numel() as u64).sum()
    }

    /// Whether nothing is frozen.
    pub fn is_empty(&self) -> bool {
        self.frozen.is_empty()
    }

    /// Zeroes the gradients of the frozen elements of the parameter `name`, so that the clip norm counts only what may move.
    pub fn mute(&self, name: &str, grad: &mut Tensor) {
        if let Some(frozen) = self.frozen.get(name) {
            no_grad(|| {
                // A gradient may come non-contiguous out of the backward pass; a view needs it flat.
                *grad = grad.contiguous();
                let _ = grad.view([-1]).index_fill_(0, &frozen.index, 0.0);
            });
        }
    }

    /// Puts the saved values of the parameter `name` back.
    pub fn restore(&self, name: &str, parameter: &Tensor) {
        if let Some(frozen) = self.frozen.get(name) {
            no_grad(|| drop(parameter.view([-1]).index_copy_(0, &frozen.index, &frozen.saved)));
        }
    }
}
