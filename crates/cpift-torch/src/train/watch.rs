//! What a person sees of a run: metrics.jsonl, TensorBoard, a bar on a terminal, lines in a log.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cpift_core::progress;
use indicatif::ProgressBar;
use log::info;
use serde_json::{Value, json};
use tch::Device;

use super::METRICS;
use crate::ffi;
use crate::tensorboard::TensorBoard;

/// Where the figures of a run go.
pub(crate) struct Watch {
    path: PathBuf,
    metrics: File,
    board: Option<TensorBoard>,
    device: Device,
}

/// One step's figures.
pub(crate) struct StepFigures {
    /// Step within the stage, from 1.
    pub step: usize,
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    /// Tokens of the stage so far.
    pub tokens: usize,
}

impl Watch {
    /// Starts metrics.jsonl in the staged folder, or goes on with what `earlier` holds; the same for TensorBoard's files in `board`, from
    /// step `first` of the run.
    pub fn start(
        staged: &Path,
        earlier: Option<&Path>,
        board: Option<&Path>,
        first: usize,
        device: Device,
    ) -> Result<Self> {
        let path = staged.join(METRICS);
        if let Some(earlier) = earlier {
            fs::copy(earlier, &path).with_context(|| format!("copying {}", earlier.display()))?;
        }
        let metrics = OpenOptions::new().create(true).append(true).open(&path);
        let metrics = metrics.with_context(|| format!("creating {}", path.display()))?;
        let board = board.map(|folder| TensorBoard::create(folder, first as i64)).transpose()?;
        Ok(Self { path, metrics, board, device })
    }

    /// The file of the figures.
    pub fn metrics(&self) -> &Path {
        &self.path
    }

    /// Watches a stage whose first step is number `before` + 1 of the run.
    pub fn stage<'a>(&'a mut self, label: &'a str, total: usize, before: usize, log_every: usize) -> StageWatch<'a> {
        let bar = progress::items("training", total as u64);
        StageWatch {
            watch: self,
            label,
            total,
            before,
            log_every,
            bar,
            clock: Instant::now(),
            idle: Duration::ZERO,
            seen: 0,
        }
    }

    fn line(&mut self, line: &Value) -> Result<()> {
        writeln!(self.metrics, "{line}").context("writing metrics.jsonl")
    }

    fn scalars(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        match &mut self.board {
            Some(board) => values.iter().try_for_each(|(tag, value)| board.scalar(tag, step as i64, *value)),
            None => Ok(()),
        }
    }

    /// Memory in use in MiB: of tensors on the device where it is CUDA, else of the process.
    fn memory_mib(&self) -> u64 {
        match self.device {
            Device::Cuda(index) => ffi::cuda_memory(index).map_or(0, |(now, _)| now >> 20),
            _ => resident_mib(),
        }
    }
}

/// The figures of one stage.
pub(crate) struct StageWatch<'a> {
    watch: &'a mut Watch,
    label: &'a str,
    total: usize,
    before: usize,
    log_every: usize,
    bar: ProgressBar,
    clock: Instant,
    /// Time not spent in training.
    idle: Duration,
    /// Tokens of the stage when the clock was started.
    seen: usize,
}

impl StageWatch<'_> {
    /// Starts the bar and the clock at a step that is not the first.
    pub fn skip_to(&mut self, step: usize, tokens: usize) {
        self.bar.set_position(step as u64);
        self.bar.reset_eta();
        self.seen = tokens;
    }

    pub fn step(&mut self, figures: &StepFigures) -> Result<()> {
        let StepFigures { step, loss, grad_norm, lr, tokens } = *figures;
        let seconds = (self.clock.elapsed() - self.idle).as_secs_f64();
        let rate = (tokens - self.seen) as f64 / seconds;
        let memory = self.watch.memory_mib();
        self.watch.line(&json!({"stage": self.label, "step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm,
            "tokens": tokens, "tokens_per_second": rate, "memory_mib": memory}))?;
        self.watch.scalars(
            self.before + step,
            &[
                ("train/loss", loss),
                ("train/lr", lr),
                ("train/grad_norm", grad_norm),
                ("train/tokens_per_second", rate),
            ],
        )?;
        self.bar.set_message(format!("loss {loss:.4}, {rate:.0} tokens/s, {memory} MiB,"));
        self.bar.set_position(step as u64);
        if step % self.log_every == 0 || step == self.total {
            let left = Duration::from_secs_f64(
                (self.total - step) as f64 * seconds / (tokens - self.seen) as f64 * self.pace(tokens, step),
            );
            self.say(&format!(
                "{} step {step}/{} loss {loss:.4} norm {grad_norm:.3} lr {lr:.2e} {rate:.0} tokens/s {memory} MiB, {} left",
                self.label, self.total, indicatif::HumanDuration(left)
            ));
        }
        Ok(())
    }

    /// Tokens of a step, on average.
    fn pace(&self, tokens: usize, step: usize) -> f64 {
        tokens as f64 / step as f64
    }

    /// Held-out losses after `step`, by task.
    pub fn held_out(&mut self, step: usize, losses: &[(String, f64)], took: Duration) -> Result<()> {
        self.idle += took;
        let map: serde_json::Map<String, Value> = losses.iter().map(|(t, l)| (t.clone(), json!(l))).collect();
        self.watch.line(&json!({"stage": self.label, "step": step, "eval_loss": map}))?;
        for (task, loss) in losses {
            self.watch.scalars(self.before + step, &[(&format!("eval/{task}/loss"), *loss)])?;
        }
        let list: Vec<String> = losses.iter().map(|(task, loss)| format!("{task} {loss:.4}")).collect();
        self.say(&format!("{} step {step}/{} held-out loss: {}", self.label, self.total, list.join(", ")));
        Ok(())
    }

    /// Makes what was written visible to readers, and takes the time since `since` off the clock.
    pub fn saved(&mut self, since: Instant) {
        self.idle += since.elapsed();
    }

    /// The file of the figures, for a state.
    pub fn metrics(&self) -> &Path {
        self.watch.metrics()
    }

    fn say(&self, line: &str) {
        self.bar.suspend(|| info!("{line}"));
    }
}

impl Drop for StageWatch<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Resident memory of this process in MiB; 0 where the system does not say.
fn resident_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}
