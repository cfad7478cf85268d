//! The memory that training takes, computed before anything is loaded: from config.json and the arguments.
//!
//! Memory rises and falls within a step, so each part is computed at five moments and the total is that of the highest. It counts the
//! tensors of training (`train/`, `optim/`, `freeze`), not what an allocator loses by rounding and fragmentation.

mod activations;
mod advice;
mod device;
mod disk;
mod size;

use std::path::Path;

use anyhow::Result;
use cpift_core::format::checkpoint::read_config;
use cpift_core::format::tasks::Tasks;
use cpift_core::{Checkpoint, Dtype};
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::args::TrainingArgs;
use crate::model::ModelConfig;
use crate::session::strict_config;
use activations::{Block, F32, Head, windows};

pub use advice::{Advice, advice, after_failure, verdict};
pub use device::{available, check_address_space};
pub use disk::Disk;
pub use size::Sizes;

/// A training job whose memory is asked for.
#[derive(Debug, Clone)]
pub struct Job {
    /// The model.
    pub config: ModelConfig,
    /// How it is trained.
    pub args: TrainingArgs,
    /// Tokens of one batch, which is one row; all may be targets.
    pub tokens: u64,
    /// Tokens of its longest document.
    pub longest: u64,
    /// Frozen elements.
    pub frozen: u64,
    /// Whether the device is CUDA.
    pub cuda: bool,
}

/// What the memory is taken by, in the order of [`Moment::bytes`].
pub const PARTS: [&str; 9] =
    ["weights", "moments", "gradients", "activations", "loss", "casts", "update", "frozen", "context"];

/// A moment of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// Which.
    pub name: &'static str,
    /// Bytes of each of [`PARTS`].
    pub bytes: [u64; PARTS.len()],
}

impl Moment {
    /// Bytes of all parts.
    pub fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

/// What CUDA itself takes in a process (context, kernels, cuBLAS workspaces), as nvidia-smi shows it: 0.5 to 1 GiB, by card.
const CUDA_CONTEXT: u64 = 1 << 30;
/// The program with libtorch's CPU library, as resident memory.
const PROGRAM: u64 = 160 << 20;
/// Elements that an update of mixed dtypes widens at a time (`optim`).
const WIDENED: u64 = 1 << 24;

/// Reads the sizes of `path`, a checkpoint folder or a config.json.
///
/// # Errors
/// [`cpift_core::BadInput`] for a config that cannot be used.
pub fn read_model(path: &Path) -> Result<ModelConfig> {
    let config = if path.is_file() { cpift_core::format::json::read(path)? } else { read_config(path)? };
    let mut numbers = ModelConfig::from_json(path, &config)?;
    numbers.check_unknown_fields(path, strict_config())?;
    let has_weights = ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| path.join(name).exists());
    if numbers.tie_word_embeddings && has_weights {
        numbers.untie_as(&Checkpoint::open(path)?);
    }
    Ok(numbers)
}

impl Job {
    /// The job of `args` on `device`: batches of `--batch-size` examples, each as long as `longest` and the model's context allow.
    pub fn new(config: ModelConfig, args: &TrainingArgs, longest: usize, cuda: bool) -> Self {
        let longest = longest.min(config.max_position_embeddings as usize) as u64;
        let tokens = longest * args.batch_size as u64;
        Self { config, args: args.clone(), tokens, longest, frozen: 0, cuda }
    }

    /// The job of training the checkpoint `model` on the tasks of `tasks`, as far as it is known before anything is loaded.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for files that cannot be used.
    pub fn of_run(model: &Path, tasks: &Path, args: &TrainingArgs) -> Result<Self> {
        let longest = longest_of(Some(&Tasks::read(tasks)?), args);
        let cuda = args.device.open(None)?.is_cuda();
        Ok(Self::new(read_model(model)?, args, longest, cuda))
    }

    /// Bytes of an element of the hidden states.
    pub(crate) fn compute_bytes(&self) -> u64 {
        let device = if self.cuda { Device::Cuda(0) } else { Device::Cpu };
        if self.args.precision(device).compute == Kind::Float { F32 } else { 2 }
    }

    /// Whether attention runs over all documents in one kernel.
    fn flash_varlen(&self) -> bool {
        self.cuda && self.compute_bytes() == 2 && self.config.attention_softcap.is_none()
    }

    /// The same job with batches of `size` examples.
    pub(crate) fn with_batch(&self, size: usize) -> Self {
        let mut job = self.clone();
        job.tokens = (self.tokens * size as u64).div_ceil(self.args.batch_size as u64);
        job.longest = self.longest.min(job.tokens);
        job.args.batch_size = size;
        job
    }

