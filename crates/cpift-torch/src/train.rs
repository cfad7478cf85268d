//! The training loop: batches in, losses out, frozen elements put back after every step.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cpift_core::progress;
use log::info;
use serde_json::json;
use tch::{Kind, Reduction, Tensor};

use crate::args::{Budget, TrainingArgs};
use crate::data::{Batch, Example, FeedConfig, Feeder};
use crate::freeze::Freeze;
use crate::model::CausalLM;
use crate::optim::{AdamW, AdamWConfig, clip, global_norm};
use crate::schedule::CosineWithWarmup;
use crate::weights::Parameters;

/// A model in training: its parameters, the optimizer's state, what is frozen.
pub struct Trainer<'a> {
    model: &'a CausalLM,
    parameters: &'a Parameters,
    freeze: Option<&'a Freeze>,
    optimizer: AdamW,
    max_grad_norm: f64,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Mean loss in nats over the step's target tokens, before the update.
    pub loss: f64,
    /// Global gradient norm before clipping, frozen elements not counted.
    pub grad_norm: f64,
}

impl<'a> Trainer<'a> {
    /// A trainer with a fresh optimizer state.
    pub fn new(
        model: &'a CausalLM,
        parameters: &'a Parameters,
        freeze: Option<&'a Freeze>,
        optimizer: AdamWConfig,
        max_grad_norm: f64,
    ) -> Self {
        Self { model, parameters, freeze, optimizer: AdamW::new(parameters, optimizer), max_grad_norm }
    }

    /// One optimizer step over the micro-batches, whose gradients are those of one big batch.
    ///
    /// # Errors
    /// A loss or gradient norm that is not finite: nothing has been updated then.
    pub fn step(&mut self, batches: &[Batch], lr: f64) -> Result<StepReport> {
        let targets: usize = batches.iter().map(|b| b.targets).sum();
        let inputs: Vec<&Tensor> = self.parameters.values().collect();
        let mut loss = 0.0;
        let mut grads: Vec<Tensor> = Vec::new();
        for batch in batches {
            let part = loss_sum(self.model, batch) / targets as f64;
            let fresh = Tensor::run_backward(&[&part], &inputs, false, false);
            loss += part.double_value(&[]);
            accumulate(&mut grads, fresh);
        }
        if let Some(freeze) = self.freeze {
            freeze.mute(self.parameters, &mut grads);
        }
        let grad_norm = global_norm(&grads);
        if !loss.is_finite() || !grad_norm.is_finite() {
            bail!("loss {loss}, gradient norm {grad_norm}: stopped before the update (hint: lower --lr)");
        }
        if self.max_grad_norm > 0.0 {
            clip(&mut grads, grad_norm, self.max_grad_norm);
        }
        self.optimizer.step(&grads, lr)?;
        if let Some(freeze) = self.freeze {
            freeze.restore(self.parameters);
        }
        Ok(StepReport { loss, grad_norm })
    }
}

fn accumulate(sum: &mut Vec<Tensor>, fresh: Vec<Tensor>) {
    if sum.is_empty() {
        *sum = fresh;
    } else {
        sum.iter_mut().zip(&fresh).for_each(|(s, f)| drop(s.g_add_(f)));
    }
}

/// The summed cross entropy of a batch's targets, in nats: a scalar with its graph.
pub fn loss_sum(model: &CausalLM, batch: &Batch) -> Tensor {
    let x_bse = model.hidden(&batch.ids_bs, &model.documents(&batch.lengths), None);
    let logits = model.logits(&x_bse).flatten(0, 1);
    let labels = batch.labels_bs.flatten(0, 1);
    logits.cross_entropy_loss::<Tensor>(&labels, None, Reduction::Sum, crate::data::IGNORE, 0.0)
}

/// What a stage of training did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StageReport {
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens seen, padding not counted.
    pub tokens: usize,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Mean loss of the last tenth of the steps.
    pub final_loss: f64,
}

/// One line of JSON for every step.
pub struct Metrics {
    file: File,
}

impl Metrics {
    /// Creates metrics.jsonl in a staged folder.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(staged: &Path) -> Result<Self> {
        let path = staged.join("metrics.jsonl");
        Ok(Self { file: File::create(&path).with_context(|| format!("creating {}", path.display()))? })
    }

    fn write(&mut self, line: &serde_json::Value) -> Result<()> {
        writeln!(self.file, "{line}").context("writing metrics.jsonl")
    }
}

