//! The training job whose memory is estimated, and the sizes of its model.

use std::path::Path;

use anyhow::Result;
use cpift_core::Checkpoint;
use cpift_core::format::checkpoint::read_config;
use cpift_core::format::tasks::Tasks;
use tch::{Device, Kind};

use crate::args::{Offload, Optimizer, TrainingArgs};
use crate::blockwise::{BLOCK, SMALLEST};
use crate::model::{EMBEDDING, ModelConfig};
use crate::session::strict_config;
use crate::train::LoraConfig;

/// Bytes of f32.
pub(super) const F32: u64 = 4;
/// Resident memory of the program with libtorch's CPU library.
pub(super) const PROGRAM: u64 = 160 << 20;

/// A training job whose memory is estimated.
#[derive(Debug, Clone)]
pub struct Job {
    /// Model configuration.
    pub config: ModelConfig,
    /// Training arguments.
    pub args: TrainingArgs,
    /// Tokens of a batch, which is one row; all may be targets.
    pub tokens: u64,
    /// Tokens of the longest document.
    pub longest: u64,
    /// Number of frozen elements.
    pub frozen: u64,
    /// True if the device is CUDA.
    pub cuda: bool,
    /// Ranks that share the weights, the moments and each batch.
    pub world: u64,
    /// Adapters that are trained instead of the weights.
    pub lora: Option<LoraConfig>,
}

/// Reads the model configuration of `path`, a checkpoint directory or a config.json.
///
/// # Errors
/// [`cpift_core::BadInput`] for a config.json that cannot be used.
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
    /// A job with batches of `--batch-size` examples of `longest` tokens, capped at the model's
    /// context.
    pub fn new(config: ModelConfig, args: &TrainingArgs, longest: usize, cuda: bool) -> Self {
        let longest = longest.min(config.max_position_embeddings as usize) as u64;
        let tokens = longest * args.batch_size as u64;
        Self { config, args: args.clone(), tokens, longest, frozen: 0, cuda, world: 1, lora: None }
    }

    /// The same job with adapters instead of the weights trained.
    #[must_use]
    pub fn with_adapters(self, lora: Option<LoraConfig>) -> Self {
        Self { lora, ..self }
    }

    /// Bytes per element of the weights.
    pub(super) fn weight_bytes(&self) -> u64 {
        if self.lora.is_some() { self.compute_bytes() } else { self.args.master_dtype.size() as u64 }
    }

    /// Returns true if the module `name` of a block, or its adapter, has gradients.
    pub(super) fn weight_has_gradient(&self, name: &str) -> bool {
        self.lora.as_ref().is_none_or(|lora| lora.adapts(&format!("model.layers.0.{name}.weight")))
    }

    /// Elements of the adapters of the layer with most, and of all; 0 without adapters.
    pub(super) fn adapted(&self) -> (u64, u64) {
        let of = |layer| self.adapters(layer).sum();
        let all: Vec<u64> = (0..self.config.num_hidden_layers).map(of).collect();
        (all.iter().copied().max().unwrap_or(0), all.iter().sum())
    }

    /// Elements of each adapter of a block.
    pub(super) fn adapters(&self, layer: i64) -> impl Iterator<Item = u64> {
        let prefix = format!("model.layers.{layer}.");
        let of = move |lora: &LoraConfig| {
            let adapted = self.config.adaptable().filter(|(name, _)| name.starts_with(&prefix) && lora.adapts(name));
            adapted.map(|(_, shape)| (lora.rank * shape.iter().sum::<i64>()) as u64).collect::<Vec<u64>>()
        };
        self.lora.as_ref().map(of).unwrap_or_default().into_iter()
    }

    /// The same job on `world` ranks, of which each has its share of the batch.
    #[must_use]
    pub fn shared_by(mut self, world: u64) -> Self {
        self.tokens = self.tokens.div_ceil(world).max(self.longest.min(self.tokens));
        Self { world, ..self }
    }

    /// Returns true if the weights of a unit are lent to the model: they are shared, or lie in host
    /// memory.
    pub(super) fn lends(&self) -> bool {
        self.world > 1 || (self.cuda && self.args.offload == Offload::All)
    }

    /// Bytes per element of the matrices that are lent to a block.
    pub(super) fn wire_bytes(&self) -> u64 {
        self.compute_bytes().min(self.args.master_dtype.size() as u64)
    }

    /// The job of training the checkpoint `model` on the tasks of `tasks`, before anything is
    /// loaded.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for files that cannot be used.
    pub fn of_run(model: &Path, tasks: &Path, args: &TrainingArgs) -> Result<Self> {
        let longest = longest_of(Some(&Tasks::read(tasks)?), args);
        let cuda = args.device.open(None)?.is_cuda();
        Ok(Self::new(read_model(model)?, args, longest, cuda))
    }

    /// Bytes per element of the hidden states.
    pub(crate) fn compute_bytes(&self) -> u64 {
        let device = if self.cuda { Device::Cuda(0) } else { Device::Cpu };
        if self.args.precision(device).compute == Kind::Float { F32 } else { 2 }
    }

    /// True if attention runs over all documents in one kernel.
    pub(super) fn flash_varlen(&self) -> bool {
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

    /// Sizes of the trained tensors.
    fn trained_tensors(&self) -> Vec<u64> {
        let count = |shape: &[i64]| shape.iter().product::<i64>() as u64;
        match &self.lora {
            Some(lora) => self
                .config
                .adaptable()
                .filter(|(name, _)| lora.adapts(name))
                .flat_map(|(_, shape)| [shape[0], shape[1]].map(|width| (lora.rank * width) as u64))
                .collect(),
            None => self
                .config
                .parameter_shapes()
                .into_iter()
                .filter(|(name, _)| !(self.args.freeze_embeddings && name == EMBEDDING))
                .map(|(_, shape)| count(&shape))
                .collect(),
        }
    }

    /// Bytes of both moments.
    pub(super) fn moment_bytes(&self) -> u64 {
        let (block, smallest) = (BLOCK as u64, SMALLEST as u64);
        let of = |n: u64| match self.args.optim {
            Optimizer::Adamw => n * self.args.optim_state_dtype.size() as u64,
            Optimizer::Adamw8bit if n < smallest => n * F32,
            Optimizer::Adamw8bit => n + F32 * n.div_ceil(block),
        };
        self.trained_tensors().into_iter().map(|n| 2 * of(n)).sum()
    }

    /// Number of trained parameters.
    pub(super) fn trained(&self, s: &Sizes) -> u64 {
        if self.lora.is_some() {
            return self.adapted().1;
        }
        s.total() - if self.args.freeze_embeddings { s.embedding } else { 0 }
    }
}

