//! Training arguments that cpift-probe and cpift-train share. The names that transformers' TrainingArguments and TRL have for them are
//! taken too (hidden aliases).

use std::path::PathBuf;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::{Dtype, Usage};
use serde_json::{Map, Value, json};
use tch::{Device, Kind};

use crate::device::DeviceChoice;
use crate::optim::AdamWConfig;
use crate::session::{Precision, set_strict_config};
use crate::weights::kind_of;
use cpift_data::Overlong;

/// How to fine-tune, as typed.
#[derive(clap::Args, Debug, Clone)]
pub struct TrainingArgs {
    /// Optimizer steps in all (over all stages); not with --tokens [default: 100]
    #[arg(long, aliases = ["max_steps", "max-steps"], value_name = "N", conflicts_with = "tokens")]
    pub steps: Option<usize>,
    /// Train until this many tokens (padding not counted) have been seen, over all stages
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
    /// Examples in a batch
    #[arg(long, aliases = ["per_device_train_batch_size", "per-device-train-batch-size"], value_name = "N", default_value_t = 8)]
    pub batch_size: usize,
    /// Batches whose gradients make one step
    #[arg(long, aliases = ["gradient_accumulation_steps", "gradient-accumulation-steps"], value_name = "N", default_value_t = 1)]
    pub grad_accum: usize,
    /// Peak learning rate; given twice, the last one counts
    #[arg(long, aliases = ["learning_rate", "learning-rate"], value_name = "F", overrides_with = "lr", allow_negative_numbers = true, default_value_t = 2e-5)]
    pub lr: f64,
    /// Share of the steps that warm up, rounded up (the first has rate 0); a cosine to zero follows
    #[arg(long, aliases = ["warmup_ratio"], value_name = "F", allow_negative_numbers = true, default_value_t = 0.03)]
    pub warmup_ratio: f64,
    /// Decoupled weight decay (norms and biases do not decay)
    #[arg(long, aliases = ["weight_decay"], value_name = "F", allow_negative_numbers = true, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// AdamW's decay rate of the first moment
    #[arg(long, aliases = ["adam_beta1"], value_name = "F", allow_negative_numbers = true, default_value_t = 0.9)]
    pub adam_beta1: f64,
    /// AdamW's decay rate of the second moment
    #[arg(long, aliases = ["adam_beta2"], value_name = "F", allow_negative_numbers = true, default_value_t = 0.999)]
    pub adam_beta2: f64,
    /// AdamW's epsilon
    #[arg(long, aliases = ["adam_epsilon"], value_name = "F", allow_negative_numbers = true, default_value_t = 1e-8)]
    pub adam_epsilon: f64,
    /// Clip the global gradient norm to this; 0 turns clipping off
    #[arg(long, aliases = ["max_grad_norm"], value_name = "F", allow_negative_numbers = true, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Seed of the shuffles, the samples and the stochastic rounding
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Do not train the embedding table (nor a tied output head)
    #[arg(long)]
    pub freeze_embeddings: bool,
    /// Fill a batch with whole examples up to --batch-size times the tokens of the longest one (or --max-length); they stay closed to
    /// one another
    #[arg(long)]
    pub packing: bool,
    /// Keep only the input of each block and compute its activations again in the backward pass: less memory, about a third more
    /// work; on the CPU the same bits
    #[arg(long, aliases = ["gradient_checkpointing"])]
    pub gradient_checkpointing: bool,
    /// Update each block as soon as its gradients are there, so that gradients of the whole model never exist (on the CPU the same bits); needs
    /// --grad-accum 1 and --max-grad-norm 0, which both need all gradients kept
    #[arg(long)]
    pub optimizer_in_backward: bool,
    /// Element type of the weights in training: f32, or bf16 with stochastic rounding
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub master: Dtype,
    /// Element type of AdamW's moments: f32, or bf16 with stochastic rounding
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub optim_state: Dtype,
    /// Tokens whose logits exist at a time in the loss
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub loss_chunk: usize,
    /// Save a state to resume from every N steps, in OUT.checkpoints; a signal saves one in any case
    #[arg(long, aliases = ["save_steps", "save-steps"], value_name = "N")]
    pub save_every: Option<usize>,
    /// Newest states to keep
    #[arg(long, aliases = ["save_total_limit", "save-total-limit"], value_name = "N", default_value_t = 1)]
    pub keep: usize,
    /// Go on from the newest state in OUT.checkpoints; start afresh where there is none. --force passes over states that are damaged, of
    /// another version or of another run
    #[arg(long)]
    pub resume: bool,
    /// Loss on held-out rows (each task's `eval` file) every N steps, and at the end
    #[arg(long, aliases = ["eval_steps", "eval-steps"], value_name = "N")]
    pub eval_every: Option<usize>,
    /// Most held-out rows of each task
    #[arg(long, value_name = "N", requires = "eval_every", default_value_t = 64)]
    pub eval_rows: usize,
    /// Write TensorBoard event files into this folder as well
    #[arg(long, aliases = ["logging_dir", "logging-dir"], value_name = "DIR")]
    pub tensorboard: Option<PathBuf>,
    /// Longest example in tokens, over the tasks' own max_length
    #[arg(long, aliases = ["max_seq_length", "max-seq-length", "max_seq_len", "max-seq-len"], value_name = "N")]
    pub max_length: Option<usize>,
    /// Refuse an example longer than the context instead of cutting it
    #[arg(long)]
    pub strict: bool,
    /// Refuse fields of config.json that this program does not know, instead of a warning
    #[arg(long)]
    pub strict_config: bool,
    /// Element type of the saved weights: f32, bf16, f16. Masks want f32: bf16 loses small updates
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub save_dtype: Dtype,
    /// Element type of the forward and backward pass: f32 or bf16; weights and moments keep those of --master and --optim-state
    /// [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_name = "TYPE")]
    pub compute_dtype: Option<Dtype>,
    /// cpu, cuda, cuda:N, or auto: CUDA where there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Log a line every N steps
    #[arg(long, aliases = ["logging_steps", "logging-steps"], value_name = "N", default_value_t = 10)]
    pub log_every: usize,
}

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// So many optimizer steps.
    Steps(usize),
    /// As many steps as it takes to see so many tokens.
    Tokens(usize),
}

