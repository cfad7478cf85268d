//! Fine-tuning arguments that cpift-probe and cpift-train share. The names of transformers'
//! TrainingArguments and of TRL are accepted as hidden aliases.

use std::path::PathBuf;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::{Dtype, Usage};
use cpift_data::Overlong;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use tch::{Device, Kind};

use crate::optim::{AdamWConfig, StateKind};
use crate::placement::{DeviceChoice, Reduce, Storage};
use crate::schedule::ScheduleArgs;
use crate::session::{Precision, set_strict_config};
use crate::weights::kind_of;

/// Headings of `--help`, in their order.
const BUDGET: &str = "Budget and schedule";
const OPTIMIZER: &str = "Optimizer";
const DATA: &str = "Data";
const MEMORY: &str = "Memory and speed";
const RESUME: &str = "Resume";
const LOGGING: &str = "Logging";
const RUN: &str = "Run";

/// The fine-tuning arguments.
///
/// Serialized, they are the arguments that the weights depend on, as [`TrainingArgs::describe`]
/// lists them: an argument that has no influence on the weights is skipped.
#[derive(clap::Args, Debug, Clone, Serialize)]
pub struct TrainingArgs {
    /// Passes of each stage over its own rows; may be a fraction. Excludes --steps and --tokens
    /// [default: 1, without --steps and --tokens]
    #[arg(long, aliases = ["num_train_epochs", "num-train-epochs"], value_name = "F", allow_negative_numbers = true)]
    #[arg(conflicts_with_all = ["steps", "tokens"], help_heading = BUDGET)]
    #[serde(skip)]
    pub epochs: Option<f64>,
    /// Optimizer steps in total, over all stages; excludes --tokens
    #[arg(long, aliases = ["max_steps", "max-steps"], value_name = "N", conflicts_with = "tokens")]
    #[arg(help_heading = BUDGET)]
    pub steps: Option<usize>,
    /// Train until this many tokens have been seen, over all stages; padding is not counted
    #[arg(long, value_name = "N", help_heading = BUDGET)]
    pub tokens: Option<usize>,
    /// Examples per batch, which all ranks share
    #[arg(long, aliases = ["per_device_train_batch_size", "per-device-train-batch-size"], value_name = "N")]
    #[arg(default_value_t = 8, help_heading = BUDGET)]
    pub batch_size: usize,
    /// Batches per optimizer step, whose gradients are accumulated
    #[arg(long, aliases = ["gradient_accumulation_steps", "gradient-accumulation-steps"], value_name = "N")]
    #[arg(default_value_t = 1, help_heading = BUDGET)]
    pub grad_accum: usize,
    /// Peak learning rate; if given twice, the last one counts
    #[arg(long, aliases = ["learning_rate", "learning-rate"], value_name = "F", overrides_with = "lr")]
    #[arg(allow_negative_numbers = true, default_value_t = 2e-5, help_heading = BUDGET)]
    pub lr: f64,
    /// The schedule of the learning rate.
    #[command(flatten)]
    #[serde(flatten)]
    pub schedule: ScheduleArgs,
    /// The optimizer: adamw; or adamw_8bit, AdamW with moments in 8 bits per element, in blocks of
    /// 256 with a factor each, as in bitsandbytes. Tensors of fewer than 4096 elements keep f32
    /// moments
    #[arg(long, value_name = "NAME", value_enum, default_value_t = Optimizer::Adamw, help_heading = OPTIMIZER)]
    #[serde(skip_serializing_if = "Optimizer::is_adamw")]
    pub optim: Optimizer,
    /// Decoupled weight decay, on all but norms and biases
    #[arg(long, aliases = ["weight_decay"], value_name = "F", allow_negative_numbers = true)]
    #[arg(default_value_t = 0.0, help_heading = OPTIMIZER)]
    pub weight_decay: f64,
    /// AdamW's β₁, the decay rate of the first moment
    #[arg(long, aliases = ["adam_beta1"], value_name = "F", allow_negative_numbers = true)]
    #[arg(default_value_t = 0.9, help_heading = OPTIMIZER)]
    pub adam_beta1: f64,
    /// AdamW's β₂, the decay rate of the second moment
    #[arg(long, aliases = ["adam_beta2"], value_name = "F", allow_negative_numbers = true)]
    #[arg(default_value_t = 0.999, help_heading = OPTIMIZER)]
    pub adam_beta2: f64,
    /// AdamW's ε
    #[arg(long, aliases = ["adam_epsilon"], value_name = "F", allow_negative_numbers = true)]
    #[arg(default_value_t = 1e-8, help_heading = OPTIMIZER)]
    pub adam_epsilon: f64,
    /// Clip gradients to this global L2 norm; 0 turns clipping off
    #[arg(long, aliases = ["max_grad_norm"], value_name = "F", allow_negative_numbers = true)]
    #[arg(default_value_t = 1.0, help_heading = OPTIMIZER)]
    pub max_grad_norm: f64,
    /// Factor of the load-balancing loss of the routers, in models with experts; 0 leaves that loss
    /// out. It is computed over the tokens of each micro-batch and averaged over those of a step
    /// [default: router_aux_loss_coef of config.json if it sets output_router_logits, else 0]
    #[arg(long, aliases = ["router_aux_loss_coef", "moe_aux_loss_coef", "moe-aux-loss-coef"], value_name = "F")]
    #[arg(allow_negative_numbers = true, help_heading = OPTIMIZER)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router_aux_loss_coef: Option<f64>,
    /// Do not train the embedding table, nor an output matrix tied to it
    #[arg(long, help_heading = OPTIMIZER)]
    pub freeze_embeddings: bool,
    /// Pack whole examples into each batch, up to --batch-size times --max-length tokens (or times
    /// the length of the longest example); they do not attend to one another
    #[arg(long, help_heading = DATA)]
    pub packing: bool,
    /// Keep only the input of each block and recompute its activations in the backward pass: less
    /// memory, about a third more work; bit-identical on the CPU
    #[arg(long, aliases = ["gradient_checkpointing"], help_heading = MEMORY)]
    #[serde(skip)]
    pub gradient_checkpointing: bool,
    /// Update each block as soon as its gradients are computed, so that the gradients of the whole
    /// model never exist; bit-identical on the CPU. Needs --grad-accum 1 and --max-grad-norm 0,
    /// because accumulation and clipping keep all gradients
    #[arg(long, help_heading = MEMORY)]
    #[serde(skip)]
    pub optimizer_in_backward: bool,
    /// Dtype of the master weights, which the optimizer updates: f32, or bf16 with stochastic
    /// rounding
    #[arg(long, alias = "master", value_name = "DTYPE", default_value = "f32", help_heading = MEMORY)]
    #[serde(rename = "master", serialize_with = "dtype_name")]
    pub master_dtype: Dtype,
    /// Dtype of AdamW's moments: f32, or bf16 with stochastic rounding
    #[arg(long, alias = "optim-state", value_name = "DTYPE", default_value = "f32", help_heading = MEMORY)]
    #[serde(rename = "optim_state", serialize_with = "dtype_name")]
    pub optim_state_dtype: Dtype,
    /// Keep the optimizer's moments (optimizer), or moments and weights (all), out of the device's
    /// memory: in pinned host memory if it is a CUDA device, in files of --offload-dir if it is the
    /// CPU. A unit's weights (embedding, block, head) are copied to the device for its forward and
    /// backward pass, and its moments for its update. The result is the same, bit for bit
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Offload::None, help_heading = MEMORY)]
    #[serde(skip)]
    pub offload: Offload,
    /// Directory of the files for --offload on the CPU; they vanish when the program ends
    #[arg(long, value_name = "DIR", help_heading = MEMORY)]
    #[serde(skip)]
    pub offload_dir: Option<PathBuf>,
    /// Sum of gradients over ranks: ordered gives the same bits as one process that accumulates;
    /// native uses the backend's reduce-scatter, which takes less memory with many ranks
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Reduce::Ordered, help_heading = MEMORY)]
    #[serde(skip_serializing_if = "Reduce::is_ordered")]
    pub reduce: Reduce,
    /// Over ranks, or with --offload all on a CUDA device: free a block's weights after its forward
    /// pass and bring them again for its backward pass. With false they stay, which moves a third
    /// less between ranks and takes the memory of all blocks' weights. The result is the same, bit
    /// for bit
    #[arg(long, aliases = ["reshard_after_forward"], value_name = "BOOL", default_value_t = true)]
    #[arg(action = clap::ArgAction::Set, help_heading = MEMORY)]
    #[serde(skip)]
    pub reshard_after_forward: bool,
    /// Target tokens per chunk of the loss: the logits of one chunk exist at a time
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = MEMORY)]
    pub loss_chunk: usize,
    /// Maximum length of an example in tokens; overrides max_length of the tasks
    #[arg(long, aliases = ["max_length", "max_seq_length", "max-seq-length", "max_seq_len", "max-seq-len"])]
    #[arg(value_name = "N", help_heading = DATA)]
    pub max_length: Option<usize>,
    /// Refuse examples longer than the maximum length instead of truncating them
    #[arg(long, alias = "strict", help_heading = DATA)]
    #[serde(skip)]
    pub no_truncate: bool,
    /// Held-out rows per task, at most
    #[arg(long, value_name = "N", requires = "eval_every", default_value_t = 64, help_heading = DATA)]
    #[serde(skip)]
    pub eval_rows: usize,
    /// Refuse unknown fields of config.json instead of warning about them
    #[arg(long, help_heading = DATA)]
    #[serde(skip)]
    pub strict_config: bool,
    /// Dtype of the forward and backward pass: f32 or bf16 [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_name = "DTYPE", help_heading = MEMORY)]
    #[serde(skip)]
    pub compute_dtype: Option<Dtype>,
    /// Dtype of the saved weights: f32, bf16 or f16. Masks need f32: bf16 loses small updates
    #[arg(long, value_name = "DTYPE", default_value = "f32", help_heading = MEMORY)]
    #[serde(skip)]
    pub save_dtype: Dtype,
    /// Save a training state every N steps in OUT.checkpoints; a signal saves one in any case
    /// [default: never]
    #[arg(long, aliases = ["save_steps", "save-steps"], value_name = "N", help_heading = RESUME)]
    #[serde(skip)]
    pub save_every: Option<usize>,
    /// Number of saved states to keep, the newest ones
    #[arg(long, aliases = ["keep", "save_total_limit"], value_name = "N", default_value_t = 1, help_heading = RESUME)]
    #[serde(skip)]
    pub save_total_limit: usize,
    /// Save the mean of the weights at the last N steps that --save-every saves, of which the end
    /// of training is one, instead of the last weights. The N − 1 states before stay in
    /// OUT.checkpoints until then, on disk; memory for one tensor at a time is added. Needs
    /// --save-every; in the last stage alone if there are several
    #[arg(long, alias = "average_last", value_name = "N", requires = "save_every", help_heading = RESUME)]
    #[serde(skip)]
    pub average_last: Option<usize>,
    /// Continue from the newest state in OUT.checkpoints, or start if there is none. --force skips
    /// states that are damaged, of another version or of another run
    #[arg(long, help_heading = RESUME)]
    #[serde(skip)]
    pub resume: bool,
    /// Compute the loss on held-out rows (each task's `eval` file) every N steps and at the end
    /// [default: never]
    #[arg(long, aliases = ["eval_steps", "eval-steps"], value_name = "N", help_heading = LOGGING)]
    #[serde(skip)]
    pub eval_every: Option<usize>,
    /// Log a line every N steps
    #[arg(long, aliases = ["logging_steps", "logging-steps"], value_name = "N", default_value_t = 10)]
    #[arg(help_heading = LOGGING)]
    #[serde(skip)]
    pub log_every: usize,
    /// Also write TensorBoard event files to this directory
    #[arg(long, aliases = ["logging_dir", "logging-dir"], value_name = "DIR", help_heading = LOGGING)]
    #[serde(skip)]
    pub tensorboard: Option<PathBuf>,
    /// Random seed of shuffles, samples and stochastic rounding
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = RUN)]
    pub seed: u64,
    /// Device: cpu, cuda, cuda:N, or auto (CUDA if available)
    #[arg(long, value_name = "DEVICE", default_value = "auto", help_heading = RUN)]
    #[serde(skip)]
    pub device: DeviceChoice,
}

