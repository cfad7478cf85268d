//! The leaves of a block: Linear, RmsNorm, Mlp; and the loader that takes their tensors by name.

use std::path::Path;

use anyhow::Result;
use tch::{Kind, Tensor};

use super::config::{Activation, ModelConfig};
use crate::ffi;
use crate::weights::{Parameters, take};

/// Takes named tensors, with the path for messages and the list of what was taken.
pub(super) struct Loader<'a> {
    pub parameters: &'a Parameters,
    pub path: &'a Path,
    pub taken: Vec<String>,
}

impl Loader<'_> {
    pub(super) fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.taken.push(name.to_owned());
        take(self.parameters, self.path, name, shape)
    }

    pub(super) fn linear(&mut self, name: &str, shape: [i64; 2], bias: bool) -> Result<Linear> {
        let weight = self.get(&format!("{name}.weight"), &shape)?;
        let bias = if bias { Some(self.get(&format!("{name}.bias"), &shape[..1])?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// An RMS norm over `width` elements.
    pub(super) fn norm(&mut self, name: &str, width: i64, c: &ModelConfig) -> Result<RmsNorm> {
        let weight = self.get(&format!("{name}.weight"), &[width])?;
        Ok(RmsNorm { weight, eps: c.rms_norm_eps, add_one: c.gemma_norms })
    }
}

/// y = x·Wᵀ + b, computed in the dtype of x: master weights are cast on the way.
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let bias = self.bias.as_ref().map(|b| b.to_kind(kind));
        ffi::linear(x, &self.weight.to_kind(kind), bias.as_ref())
    }
}

/// x / rms(x) · weight over the last dimension, normalised in f32 as transformers does. Gemma multiplies with 1 + weight, in f32.
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f64,
    add_one: bool,
}

impl RmsNorm {
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let wide = x.to_kind(Kind::Float);
        let mean_square = wide.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        let normed = wide * (mean_square + self.eps).rsqrt();
        if self.add_one {
            (normed * (self.weight.to_kind(Kind::Float) + 1.0)).to_kind(kind)
        } else {
            self.weight.to_kind(kind) * normed.to_kind(kind)
        }
    }
}

/// down(act(gate(x)) · up(x)).
pub(super) struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    pub(super) fn load(loader: &mut Loader<'_>, prefix: &str, c: &ModelConfig) -> Result<Self> {
        let (e, f) = (c.hidden_size, c.intermediate_size);
        Ok(Self {
            gate_proj: loader.linear(&format!("{prefix}.gate_proj"), [f, e], c.mlp_bias)?,
            up_proj: loader.linear(&format!("{prefix}.up_proj"), [f, e], c.mlp_bias)?,
            down_proj: loader.linear(&format!("{prefix}.down_proj"), [e, f], c.mlp_bias)?,
            activation: c.activation,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let gate = self.gate_proj.forward(x);
        let gate = match self.activation {
            Activation::Silu => gate.silu(),
            Activation::GeluTanh => gate.gelu("tanh"),
            Activation::Gelu => gate.gelu("none"),
        };
        self.down_proj.forward(&(gate * self.up_proj.forward(x)))
    }
}