impl TrainingArgs {
    /// Checks ranges, and makes --strict-config known to what reads a config.json.
    ///
    /// # Errors
    /// [`Usage`] naming the argument.
    pub fn check(&self) -> Result<()> {
        set_strict_config(self.strict_config);
        // NaN, which no comparison holds for, in the place of the infinite.
        let finite = |x: f64| if x.is_finite() { x } else { f64::NAN };
        let rules = [
            (self.steps != Some(0) && self.tokens != Some(0), "--steps and --tokens must be at least 1"),
            ((1..=1 << 16).contains(&self.batch_size), "--batch-size must be 1 to 65536"),
            ((1..=1 << 16).contains(&self.grad_accum), "--grad-accum must be 1 to 65536"),
            (finite(self.lr) > 0.0, "--lr must be positive"),
            ((0.0..=1.0).contains(&self.warmup_ratio), "--warmup-ratio must be 0 to 1"),
            (finite(self.weight_decay) >= 0.0, "--weight-decay must not be negative"),
            ((0.0..1.0).contains(&self.adam_beta1), "--adam-beta1 must be 0 or more and under 1"),
            ((0.0..1.0).contains(&self.adam_beta2), "--adam-beta2 must be 0 or more and under 1"),
            (finite(self.adam_epsilon) > 0.0, "--adam-epsilon must be positive"),
            (finite(self.max_grad_norm) >= 0.0, "--max-grad-norm must not be negative"),
            (self.max_length.is_none_or(|n| n >= 2), "--max-length must be at least 2"),
            (matches!(self.master, Dtype::F32 | Dtype::BF16), "--master must be f32 or bf16"),
            (matches!(self.optim_state, Dtype::F32 | Dtype::BF16), "--optim-state must be f32 or bf16"),
            (self.loss_chunk > 0, "--loss-chunk must be at least 1"),
            (self.save_every != Some(0), "--save-every must be at least 1"),
            (self.keep > 0, "--keep must be at least 1"),
            (self.eval_every != Some(0) && self.eval_rows > 0, "--eval-every and --eval-rows must be at least 1"),
            (
                !self.optimizer_in_backward || self.grad_accum == 1,
                "--optimizer-in-backward needs --grad-accum 1: a sum over batches needs all gradients kept",
            ),
            (
                !self.optimizer_in_backward || self.max_grad_norm == 0.0,
                "--optimizer-in-backward needs --max-grad-norm 0: the norm is known only when all gradients are",
            ),
            (self.log_every > 0, "--log-every must be at least 1"),
            (
                matches!(self.compute_dtype, None | Some(Dtype::F32 | Dtype::BF16)),
                "--compute-dtype must be f32 or bf16",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err(Usage((*message).to_owned()).into()),
            None => Ok(()),
        }
    }

    /// How long to train.
    pub fn budget(&self) -> Budget {
        match self.tokens {
            Some(tokens) => Budget::Tokens(tokens),
            None => Budget::Steps(self.steps.unwrap_or(100)),
        }
    }

    /// The optimizer's numbers.
    pub fn optimizer(&self) -> AdamWConfig {
        AdamWConfig {
            betas: (self.adam_beta1, self.adam_beta2),
            eps: self.adam_epsilon,
            weight_decay: self.weight_decay,
            state: kind_of(self.optim_state),
        }
    }

    /// The dtypes of training on `device`.
    pub fn precision(&self, device: Device) -> Precision {
        let compute = match self.compute_dtype {
            Some(dtype) => kind_of(dtype),
            None if device.is_cuda() => Kind::BFloat16,
            None => Kind::Float,
        };
        Precision { master: kind_of(self.master), compute }
    }

    /// Every argument that the weights depend on, as it comes out on `device`, for a state to resume from.
    pub fn describe(&self, device: Device) -> Map<String, Value> {
        let compute = if self.precision(device).compute == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 };
        let Value::Object(map) = json!({"steps": self.steps, "tokens": self.tokens, "batch_size": self.batch_size,
            "grad_accum": self.grad_accum, "lr": self.lr, "warmup_ratio": self.warmup_ratio,
            "weight_decay": self.weight_decay, "adam_beta1": self.adam_beta1, "adam_beta2": self.adam_beta2,
            "adam_epsilon": self.adam_epsilon, "max_grad_norm": self.max_grad_norm, "seed": self.seed,
            "freeze_embeddings": self.freeze_embeddings, "packing": self.packing, "master": self.master.name(),
            "optim_state": self.optim_state.name(), "loss_chunk": self.loss_chunk, "max_length": self.max_length,
            "compute_dtype": compute.name(), "device": if device.is_cuda() { "cuda" } else { "cpu" }})
        else {
            unreachable!("an object was written")
        };
        map
    }

    /// What to do with examples longer than the context.
    pub fn overlong(&self) -> Overlong {
        if self.strict { Overlong::Refuse } else { Overlong::Truncate }
    }
}

impl Budget {
    /// The budget of stage `index` of `count`: equal parts, the remainder to the first ones.
    ///
    /// # Errors
    /// [`Usage`] when a part would be empty.
    pub fn part(self, index: usize, count: usize) -> Result<Self> {
        let share = |total: usize| {
            let part = total / count + usize::from(index < total % count);
            if part == 0 {
                Err(usage(format!("a budget of {total} cannot be shared by {count} stages")))
            } else {
                Ok(part)
            }
        };
        match self {
            Self::Steps(n) => Ok(Self::Steps(share(n)?)),
            Self::Tokens(n) => Ok(Self::Tokens(share(n)?)),
        }
    }
}
