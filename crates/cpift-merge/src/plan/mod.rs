//! What a merge will do, checked and resolved before any work or any output starts.

pub(crate) mod cpi;
mod inputs;
mod output;
mod plain;
mod shard_size;
mod tokens;

pub use cpi::plan_cpi;
pub use inputs::Source;
pub use output::{Destination, check_space};
pub use plain::plan;
pub use shard_size::parse_shard_size;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::checkpoint::Excluded;
use cpift_core::format::digest::Digest;
use cpift_core::{Mask, TensorSpec, TensorView};

use crate::cli::Space;
use crate::engine::{Job, Tensor};
use crate::methods::{Claims, Conflict, Rule};

/// A merge ready to run.
pub struct Plan {
    /// The command, such as `cpi` or `slerp`.
    pub method: &'static str,
    /// θ⁽⁰⁾, for methods that have one.
    pub base: Option<Arc<Source>>,
    /// What is combined; for `cpi` the backbone comes first.
    pub operands: Vec<Arc<Source>>,
    /// How each tensor is combined, in bytewise name order.
    pub rules: Vec<Rule>,
    /// Whether weights or differences from the base are combined.
    pub space: Space,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: f64,
    /// The core region of each operand after the first; empty for the plain methods.
    pub cores: Vec<Mask>,
    /// What becomes of an element in several core regions.
    pub conflict: Conflict,
    /// Outside its mask an operand counts as the backbone; empty where none has one, and for `cpi`.
    pub masks: Vec<Option<Mask>>,
    /// Where the output is the backbone.
    pub protect: Option<Mask>,
    /// The seed of random draws, for methods that draw.
    pub seed: Option<u64>,
    /// The output.
    pub output: Destination,
    /// The output's README.md.
    pub card: String,
    /// Path and digest of the input files that are not checkpoints, by role.
    pub files: BTreeMap<String, (PathBuf, Digest)>,
}

impl Plan {
    /// What gives the buffers and config.json, and counts where an operand is masked: the backbone of `cpi`, else the base where
    /// the method has one, else the first model.
    pub fn backbone(&self) -> &Arc<Source> {
        match &self.base {
            Some(base) if self.cores.is_empty() => base,
            _ => &self.operands[0],
        }
    }

    /// Every checkpoint that is read: the operands, then a base apart from them.
    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        let base = self.base.iter().filter(|_| self.base_is_separate());
        self.operands.iter().chain(base).map(Arc::as_ref)
    }

    /// Whether the base is read apart from the operands.
    fn base_is_separate(&self) -> bool {
        self.base.as_ref().is_some_and(|base| !Arc::ptr_eq(base, &self.operands[0]))
    }

    /// The merge as the engine takes it.
    pub fn job(&self) -> Job<'_> {
        let parameters = self.backbone().checkpoint.parameters();
        Job {
            tensors: parameters.zip(&self.rules).map(|(view, rule)| self.tensor(view.name, rule)).collect(),
            space: self.space,
            base_is_separate: self.base_is_separate(),
            epsilon: self.epsilon,
            conflict: self.conflict,
            dtype: self.output.dtype,
        }
    }

    fn tensor<'a>(&'a self, name: &str, rule: &'a Rule) -> Tensor<'a> {
        let view = |source: &'a Arc<Source>| source.checkpoint.get(name).expect("checked to be there");
        let bits = |mask: &'a Mask| mask.bits(name).expect("checked to be there");
        Tensor {
            operands: self.operands.iter().map(view).collect(),
            base: self.base.as_ref().map(view),
            claims: Claims::new(self.cores.iter().map(bits).collect()),
            masks: self.masks.iter().map(|mask| mask.as_ref().map(bits)).collect(),
            protected: self.protect.as_ref().map(bits),
            rule,
        }
    }

    /// What the output's parameters are, in bytewise name order.
    pub fn specs(&self) -> Vec<TensorSpec> {
        let parameters = self.backbone().checkpoint.parameters();
        parameters.map(|view| TensorSpec { dtype: self.output.dtype, ..view.spec() }).collect()
    }

    /// The backbone's tensors that are copied as they are. A tied lm_head is not: it is the input embedding once more, and
    /// transformers restores it from config.json.
    pub fn copies(&self) -> Vec<TensorView<'_>> {
        let others = self.backbone().checkpoint.not_parameters();
        others.filter(|(_, why)| *why != Excluded::Tied).map(|(view, _)| view).collect()
    }

    /// Bytes of all tensors of the output.
    pub fn bytes_to_write(&self) -> u64 {
        let parameters: u64 = self.specs().iter().map(|s| s.nbytes() as u64).sum();
        parameters + self.copies().iter().map(|v| v.bytes.len() as u64).sum::<u64>()
    }

    /// Bytes of all tensors that are read.
    pub fn bytes_to_read(&self) -> u64 {
        self.sources().flat_map(|s| s.checkpoint.tensors()).map(|v| v.bytes.len() as u64).sum()
    }
}

/// Refuses what is not between 0 and 1.
fn require_unit(what: &str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(usage(format!("{what} must lie between 0 and 1, found {value}")))
}

/// Refuses an ε that is no angle of a linear branch.
fn check_epsilon(value: f64) -> Result<()> {
    if (0.0..=std::f64::consts::FRAC_PI_2).contains(&value) {
        return Ok(());
    }
    Err(usage(format!("--epsilon must lie between 0 and π/2 radians, found {value}")))
}
