//! Losses and norms that are not finite stop the updates, on the device and without waiting for it.

use tch::{Device, Kind, Tensor, no_grad};

/// Whether an update may be made, and the scale of its gradients. Once a loss or norm was not finite, no later update moves anything:
/// the host may learn of it steps later.
pub struct Guard {
    /// One f32 element: 1 from the first bad value on.
    found_inf: Tensor,
    /// What gradients are divided by, one f32 element; none where nothing clips.
    grad_scale: Option<Tensor>,
}

impl Guard {
    /// A guard that lets everything through.
    pub fn new(device: Device) -> Self {
        Self { found_inf: Tensor::zeros([1], (Kind::Float, device)), grad_scale: None }
    }

    /// Stops all updates from here on unless `value` (one element) is finite.
    pub fn require_finite(&mut self, value: &Tensor) {
        let bad = value.isfinite().logical_not().to_kind(Kind::Float).view([1]);
        self.found_inf = no_grad(|| self.found_inf.max_other(&bad));
    }

    /// The L2 norm of all gradients together; with `max_norm`, scales the next update's gradients so that it is at most that
    /// (`torch.nn.utils.clip_grad_norm_`).
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
