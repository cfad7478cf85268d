//! The learning rate over a run: linear warm-up, then half a cosine to zero, as `get_cosine_schedule_with_warmup` has it.

use std::f64::consts::PI;

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CosineWithWarmup {
    /// The highest rate.
    pub peak: f64,
    /// Steps that climb from 0.
    pub warmup_steps: usize,
    /// All steps.
    pub total_steps: usize,
}

impl CosineWithWarmup {
    /// The rate of step `step`, counted from 0. The very first of a warm-up is 0.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps.max(1) as f64;
        }
        let rest = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = (step - self.warmup_steps) as f64 / rest;
        self.peak * (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
    }
}
