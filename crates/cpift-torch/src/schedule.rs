//! The learning rate over the steps of a stage: the schedules of transformers' `get_scheduler`,
//! under its names, and their arguments.

use std::f64::consts::PI;

use anyhow::Result;
use clap::ValueEnum;
use cpift_core::error::usage;
use serde::Serialize;

/// Heading of `--help`.
const BUDGET: &str = "Budget and schedule";

/// Shape of the learning rate after the warm-up.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Scheduler {
    /// Half a cosine from the peak to zero.
    Cosine,
    /// A line from the peak to zero.
    Linear,
    /// The peak from the first step on.
    Constant,
    /// The peak after the warm-up.
    ConstantWithWarmup,
    /// The peak until the decay over the last --num-decay-steps.
    WarmupStableDecay,
    /// Half a cosine from the peak to --min-lr-ratio of it.
    CosineWithMinLr,
}

/// Shape of a warm-up or a decay of [`Scheduler::WarmupStableDecay`].
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Ramp {
    /// A line.
    Linear,
    /// Half a cosine.
    Cosine,
    /// One minus a square root.
    #[value(name = "1-sqrt")]
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// Arguments of the schedule.
#[derive(clap::Args, Debug, Clone, Serialize)]
pub struct ScheduleArgs {
    /// Shape of the learning rate after the warm-up, by transformers' names: cosine and linear fall
    /// to zero; constant has no warm-up; warmup_stable_decay keeps the peak until the last
    /// --num-decay-steps; cosine_with_min_lr falls to --min-lr-ratio
    #[arg(long, aliases = ["lr_scheduler", "lr-scheduler-type", "lr_scheduler_type"], value_name = "NAME", value_enum)]
    #[arg(default_value_t = Scheduler::Cosine, help_heading = BUDGET)]
    pub lr_scheduler: Scheduler,
    /// Fraction of the steps for linear warm-up, rounded up; its first step has rate 0
    #[arg(long, aliases = ["warmup_ratio"], value_name = "F", allow_negative_numbers = true)]
    #[arg(default_value_t = 0.03, help_heading = BUDGET)]
    pub warmup_ratio: f64,
    /// Steps of the warm-up of each stage; excludes --warmup-ratio
    #[arg(long, aliases = ["warmup_steps"], value_name = "N", conflicts_with = "warmup_ratio", help_heading = BUDGET)]
    pub warmup_steps: Option<usize>,
    /// Steps of the decay at the end of each stage, of warmup_stable_decay
    #[arg(long, aliases = ["num_decay_steps"], value_name = "N", help_heading = BUDGET)]
    pub num_decay_steps: Option<usize>,
    /// Lowest learning rate as a share of the peak, of warmup_stable_decay (also where its warm-up
    /// starts) and cosine_with_min_lr
    #[arg(long, aliases = ["min_lr_ratio", "min-lr-rate", "min_lr_rate"], value_name = "F", help_heading = BUDGET)]
    #[arg(allow_negative_numbers = true)]
    pub min_lr_ratio: Option<f64>,
    /// Shape of the warm-up of warmup_stable_decay [default: linear]
    #[arg(long, aliases = ["warmup_type"], value_name = "SHAPE", value_enum, help_heading = BUDGET)]
    pub warmup_type: Option<Ramp>,
    /// Shape of the decay of warmup_stable_decay [default: cosine]
    #[arg(long, aliases = ["decay_type"], value_name = "SHAPE", value_enum, help_heading = BUDGET)]
    pub decay_type: Option<Ramp>,
}

impl ScheduleArgs {
    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] naming the argument.
    pub fn check(&self) -> Result<()> {
        use Scheduler::{Constant, CosineWithMinLr, WarmupStableDecay};
        let (kind, stable) = (self.lr_scheduler, self.lr_scheduler == WarmupStableDecay);
        let shaped = self.warmup_type.is_some() || self.decay_type.is_some();
        let rules = [
            ((0.0..=1.0).contains(&self.warmup_ratio), "--warmup-ratio must be 0 to 1"),
            (self.num_decay_steps != Some(0), "--num-decay-steps must be at least 1"),
            (self.min_lr_ratio.is_none_or(|r| (0.0..=1.0).contains(&r)), "--min-lr-ratio must be 0 to 1"),
            (
                kind != Constant || self.warmup_steps.is_none_or(|n| n == 0),
                "--lr-scheduler constant has no warm-up: constant_with_warmup has --warmup-steps",
            ),
            (!stable || self.num_decay_steps.is_some(), "--lr-scheduler warmup_stable_decay needs --num-decay-steps N"),
            (
                stable || self.num_decay_steps.is_none() && !shaped,
                "--num-decay-steps, --warmup-type and --decay-type are of --lr-scheduler warmup_stable_decay",
            ),
            (
                kind != CosineWithMinLr || self.min_lr_ratio.is_some(),
                "--lr-scheduler cosine_with_min_lr needs --min-lr-ratio F",
            ),
            (
                stable || kind == CosineWithMinLr || self.min_lr_ratio.is_none(),
                "--min-lr-ratio is of --lr-scheduler warmup_stable_decay and cosine_with_min_lr",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err(usage(*message)),
            None => Ok(()),
        }
    }

    /// The schedule of a stage of `total` steps. A warm-up given as a ratio is one step shorter
    /// than the stage at most, because its first step has rate 0.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] if the warm-up or the decay is longer than the stage.
    pub fn of(&self, stage: &str, peak: f64, total: usize) -> Result<Schedule> {
        let ratio = ((self.warmup_ratio * total as f64).ceil() as usize).min(total - 1);
        let mut warmup_steps = self.warmup_steps.unwrap_or(ratio);
        let too_long = |flag: &str| Err(usage(format!("{flag} with the {total} steps of {stage}: too many")));
        if self.warmup_steps.is_some_and(|n| n >= total) {
            return too_long(&format!("--warmup-steps {warmup_steps}"));
        }
        let decay_steps = self.num_decay_steps.unwrap_or(0);
        if decay_steps > total || self.warmup_steps.is_some() && warmup_steps + decay_steps > total {
            return too_long(&format!("--num-decay-steps {decay_steps} after {warmup_steps} of warm-up"));
        }
        warmup_steps = warmup_steps.min(total - decay_steps);
        let shape = match self.lr_scheduler {
            Scheduler::Cosine => Shape::Cosine { min: 0.0 },
            Scheduler::CosineWithMinLr => Shape::Cosine { min: self.min_lr_ratio.unwrap_or(0.0) },
            Scheduler::Linear => Shape::Linear,
            Scheduler::Constant => Shape::Constant,
            Scheduler::ConstantWithWarmup => Shape::Constant,
            Scheduler::WarmupStableDecay => Shape::StableDecay {
                decay_steps,
                min: self.min_lr_ratio.unwrap_or(0.0),
                warmup: self.warmup_type.unwrap_or(Ramp::Linear),
                decay: self.decay_type.unwrap_or(Ramp::Cosine),
            },
        };
        if self.lr_scheduler == Scheduler::Constant {
            warmup_steps = 0;
        }
        Ok(Schedule { peak, warmup_steps, total_steps: total, shape })
    }
}

/// The learning rate over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Peak learning rate.
    pub peak: f64,
    /// Warm-up steps.
    pub warmup_steps: usize,
    /// Number of steps.
    pub total_steps: usize,
    /// Course after the warm-up.
    pub shape: Shape,
}

