//! The optimizer: AdamW with decoupled weight decay, clipping to a global norm, the guard against
//! values that are not finite, stochastic rounding to bf16, and the learning-rate schedule.

use std::f64::consts::PI;

use anyhow::Result;
use cpift_core::stream::random::splitmix64;
use tch::{Device, Kind, Tensor, no_grad};

use crate::ffi::{AdamWNumbers, AdamWTensors, fused_adamw};
use crate::weights::Parameters;

/// The learning rate over a known number of steps: linear warm-up, then half a cosine to zero, as
/// in transformers' `get_cosine_schedule_with_warmup`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CosineWithWarmup {
    /// Peak learning rate.
    pub peak: f64,
    /// Warm-up steps.
    pub warmup_steps: usize,
    /// Number of steps.
    pub total_steps: usize,
}

impl CosineWithWarmup {
    /// The rate of step `step`, counted from 0. The first step of a warm-up has rate 0.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps.max(1) as f64;
        }
        let rest = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = (step - self.warmup_steps) as f64 / rest;
        self.peak * (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
    }
}

/// Hyperparameters of AdamW; the defaults are PyTorch's, without weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// ε, added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, applied to tensors of two or more dimensions: not to norms and
    /// biases.
    pub weight_decay: f64,
    /// Dtype of the moments: f32, or bf16 with stochastic rounding.
    pub state: Kind,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, state: Kind::Float }
    }
}

/// AdamW with its state for a list of parameters.
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

/// Inputs of an update besides its gradients.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    /// Learning rate.
    pub lr: f64,
    /// Seed of the stochastic rounding; a different one for each step.
    pub seed: u64,
    /// Decides if the update happens, and scales the gradients.
    pub guard: &'a Guard,
}

/// Elements widened to f32 at a time if dtypes differ: 64 MiB for each of four temporaries.
const WIDENED: i64 = 1 << 24;

impl AdamW {
    /// An optimizer for `parameters` whose moments are zero.
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

    /// Updates the parameters with indices `chosen` (in the list given to [`AdamW::new`]) by
    /// `grads`, one each.
    ///
    /// # Errors
    /// An error of libtorch.
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
                    // A seed of its own, so that the bits do not depend on which parameters are
                    // updated together.
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

    /// Updates a parameter whose dtypes are not all f32: a part at a time is copied to f32,
    /// updated, and rounded back stochastically.
    fn step_widened(&self, slot: &Slot, grad: &Tensor, update: Update<'_>) -> Result<()> {
        let count = slot.param.numel() as i64;
        let before = no_grad(|| slot.step.copy());
        for start in (0..count).step_by(WIDENED as usize) {
            let part = |t: &Tensor| t.detach().view([-1]).narrow(0, start, WIDENED.min(count - start));
            let kept = [part(&slot.param), part(&slot.exp_avg), part(&slot.exp_avg_sq)];
            let wide: Vec<Tensor> = kept.iter().map(|t| t.to_kind(Kind::Float)).collect();
            let wide_grad = part(grad).to_kind(Kind::Float);
            // All parts belong to one step: each starts from the same counter.
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

    /// The moments as `NAME.exp_avg` and `NAME.exp_avg_sq`; they share storage with the optimizer.
    pub fn moments(&self) -> Parameters {
        let pair = |s: &Slot| {
            [
                (format!("{}.exp_avg", s.name), s.exp_avg.shallow_clone()),
                (format!("{}.exp_avg_sq", s.name), s.exp_avg_sq.shallow_clone()),
            ]
        };
        self.slots.iter().flat_map(pair).collect()
    }

    /// Sets the number of updates already made, for bias correction.
    pub fn set_steps(&mut self, steps: usize) {
        no_grad(|| self.slots.iter_mut().for_each(|s| drop(s.step.fill_(steps as f64))));
    }
}

/// Blocks updates after a loss or norm that is not finite, on the device and without synchronising,
/// and clips gradients. Once a value was not finite, all later updates do nothing: the host may
/// notice steps later.
pub struct Guard {
    /// One f32 element: 1 from the first value on that is not finite.
    found_inf: Tensor,
    /// Divisor of the gradients, one f32 element; none without clipping.
    grad_scale: Option<Tensor>,
}

impl Guard {
    /// A guard that blocks nothing yet.
    pub fn new(device: Device) -> Self {
        Self { found_inf: Tensor::zeros([1], (Kind::Float, device)), grad_scale: None }
    }

    /// Blocks all further updates unless `value` (one element) is finite.
    pub fn require_finite(&mut self, value: &Tensor) {
        let bad = value.isfinite().logical_not().to_kind(Kind::Float).view([1]);
        self.found_inf = no_grad(|| self.found_inf.max_other(&bad));
    }

    /// Returns the global L2 norm of `grads`; with `max_norm`, the next update scales them to at
    /// most that norm, as `torch.nn.utils.clip_grad_norm_` does.
    pub fn watch(&mut self, grads: &[Tensor], max_norm: Option<f64>) -> Tensor {
        let norms: Vec<Tensor> = grads.iter().map(|g| g.norm_scalaropt_dtype(2, Kind::Float)).collect();
        let norm = Tensor::stack(&norms, 0).norm();
        self.require_finite(&norm);
        self.grad_scale = max_norm.map(|max| ((&norm + 1e-6) / max).clamp_min(1.0).view([1]));
        norm
    }

    pub(crate) fn grad_scale(&self) -> Option<&Tensor> {
        self.grad_scale.as_ref()
    }

    pub(crate) fn found_inf(&self) -> &Tensor {
        &self.found_inf
    }
}

/// Rounds an f32 tensor to bf16 stochastically: up or down with the probabilities that make the
/// rounding unbiased, so that updates smaller than half a bf16 step are not lost. Draws from
/// libtorch's generator.
fn stochastic_bf16(wide: &Tensor) -> Tensor {
    // bf16 is the upper half of f32: adding 16 random bits to the lower half carries into the upper
    // with that probability.
    let noise = Tensor::randint(1 << 16, wide.size(), (Kind::Int, wide.device()));
    let bits = wide.contiguous().view_dtype(Kind::Int) + noise;
    bits.bitwise_and(-(1i64 << 16)).view_dtype(Kind::Float).to_kind(Kind::BFloat16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mean of many roundings of x: within 5 standard errors of x.
    #[test]
    fn the_mean_is_unbiased_for_either_sign() {
        tch::manual_seed(1);
        let draws = 1 << 18;
        for x in [1.001, -1.001, 3e-5, -7.7e4, 1.0 + 1.0 / 512.0] {
            let rounded = stochastic_bf16(&Tensor::full([draws], x, (Kind::Float, Device::Cpu))).to_kind(Kind::Double);
            let x = f64::from(x as f32);
            let spread = rounded.std(true).double_value(&[]) / (draws as f64).sqrt();
            let error = (rounded.mean(Kind::Double).double_value(&[]) - x).abs();
            assert!(spread > 0.0 && error < 5.0 * spread, "{x}: mean off by {error}, standard error {spread}");
            let values = rounded.unique_dim(0, true, false, false).0;
            assert_eq!(values.numel(), 2, "{x}: only its two neighbours");
        }
    }

    #[test]
    fn what_bf16_holds_is_kept() {
        let exact = Tensor::from_slice(&[0.0f32, -0.0, 1.0, -2.5, 3.3895314e38]);
        let rounded = stochastic_bf16(&exact).to_kind(Kind::Float);
        assert_eq!(exact.view_dtype(Kind::Int), rounded.view_dtype(Kind::Int));
    }
}
