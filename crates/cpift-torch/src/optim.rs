//! AdamW with decoupled weight decay over f32 (or wider) master weights, and gradient clipping by the global norm.

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use crate::ffi::{AdamWTensors, fused_adamw};
use crate::weights::Parameters;

/// AdamW's numbers; the defaults are PyTorch's, with no decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the moments.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, on tensors of two or more dimensions only: norms and biases do not decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The optimizer's state for a set of parameters, in the order of their names.
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
}

struct Slot {
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    decays: bool,
}

impl AdamW {
    /// A fresh state for `parameters`.
    pub fn new(parameters: &Parameters, config: AdamWConfig) -> Self {
        let slots = parameters
            .values()
            .map(|param| {
                let param = param.shallow_clone();
                no_grad(|| Slot {
                    exp_avg: param.zeros_like(),
                    exp_avg_sq: param.zeros_like(),
                    step: Tensor::zeros([], (Kind::Float, param.device())),
                    decays: param.dim() >= 2,
                    param: param.shallow_clone(),
                })
            })
            .collect();
        Self { config, slots }
    }

    /// One step with learning rate `lr`; `grads` are in the order of the parameters' names.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn step(&mut self, grads: &[Tensor], lr: f64) -> Result<()> {
        assert_eq!(grads.len(), self.slots.len());
        // The fused kernel reads gradients by the parameter's strides.
        let grads: Vec<Tensor> = grads.iter().map(Tensor::contiguous).collect();
        for decays in [true, false] {
            let chosen: Vec<(&Slot, &Tensor)> =
                self.slots.iter().zip(&grads).filter(|(slot, _)| slot.decays == decays).collect();
            if chosen.is_empty() {
                continue;
            }
            let tensors = AdamWTensors {
                params: chosen.iter().map(|(slot, _)| &slot.param).collect(),
                grads: chosen.iter().map(|(_, grad)| *grad).collect(),
                exp_avgs: chosen.iter().map(|(slot, _)| &slot.exp_avg).collect(),
                exp_avg_sqs: chosen.iter().map(|(slot, _)| &slot.exp_avg_sq).collect(),
                steps: chosen.iter().map(|(slot, _)| &slot.step).collect(),
            };
            let weight_decay = if decays { self.config.weight_decay } else { 0.0 };
            fused_adamw(&tensors, lr, self.config.betas, weight_decay, self.config.eps)?;
        }
        Ok(())
    }
}

/// The L2 norm of all gradients together.
pub fn global_norm(grads: &[Tensor]) -> f64 {
    let norms: Vec<Tensor> = grads.iter().map(Tensor::norm).collect();
    Tensor::stack(&norms, 0).norm().double_value(&[])
}

/// Scales the gradients so that their global norm, `norm`, is at most `max_norm` (`torch.nn.utils.clip_grad_norm_`).
pub fn clip(grads: &mut [Tensor], norm: f64, max_norm: f64) {
    let scale = max_norm / (norm + 1e-6);
    if scale < 1.0 {
        no_grad(|| grads.iter_mut().for_each(|g| drop(g.g_mul_scalar_(scale))));
    }
}