    /// What a step takes at each moment.
    pub fn moments(&self) -> Vec<Moment> {
        let s = Sizes::of(&self.config);
        let (block, head, g) = (Block::of(self), Head::of(self), self.gradients(&s));
        let (weight, layers) = (self.args.master.size() as u64, s.blocks);
        let recompute = self.args.gradient_checkpointing;
        // Weights are cast on the way through a block and kept with its activations.
        let cast = if weight == self.compute_bytes() { 0 } else { self.compute_bytes() };
        let kept = if recompute { 0 } else { layers };
        let inputs = (layers + 1) * block.input;
        let windowed = self.config.windows.iter().flatten().count() as u64;
        // Of the blocks whose activations are there: all, or the one that is computed again, which may be one with a window.
        let masks =
            |kept: u64| windows(self) + block.window * if kept == layers { windowed } else { kept.min(windowed) };
        let moment = |name, gradients, activations, loss, casts, update| Moment {
            name,
            bytes: [
                s.total() * weight,
                2 * self.trained(&s) * self.args.optim_state.size() as u64,
                gradients,
                activations,
                loss,
                casts,
                update,
                self.frozen * (8 + weight),
                if self.cuda { CUDA_CONTEXT } else { PROGRAM },
            ],
        };
        let update = self.update(&s);
        let mut all = vec![
            moment(
                "loss",
                g.at_loss,
                inputs + kept * block.saved + masks(kept),
                head.hidden + head.chunk,
                cast * (kept * s.block + s.embedding),
                0,
            ),
            moment(
                "first block",
                g.first_block,
                inputs + kept.max(1) * block.saved + block.transient + masks(kept.max(1)),
                0,
                cast * kept.max(1) * s.block,
                0,
            ),
            moment(
                "last block",
                g.last_block,
                block.input + block.saved + block.transient + masks(1),
                0,
                cast * s.block,
                0,
            ),
            moment("embedding", g.embedding, 2 * block.input + masks(0), 0, 0, 0),
        ];
        // In the backward pass the head's parameters are updated first, with all activations still there.
        all.push(if self.args.optimizer_in_backward {
            moment("update", g.update, inputs + kept * block.saved + masks(kept), 0, cast * kept * s.block, update)
        } else {
            moment("update", g.update, 0, 0, 0, update)
        });
        all
    }

    /// Parameters that are trained.
    fn trained(&self, s: &Sizes) -> u64 {
        s.total() - if self.args.freeze_embeddings { s.embedding } else { 0 }
    }

    /// Gradients have the weights' dtype, that of the output matrix is f32; so are sums over batches.
    fn gradients(&self, s: &Sizes) -> Gradients {
        let weight = self.args.master.size() as u64;
        let tied = self.config.tie_word_embeddings;
        let embedding = if self.args.freeze_embeddings { 0 } else { s.embedding };
        let matrix = F32 * if tied { embedding } else { s.head };
        // A tied matrix waits for the embedding's gradient.
        let waiting = if tied { matrix } else { 0 };
        let block = s.block * weight;
        // The table's own gradient; where tied also the sum of both, and the f32 copy it is made of.
        let copies = if tied && weight != F32 { 2 } else { u64::from(tied) };
        let last = embedding * weight + copies * F32 * embedding;
        let sums = F32 * self.trained(s);
        if self.args.grad_accum > 1 {
            let unit = sums + waiting + block;
            Gradients {
                at_loss: sums + matrix,
                first_block: unit,
                last_block: unit,
                embedding: sums + waiting + last,
                update: sums,
            }
        } else if self.args.optimizer_in_backward {
            let unit = waiting + block;
            Gradients {
                at_loss: matrix,
                first_block: unit,
                last_block: unit,
                embedding: waiting + last,
                update: matrix.max(unit),
            }
        } else {
            let head = matrix + s.norm * weight;
            let all = head + s.blocks * block;
            Gradients {
                at_loss: matrix,
                first_block: head + block,
                last_block: all,
                embedding: all + last,
                update: all + if tied { 0 } else { embedding * weight },
            }
        }
    }

    /// Temporaries of an update whose dtypes differ: f32 copies of a part of a tensor, and the bits of the stochastic rounding.
    fn update(&self, s: &Sizes) -> u64 {
        let (weights, moments) = (self.args.master == Dtype::BF16, self.args.optim_state == Dtype::BF16);
        if !weights && !moments {
            return 0;
        }
        let copies = 2 * u64::from(weights) + 2 * u64::from(moments);
        WIDENED.min(s.largest) * (copies * F32 + 3 * F32 + 2)
    }