/// Number of parameters of each unit of a model, from its configuration alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// The embedding table, [v, e].
    pub embedding: u64,
    /// The largest decoder block.
    pub block: u64,
    /// All decoder blocks.
    pub all_blocks: u64,
    /// Final norm.
    pub norm: u64,
    /// The output matrix, [v, e]; 0 if tied to the embedding table.
    pub head: u64,
    /// The largest tensor.
    pub largest: u64,
    /// Parameters that compute a token: without the experts that do not.
    pub active: u64,
}

impl Sizes {
    /// Sizes of the model `c`.
    pub fn of(c: &ModelConfig) -> Self {
        let shapes: Vec<(String, u64)> = c
            .parameter_shapes()
            .into_iter()
            .map(|(name, shape)| (name, shape.iter().product::<i64>() as u64))
            .collect();
        let sum = |prefix: &str| shapes.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, n)| n).sum();
        let blocks: Vec<u64> =
            c.blocks().map(|shapes| shapes.iter().map(|(_, n)| n.iter().product::<i64>() as u64).sum()).collect();
        let mut sizes = Self {
            embedding: sum(EMBEDDING),
            block: blocks.iter().copied().max().unwrap_or(0),
            all_blocks: blocks.iter().sum(),
            norm: sum("model.norm."),
            head: sum("lm_head."),
            largest: shapes.iter().map(|(_, n)| *n).max().unwrap_or(0),
            active: 0,
        };
        let idle = c.experts.as_ref().map_or(0, |own| own.idle(c.hidden_size) as u64);
        sizes.active = sizes.total() - idle;
        sizes
    }

    /// D: all parameters, a tied matrix counted once.
    pub fn total(&self) -> u64 {
        self.embedding + self.all_blocks + self.norm + self.head
    }
}

/// e, d, h, k and v: widths of residual stream and head; query heads, key heads, vocabulary size.
pub(super) fn dimensions(c: &ModelConfig) -> [u64; 5] {
    [c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads, c.vocab_size].map(|n| n as u64)
}

/// Longest example in tokens: `--max-length`, else the tasks' largest `max_length`, else its
/// default.
pub fn longest_of(tasks: Option<&Tasks>, args: &TrainingArgs) -> usize {
    let largest = tasks.and_then(|t| t.list.iter().map(|task| task.max_length).max());
    args.max_length.or(largest).unwrap_or(DEFAULT_LENGTH)
}

/// The default of `max_length` in tasks.toml.
const DEFAULT_LENGTH: usize = 1024;

/// Bytes in GiB.
pub(super) fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