/// Course of a schedule after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shape {
    /// Half a cosine from 1 to `min`.
    Cosine {
        /// Lowest share of the peak.
        min: f64,
    },
    /// A line to zero.
    Linear,
    /// Always 1.
    Constant,
    /// 1, then a decay to `min`, which the warm-up starts from too.
    StableDecay {
        /// Steps of the decay, the last ones.
        decay_steps: usize,
        /// Lowest share of the peak.
        min: f64,
        /// Shape of the warm-up.
        warmup: Ramp,
        /// Shape of the decay.
        decay: Ramp,
    },
}

impl Schedule {
    /// The rate of step `step`, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        self.peak * self.share(step)
    }

    /// The rate as a share of the peak, in the order of operations of transformers.
    fn share(&self, step: usize) -> f64 {
        let part = |steps: usize, of: usize| steps as f64 / of.max(1) as f64;
        if step < self.warmup_steps {
            let progress = part(step, self.warmup_steps);
            return match self.shape {
                Shape::StableDecay { min, warmup, .. } => above(warmup.rise(progress), min),
                _ => progress,
            };
        }
        let (after, rest) = (step - self.warmup_steps, self.total_steps.saturating_sub(self.warmup_steps));
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => part(self.total_steps.saturating_sub(step), rest),
            Shape::Cosine { min } => above(Ramp::Cosine.fall(part(after, rest)), min),
            Shape::StableDecay { decay_steps, min, decay, .. } => match (after + decay_steps).checked_sub(rest) {
                None => 1.0,
                Some(decayed) if decayed < decay_steps => above(decay.fall(part(decayed, decay_steps)), min),
                Some(_) => min,
            },
        }
    }
}

/// Maps 0 to `min` and 1 to 1.
fn above(share: f64, min: f64) -> f64 {
    (share * (1.0 - min) + min).max(0.0)
}

impl Ramp {
    /// From 0 to 1.
    fn rise(self, progress: f64) -> f64 {
        match self {
            Self::Linear => progress,
            Self::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
            Self::OneMinusSqrt => 1.0 - (1.0 - progress).sqrt(),
        }
    }

    /// From 1 to 0.
    fn fall(self, progress: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            Self::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}