/// The optimizers.
#[derive(clap::ValueEnum, Serialize, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Optimizer {
    /// AdamW with moments of --optim-state-dtype.
    #[value(aliases = ["adamw_torch", "adamw_torch_fused", "adamw_hf"])]
    #[serde(rename = "adamw")]
    Adamw,
    /// AdamW with 8-bit moments.
    #[value(name = "adamw_8bit", aliases = ["adamw-8bit", "adamw_bnb_8bit"])]
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
}

impl Optimizer {
    fn is_adamw(&self) -> bool {
        *self == Self::Adamw
    }
}

/// State that is kept out of the device's memory.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// None.
    None,
    /// The optimizer's moments.
    Optimizer,
    /// The moments and the weights.
    All,
}

/// Length of training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// Number of passes over the rows of each stage; the steps follow from it.
    Epochs(f64),
    /// Number of optimizer steps.
    Steps(usize),
    /// Number of tokens; the steps follow from it.
    Tokens(usize),
}

impl TrainingArgs {
    /// Checks the ranges, and sets --strict-config for the process.
    ///
    /// # Errors
    /// [`Usage`] naming the argument.
    pub fn check(&self) -> Result<()> {
        set_strict_config(self.strict_config);
        // Maps infinity to NaN, for which no comparison holds.
        let finite = |x: f64| if x.is_finite() { x } else { f64::NAN };
        let rules = [
            (self.steps != Some(0) && self.tokens != Some(0), "--steps and --tokens must be at least 1"),
            (self.epochs.is_none_or(|f| finite(f) > 0.0 && f <= 1e6), "--epochs must be positive and at most 1e6"),
            ((1..=1 << 16).contains(&self.batch_size), "--batch-size must be 1 to 65536"),
            ((1..=1 << 16).contains(&self.grad_accum), "--grad-accum must be 1 to 65536"),
            (finite(self.lr) > 0.0, "--lr must be positive"),
            (finite(self.weight_decay) >= 0.0, "--weight-decay must not be negative"),
            ((0.0..1.0).contains(&self.adam_beta1), "--adam-beta1 must be 0 or more and under 1"),
            ((0.0..1.0).contains(&self.adam_beta2), "--adam-beta2 must be 0 or more and under 1"),
            (finite(self.adam_epsilon) > 0.0, "--adam-epsilon must be positive"),
            (finite(self.max_grad_norm) >= 0.0, "--max-grad-norm must not be negative"),
            (self.router_aux_loss_coef.is_none_or(|f| finite(f) >= 0.0), "--router-aux-loss-coef must not be negative"),
            (self.max_length.is_none_or(|n| n >= 2), "--max-length must be at least 2"),
            (matches!(self.master_dtype, Dtype::F32 | Dtype::BF16), "--master-dtype must be f32 or bf16"),
            (matches!(self.optim_state_dtype, Dtype::F32 | Dtype::BF16), "--optim-state-dtype must be f32 or bf16"),
            (
                self.optim == Optimizer::Adamw || self.optim_state_dtype == Dtype::F32,
                "--optim adamw_8bit has moments of its own form: leave out --optim-state-dtype",
            ),
            (
                self.optim == Optimizer::Adamw || self.offload == Offload::None,
                "--optim adamw_8bit keeps its moments on the device: leave out --offload",
            ),
            (self.loss_chunk > 0, "--loss-chunk must be at least 1"),
            (self.save_every != Some(0), "--save-every must be at least 1"),
            (self.average_last != Some(0), "--average-last must be at least 1"),
            (self.save_total_limit > 0, "--save-total-limit must be at least 1"),
            (self.eval_every != Some(0) && self.eval_rows > 0, "--eval-every and --eval-rows must be at least 1"),
            (
                !self.optimizer_in_backward || self.grad_accum == 1,
                "--optimizer-in-backward needs --grad-accum 1: a sum over batches needs all gradients",
            ),
            (
                !self.optimizer_in_backward || self.max_grad_norm == 0.0,
                "--optimizer-in-backward needs --max-grad-norm 0: the norm needs all gradients",
            ),
            (self.log_every > 0, "--log-every must be at least 1"),
            (
                matches!(self.compute_dtype, None | Some(Dtype::F32 | Dtype::BF16)),
                "--compute-dtype must be f32 or bf16",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err(Usage((*message).to_owned()).into()),
            None => self.schedule.check(),
        }
    }

    /// Length of training; one epoch unless the arguments say otherwise.
    pub fn budget(&self) -> Budget {
        match (self.tokens, self.steps) {
            (Some(tokens), _) => Budget::Tokens(tokens),
            (None, Some(steps)) => Budget::Steps(steps),
            (None, None) => Budget::Epochs(self.epochs.unwrap_or(1.0)),
        }
    }

    /// Hyperparameters of the optimizer.
    pub fn optimizer(&self) -> AdamWConfig {
        AdamWConfig {
            betas: (self.adam_beta1, self.adam_beta2),
            eps: self.adam_epsilon,
            weight_decay: self.weight_decay,
            state: match (self.optim, self.optim_state_dtype) {
                (Optimizer::Adamw8bit, _) => StateKind::Blockwise,
                (Optimizer::Adamw, dtype) => StateKind::plain(dtype),
            },
        }
    }

    /// The dtypes of training on `device`.
    pub fn precision(&self, device: Device) -> Precision {
        let compute = match self.compute_dtype {
            Some(dtype) => kind_of(dtype),
            None if device.is_cuda() => Kind::BFloat16,
            None => Kind::Float,
        };
        Precision { master: kind_of(self.master_dtype), compute }
    }

    /// Memory of the weights and of the moments when `device` computes.
    ///
    /// # Errors
    /// [`Usage`] for --offload on the CPU without a directory, or a directory without it;
    /// [`Usage`] for options that do not go together.
    pub(crate) fn storage(&self, device: Device) -> Result<[Storage; 2]> {
        let away = match (&self.offload_dir, device) {
            _ if self.offload == Offload::None && self.offload_dir.is_none() => Storage::On(device),
            (Some(_), _) if self.offload == Offload::None => {
                return Err(usage("--offload-dir needs --offload optimizer or all"));
            }
            (Some(_), Device::Cuda(_)) => {
                return Err(usage("--offload-dir is for the CPU: on CUDA the state lies in pinned host memory"));
            }
            (Some(folder), _) => Storage::Files(folder.clone()),
            (None, Device::Cuda(index)) => Storage::Pinned(index),
            (None, _) => {
                return Err(usage("--offload on the CPU needs --offload-dir DIR, on a disk with room for the state"));
            }
        };
        Ok(match self.offload {
            Offload::None => [Storage::On(device), Storage::On(device)],
            Offload::Optimizer => [Storage::On(device), away],
            Offload::All => [away.clone(), away],
        })
    }

    /// The arguments that the weights depend on, with the dtype and type of `device` resolved: the
    /// description of a run that a saved state is compared with.
    pub fn describe(&self, device: Device) -> Map<String, Value> {
        let Ok(Value::Object(mut map)) = serde_json::to_value(self) else {
            unreachable!("the arguments are a struct of numbers, flags and names")
        };
        if let Budget::Epochs(epochs) = self.budget() {
            map.insert("epochs".into(), epochs.into());
        }
        if let (Some(count), Some(every)) = (self.average_last, self.save_every) {
            map.insert("average_last".into(), vec![count, every].into());
        }
        let compute = if self.precision(device).compute == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 };
        map.insert("compute_dtype".into(), compute.name().into());
        map.insert("device".into(), if device.is_cuda() { "cuda" } else { "cpu" }.into());
        map
    }

    /// Treatment of examples longer than the context.
    pub fn overlong(&self) -> Overlong {
        if self.no_truncate { Overlong::Refuse } else { Overlong::Truncate }
    }
}

impl Budget {
    /// The budget of stage `index` of `count`: equal parts; the first ones take the remainder.
    /// Epochs are those of each stage.
    ///
    /// # Errors
    /// [`Usage`] if a part would be empty.
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
            Self::Epochs(_) => Ok(self),
            Self::Steps(n) => Ok(Self::Steps(share(n)?)),
            Self::Tokens(n) => Ok(Self::Tokens(share(n)?)),
        }
    }
}

fn dtype_name<S: Serializer>(dtype: &Dtype, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}
