//! AdamW with decoupled weight decay, gradients kept within a global norm, and the guard that stops an update before it spoils
//! the weights.

mod guard;
mod rounding;

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use crate::ffi::{AdamWNumbers, AdamWTensors, fused_adamw};
use crate::weights::Parameters;
use cpift_core::stream::random::splitmix64;

pub use guard::Guard;
pub use rounding::stochastic_bf16;

/// AdamW's numbers; the defaults are PyTorch's, with no decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the moments.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, on tensors of two or more dimensions only: norms and biases do not decay.
    pub weight_decay: f64,
    /// Element type of the moments: f32, or bf16 with stochastic rounding.
    pub state: Kind,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, state: Kind::Float }
    }
}

/// The optimizer's state for a list of parameters.
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
}

struct Slot {
    name: String,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    decays: bool,
}

/// What one update has besides its gradients.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    /// Learning rate.
    pub lr: f64,
    /// Seed of the stochastic rounding; another for each step.
    pub seed: u64,
    /// Whether to update at all, and by how much gradients are scaled first.
    pub guard: &'a Guard,
}

/// Elements that are widened to f32 at a time where dtypes differ: 64 MiB for each of four temporaries.
const WIDENED: i64 = 1 << 24;

impl AdamW {
    /// A fresh state for `parameters`.
    pub fn new<'a>(parameters: impl Iterator<Item = (&'a String, &'a Tensor)>, config: AdamWConfig) -> Self {
        let slot = |(name, param): (&String, &Tensor)| Slot {
            name: name.clone(),
            exp_avg: Tensor::zeros(param.size(), (config.state, param.device())),
            exp_avg_sq: Tensor::zeros(param.size(), (config.state, param.device())),
            step: Tensor::zeros([], (Kind::Float, param.device())),
            decays: param.dim() >= 2,
            param: param.shallow_clone(),
        };
        Self { config, slots: no_grad(|| parameters.map(slot).collect()) }
    }

    /// Updates the parameters at the places `chosen` (in the list the state was made for) with `grads`, one for each.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn step(&mut self, chosen: &[usize], grads: &[Tensor], update: Update<'_>) -> Result<()> {
        assert_eq!(grads.len(), chosen.len());
        // The fused kernel reads gradients by the parameter's strides.
        let grads: Vec<Tensor> = grads.iter().map(Tensor::contiguous).collect();
        for decays in [true, false] {
            let mut tensors = AdamWTensors::default();
            for (&i, grad) in chosen.iter().zip(&grads).filter(|(i, _)| self.slots[**i].decays == decays) {
                let slot = &self.slots[i];
                if [slot.param.kind(), slot.exp_avg.kind(), grad.kind()] == [Kind::Float; 3] {
                    tensors.params.push(&slot.param);
                    tensors.grads.push(grad);
                    tensors.exp_avgs.push(&slot.exp_avg);
                    tensors.exp_avg_sqs.push(&slot.exp_avg_sq);
                    tensors.steps.push(&slot.step);
                } else {
                    // A seed of its own, so that the bits do not depend on which parameters are updated together.
                    tch::manual_seed(splitmix64(update.seed, i as u64) as i64);
                    self.step_widened(slot, grad, update)?;
                }
            }
            if !tensors.params.is_empty() {
                fused_adamw(&tensors, &self.numbers(decays, update))?;
            }
        }
        Ok(())
    }

    /// One parameter whose dtypes differ: f32 copies of a part at a time, rounded back stochastically.
    fn step_widened(&self, slot: &Slot, grad: &Tensor, update: Update<'_>) -> Result<()> {
        let count = slot.param.numel() as i64;
        let before = no_grad(|| slot.step.copy());
        for start in (0..count).step_by(WIDENED as usize) {
            let part = |t: &Tensor| t.detach().view([-1]).narrow(0, start, WIDENED.min(count - start));
            let kept = [part(&slot.param), part(&slot.exp_avg), part(&slot.exp_avg_sq)];
            let wide: Vec<Tensor> = kept.iter().map(|t| t.to_kind(Kind::Float)).collect();
            let wide_grad = part(grad).to_kind(Kind::Float);
            // Every part is the same step; the counter is one for all.
            let step = before.copy();
            let tensors = AdamWTensors {
                params: vec![&wide[0]],
                grads: vec![&wide_grad],
                exp_avgs: vec![&wide[1]],
                exp_avg_sqs: vec![&wide[2]],
                steps: vec![&step],
            };
            fused_adamw(&tensors, &self.numbers(slot.decays, update))?;
            for (mut kept, wide) in kept.into_iter().zip(&wide) {
                if kept.kind() == Kind::BFloat16 {
                    kept.copy_(&stochastic_bf16(wide));
                } else if wide.data_ptr() != kept.data_ptr() {
                    kept.copy_(wide);
                }
            }
        }
        no_grad(|| drop(slot.step.shallow_clone().g_add_scalar_(1.0)));
        Ok(())
    }

    fn numbers<'a>(&self, decays: bool, update: Update<'a>) -> AdamWNumbers<'a> {
        AdamWNumbers {
            lr: update.lr,
            betas: self.config.betas,
            weight_decay: if decays { self.config.weight_decay } else { 0.0 },
            eps: self.config.eps,
            grad_scale: update.guard.grad_scale(),
            found_inf: Some(update.guard.found_inf()),
        }
    }

    /// The moments by name, `NAME.exp_avg` and `NAME.exp_avg_sq`; they share storage with the state.
    pub fn moments(&self) -> Parameters {
        let pair = |s: &Slot| {
            [
                (format!("{}.exp_avg", s.name), s.exp_avg.shallow_clone()),
                (format!("{}.exp_avg_sq", s.name), s.exp_avg_sq.shallow_clone()),
            ]
        };
        self.slots.iter().flat_map(pair).collect()
    }

    /// Tells the state that `steps` updates have been made.
    pub fn set_steps(&mut self, steps: usize) {
        no_grad(|| self.slots.iter_mut().for_each(|s| drop(s.step.fill_(steps as f64))));
    }
}