/// What one stage trains on and how.
pub struct Stage<'a> {
    /// Name in logs and metrics.
    pub label: &'a str,
    /// The examples.
    pub examples: &'a [Example],
    /// What must not move.
    pub freeze: Option<&'a Freeze>,
    /// How long.
    pub budget: Budget,
    /// Seed of the shuffle.
    pub seed: u64,
}

/// Trains `model` in place through one stage.
///
/// # Errors
/// As [`Trainer::step`], with the step named; I/O errors on the metrics.
pub fn run_stage(
    model: &CausalLM,
    parameters: &Parameters,
    stage: &Stage<'_>,
    args: &TrainingArgs,
    metrics: &mut Metrics,
) -> Result<StageReport> {
    let config = FeedConfig { batch_size: args.batch_size, grad_accum: args.grad_accum };
    let total = plan_steps(stage, config);
    // The first step of a warm-up has rate 0, so a stage of one step has none.
    let warmup = ((args.warmup_ratio * total as f64).ceil() as usize).min(total - 1);
    let schedule = CosineWithWarmup { peak: args.lr, warmup_steps: warmup, total_steps: total };
    let mut trainer = Trainer::new(model, parameters, stage.freeze, args.optimizer(), args.max_grad_norm);
    let mut feeder = Feeder::new(stage.examples.len(), config, stage.seed);
    let mut report = StageReport::default();
    let mut losses = Vec::new();
    let bar = progress::items("training", total as u64);
    let clock = Instant::now();
    for step in 0..total {
        let batches: Vec<Batch> = feeder
            .next_step()
            .iter()
            .map(|chosen| Batch::new(&chosen.iter().map(|&i| &stage.examples[i]).collect::<Vec<_>>(), model.device()))
            .collect();
        let lr = schedule.rate(step);
        let done = trainer.step(&batches, lr).with_context(|| format!("{}, step {}", stage.label, step + 1))?;
        report.tokens += batches.iter().map(Batch::tokens).sum::<usize>();
        losses.push(done.loss);
        let rate = report.tokens as f64 / clock.elapsed().as_secs_f64();
        metrics.write(&json!({"stage": stage.label, "step": step + 1, "loss": done.loss, "lr": lr,
            "grad_norm": done.grad_norm, "tokens": report.tokens, "tokens_per_second": rate,
            "memory_mib": resident_mib()}))?;
        bar.set_message(format!("loss {:.4}, {rate:.0} tokens/s", done.loss));
        bar.inc(1);
        if (step + 1) % args.log_every == 0 || step + 1 == total {
            info!(
                "{} step {}/{total} loss {:.4} norm {:.3} lr {lr:.2e} {rate:.0} tokens/s",
                stage.label,
                step + 1,
                done.loss,
                done.grad_norm
            );
        }
    }
    bar.finish_and_clear();
    report.steps = total;
    report.first_loss = losses[0];
    let tail = &losses[total - total.div_ceil(10)..];
    report.final_loss = tail.iter().sum::<f64>() / tail.len() as f64;
    Ok(report)
}

/// The number of steps of a stage. A budget in tokens is walked through with the stage's own sampler, so that the schedule
/// knows its length before the first step.
fn plan_steps(stage: &Stage<'_>, config: FeedConfig) -> usize {
    match stage.budget {
        Budget::Steps(n) => n,
        Budget::Tokens(budget) => {
            let mut feeder = Feeder::new(stage.examples.len(), config, stage.seed);
            let (mut seen, mut steps) = (0, 0);
            while seen < budget {
                seen += feeder.next_step().concat().into_iter().map(|i| stage.examples[i].ids.len()).sum::<usize>();
                steps += 1;
            }
            steps
        }
    }
}

/// Resident memory of this process in MiB; 0 where the system does not say.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}

/// The dtype blocks compute in: what was asked for, else f32 on the CPU and bf16 on CUDA.
pub fn compute_kind(asked: Option<cpift_core::Dtype>, device: tch::Device) -> Kind {
    match asked {
        Some(dtype) => crate::weights::kind_of(dtype),
        None if device.is_cuda() => Kind::BFloat16,
        None => Kind::Float,
    }
}
