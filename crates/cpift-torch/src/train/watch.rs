//! Metrics of a run: metrics.jsonl, TensorBoard, a progress bar on a terminal, lines in a log.
//!
//! TensorBoard's event files hold scalars only. The format is TensorFlow's TFRecord: length,
//! checksum of the length, an `Event` message of event.proto, checksum of the message; the
//! checksums are CRC-32C, rotated and offset ("masked").

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use cpift_core::run::progress;
use indicatif::ProgressBar;
use log::info;
use serde_json::{Value, json};
use tch::Device;

use crate::ffi;

/// File of a run's metrics, one JSON object per line.
pub(crate) const METRICS: &str = "metrics.jsonl";

/// Writes the metrics of a run to all outputs.
pub(crate) struct Watch {
    /// Path of metrics.jsonl, which is created with its first line; none on a rank that writes
    /// nothing.
    path: Option<PathBuf>,
    metrics: Option<File>,
    board: Option<TensorBoard>,
    device: Device,
}

/// Metrics of a step.
pub(crate) struct StepFigures {
    /// Step within the stage, from 1.
    pub step: usize,
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    /// Tokens of the stage so far.
    pub tokens: usize,
    /// True for the last of the steps read at once, the only one whose time is known.
    pub timed: bool,
}

impl Watch {
    /// Starts the metrics at `path`, as a copy of `earlier` if given, and TensorBoard's files in
    /// `board`; the run starts at step `first`.
    pub fn start(
        path: PathBuf,
        earlier: Option<&Path>,
        board: Option<&Path>,
        first: usize,
        device: Device,
    ) -> Result<Self> {
        // A file there may belong to another run, or be a link to a file elsewhere.
        let _ = fs::remove_file(&path);
        if let Some(earlier) = earlier {
            fs::copy(earlier, &path).with_context(|| format!("copying {}", earlier.display()))?;
        }
        let board = board.map(|folder| TensorBoard::create(folder, first as i64)).transpose()?;
        Ok(Self { path: Some(path), metrics: None, board, device })
    }

    /// Metrics that are not written.
    pub fn silent(device: Device) -> Self {
        Self { path: None, metrics: None, board: None, device }
    }

    /// Starts a stage whose first step is step `before` + 1 of the run.
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
        let Some(path) = &self.path else { return Ok(()) };
        let file = match &mut self.metrics {
            Some(file) => file,
            none => {
                let made = OpenOptions::new().create(true).append(true).open(path);
                none.insert(made.with_context(|| format!("creating {}", path.display()))?)
            }
        };
        writeln!(file, "{line}").with_context(|| format!("writing {}", path.display()))
    }

    fn scalars(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        match &mut self.board {
            Some(board) => values.iter().try_for_each(|(tag, value)| board.scalar(tag, step as i64, *value)),
            None => Ok(()),
        }
    }

    /// Memory in MiB: peak of the tensors on a CUDA device, else current resident memory of the
    /// process.
    fn memory_mib(&self) -> u64 {
        match self.device {
            Device::Cuda(index) => ffi::cuda_memory(index).map_or(0, |(_, peak)| peak >> 20),
            _ => resident_mib(),
        }
    }
}

/// Metrics of a stage.
pub(crate) struct StageWatch<'a> {
    watch: &'a mut Watch,
    label: &'a str,
    total: usize,
    before: usize,
    log_every: usize,
    bar: ProgressBar,
    clock: Instant,
    /// Time not spent on training steps.
    idle: Duration,
    /// Tokens of the stage when the clock started.
    seen: usize,
}