    /// The moment that takes most.
    pub fn peak(&self) -> Moment {
        self.moments().into_iter().max_by_key(Moment::total).expect("there are five moments")
    }

    /// The memory by part and moment as lines of text, in GiB.
    pub fn table(&self) -> String {
        let (moments, peak) = (self.moments(), self.peak());
        let names = |part: &str| match part {
            "weights" => format!("weights, {}", self.args.master.name().to_lowercase()),
            "moments" => format!("moments, 2 x {}", self.args.optim_state.name().to_lowercase()),
            "casts" => "casts to bf16".to_owned(),
            "context" if self.cuda => "CUDA context".to_owned(),
            "context" => "program".to_owned(),
            other => other.to_owned(),
        };
        let dtype = if self.compute_bytes() == F32 { "f32" } else { "bf16" };
        let mut text = format!(
            "GiB, computed: {:?}, {} parameters; {} tokens a batch, computing in {dtype} on {}\n{:18}",
            self.config.family,
            grouped(Sizes::of(&self.config).total()),
            grouped(self.tokens),
            if self.cuda { "CUDA" } else { "the CPU" },
            ""
        );
        moments.iter().for_each(|m| text.push_str(&format!("{:>13}", m.name)));
        for (i, part) in PARTS.iter().enumerate().filter(|(i, _)| moments.iter().any(|m| m.bytes[*i] > 0)) {
            text.push_str(&format!("\n{:18}", names(part)));
            moments.iter().for_each(|m| text.push_str(&format!("{:13.2}", gib(m.bytes[i]))));
        }
        text.push_str(&format!("\n{:18}", "total"));
        for m in &moments {
            let mark = if m.name == peak.name { '*' } else { ' ' };
            text.push_str(&format!("{:>13}", format!("{mark}{:.2}", gib(m.total()))));
        }
        text + "\n"
    }

    /// The same in bytes.
    pub fn to_json(&self) -> Value {
        let moment = |m: &Moment| {
            let parts: serde_json::Map<String, Value> =
                PARTS.iter().zip(m.bytes).map(|(p, b)| ((*p).to_owned(), b.into())).collect();
            json!({"moment": m.name, "total": m.total(), "parts": parts})
        };
        json!({"parameters": Sizes::of(&self.config).total(), "tokens": self.tokens, "peak": self.peak().total(),
            "moments": self.moments().iter().map(moment).collect::<Vec<_>>()})
    }
}

/// For [`crate::oom::explain`]: the memory of training `model` on `tasks`, with `frozen` elements, and what would take less.
pub fn of_failed_run(model: &Path, tasks: &Path, args: &TrainingArgs, frozen: u64) -> String {
    let job = Job::of_run(model, tasks, args).map(|job| Job { frozen, ..job });
    let device = args.device.open(None);
    match job {
        Ok(job) => after_failure(&job, device.ok().and_then(available)),
        Err(error) => format!("  the memory it takes cannot be computed: {error:#}"),
    }
}

/// Refuses to train `model` on `tasks` where `ulimit -v` does not leave the memory that it takes. What cannot be computed is not refused.
///
/// # Errors
/// Those of [`check_address_space`].
pub fn check_run(model: &Path, tasks: &Path, args: &TrainingArgs) -> Result<()> {
    if device::left_by_ulimit().is_none() {
        return Ok(());
    }
    match Job::of_run(model, tasks, args) {
        Ok(job) if !job.cuda => check_address_space(job.peak().total() - PROGRAM),
        _ => Ok(()),
    }
}

/// The longest example in tokens: `--max-length`, else the tasks' largest `max_length`, else its default.
pub fn longest_of(tasks: Option<&Tasks>, args: &TrainingArgs) -> usize {
    let largest = tasks.and_then(|t| t.list.iter().map(|task| task.max_length).max());
    args.max_length.or(largest).unwrap_or(DEFAULT_LENGTH)
}

/// The default of `max_length` in tasks.toml.
const DEFAULT_LENGTH: usize = 1024;

struct Gradients {
    at_loss: u64,
    first_block: u64,
    last_block: u64,
    embedding: u64,
    update: u64,
}

/// Bytes in GiB.
pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// 1234567 as 1,234,567.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|g| std::str::from_utf8(g).unwrap_or("")).collect();
    groups.join(",")
}