impl StageWatch<'_> {
    /// Starts bar and clock at a later step.
    pub fn skip_to(&mut self, step: usize, tokens: usize) {
        self.bar.set_position(step as u64);
        self.bar.reset_eta();
        self.seen = tokens;
    }

    pub fn step(&mut self, figures: &StepFigures) -> Result<()> {
        let StepFigures { step, loss, grad_norm, lr, tokens, timed } = *figures;
        let mut line = json!({"stage": self.label, "step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm,
            "tokens": tokens});
        let mut scalars = vec![("train/loss", loss), ("train/lr", lr), ("train/grad_norm", grad_norm)];
        if !timed {
            self.watch.line(&line)?;
            return self.watch.scalars(self.before + step, &scalars);
        }
        let seconds = (self.clock.elapsed() - self.idle).as_secs_f64();
        let rate = (tokens - self.seen) as f64 / seconds;
        let memory = self.watch.memory_mib();
        (line["tokens_per_second"], line["memory_mib"]) = (rate.into(), memory.into());
        scalars.push(("train/tokens_per_second", rate));
        self.watch.line(&line)?;
        self.watch.scalars(self.before + step, &scalars)?;
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

    /// Mean number of tokens per step.
    fn pace(&self, tokens: usize, step: usize) -> f64 {
        tokens as f64 / step as f64
    }

    /// Records the held-out loss of each task after `step`.
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

    /// Records an update of the dynamic mask before step `step`, counted from 1.
    pub fn mask(&mut self, step: usize, protected: u64, jaccard: f64, took: Duration) -> Result<()> {
        self.idle += took;
        self.watch
            .line(&json!({"stage": self.label, "step": step, "protected": protected, "mask_jaccard": jaccard}))?;
        self.watch.scalars(self.before + step, &[("train/mask_jaccard", jaccard)])?;
        self.say(&format!(
            "{} step {step}/{}: {protected} elements protected, Jaccard with the stage's first mask {jaccard:.3}",
            self.label, self.total
        ));
        Ok(())
    }

    /// Takes the time since `since`, in which a state was saved, off the clock.
    pub fn saved(&mut self, since: Instant) {
        self.idle += since.elapsed();
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

/// Resident memory of this process in MiB; 0 if the system does not report it.
fn resident_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}

/// An open event file.
struct TensorBoard {
    file: File,
    path: PathBuf,
}

impl TensorBoard {
    /// Creates a file in `folder`, and the directory if it is missing. Of earlier files there,
    /// TensorBoard shows only steps before `first`: a resumed run writes the steps after its last
    /// saved state again.
    pub fn create(folder: &Path, first: i64) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let seconds = since_epoch() as u64;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let path = folder.join(format!("events.out.tfevents.{seconds:010}.{}.{}", host.trim(), std::process::id()));
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let mut board = Self { file: file.with_context(|| format!("creating {}", path.display()))?, path };
        board.event(0, &field(FILE_VERSION, b"brain.Event:2"))?;
        // SessionLog.status = START.
        board.event(first + 1, &field(SESSION_LOG, &[0x08, 1]))?;
        Ok(board)
    }

    /// Writes a value of the curve `tag`.
    pub fn scalar(&mut self, tag: &str, step: i64, value: f64) -> Result<()> {
        let mut of_tag = field(1, tag.as_bytes());
        of_tag.push(2 << 3 | FIXED32);
        of_tag.extend((value as f32).to_le_bytes());
        self.event(step, &field(SUMMARY, &field(1, &of_tag)))
    }

    fn event(&mut self, step: i64, payload: &[u8]) -> Result<()> {
        let mut event = vec![1 << 3 | FIXED64];
        event.extend(since_epoch().to_le_bytes());
        event.push(2 << 3 | VARINT);
        varint(&mut event, step as u64);
        event.extend(payload);
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked(&event).to_le_bytes());
        self.file.write_all(&record).with_context(|| format!("writing {}", self.path.display()))
    }
}

// Fields of Event.
const FILE_VERSION: u8 = 3;
const SUMMARY: u8 = 5;
const SESSION_LOG: u8 = 7;

// Wire types of protocol buffers.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | BYTES];
    varint(&mut out, bytes.len() as u64);
    out.extend(bytes);
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_late_have_no_rate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut watch = Watch::start(path.clone(), None, None, 0, Device::Cpu).unwrap();
        assert!(!path.exists(), "no line, no file");
        let mut stage = watch.stage("s", 4, 0, 2);
        for step in 1..=4 {
            let figures =
                StepFigures { step, loss: 1.0, grad_norm: 1.0, lr: 1e-3, tokens: 10 * step, timed: step % 2 == 0 };
            stage.step(&figures).unwrap();
        }
        let text = fs::read_to_string(path).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let rated: Vec<bool> =
            lines.iter().map(|l| l["tokens_per_second"].is_f64() && l["memory_mib"].is_u64()).collect();
        assert_eq!(rated, [false, true, false, true]);
        assert!(lines.iter().all(|l| l["loss"] == 1.0));
    }
}
