//! The command line of cpift-train.

use std::path::PathBuf;

use anyhow::Result;
use clap::{ColorChoice, Parser, Subcommand, ValueEnum};
use cpift_core::Dtype;
use cpift_core::error::usage;
use cpift_core::run::cli::{Common, Named};
use cpift_torch::args::{Offload, TrainingArgs};
use cpift_torch::train::{LoraConfig, LoraOutput};
use serde::{Serialize, Serializer};

/// Heading of `--help`: paths.
const IO: &str = "Input and output";
/// Heading of `--help`: elements that keep their bits.
const ISOLATION: &str = "Isolation";
/// Heading of `--help`: the fine-tuning method.
const METHOD: &str = "Method";
/// Heading of `--help`: steps, tokens, learning rates.
const BUDGET: &str = "Budget and schedule";
/// Heading of `--help`: rows and what becomes of them.
const DATA: &str = "Data";
/// Heading of `--help`: memory and compute.
const MEMORY: &str = "Memory and speed";
/// Heading of `--help`: what is printed.
const LOGGING: &str = "Logging";

/// Fine-tunes a checkpoint in stages, group by group, while the core regions of earlier groups stay
/// frozen.
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input; 75 stopped by SIGTERM or SIGUSR1 with the
/// state saved.
#[derive(Parser, Debug)]
#[command(name = "cpift-train", version)]
pub struct Args {
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
    /// Arguments of every stage.
    #[command(flatten)]
    pub common: Common,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Train: CPI-FT's last stage with --groups and --mask, plain multi-stage SFT with --groups
    /// --no-freeze, plain multi-task SFT without --groups
    ///
    /// With groups there is one stage per group, in the order of groups.json, and the budget
    /// (--steps or --tokens) is divided equally; --epochs counts each stage's own. In stage k every
    /// element that is core to a task of an earlier group keeps its bits, as --master-dtype and
    /// --save-dtype represent it. With masks every stage trains on the same balanced mixture of all
    /// tasks, without masks on the rows of its own group (--stage-data). The optimizer starts
    /// afresh in every stage. The output is a Hugging Face directory with metrics.jsonl (in
    /// OUT.checkpoints during the run) and cpift.json.
    Run(Box<RunArgs>),
    /// Print the memory and disk space that training takes, computed before anything is loaded, and
    /// options that make it fit
    ///
    /// Memory is shown by part at the five moments of a step that can be its peak: the loss (all
    /// activations are kept), the first and the last block of the backward pass, the embedding
    /// after them, and the update. It is computed, not measured; what an allocator loses to
    /// fragmentation comes on top. LLaMA-2-7B, 1 x 4096 tokens, bf16 compute, recomputation,
    /// updates in the backward pass, in GiB: f32 master weights and moments: weights 25.1, moments
    /// 50.2, gradients 0.8, activations 2.0, casts 0.4, CUDA 1.0: 79.4; bf16 master weights and
    /// moments: weights 12.6, moments 25.1, gradients 0.4, activations 2.0, CUDA 1.0: 41.0.
    ///
    /// --device cuda --device-memory GIB plans for a device that this machine does not have.
    Plan(Box<PlanArgs>),
    /// Show the first examples of each task as the model gets them: target tokens of the loss,
    /// truncation
    ///
    /// Target tokens have a green background, the others are dim; without colours, targets stand
    /// between « and ». A line break shows as ↵, other control characters as their symbols. All
    /// rows are read and counted. No weights are loaded. With --json: a list of objects with ids,
    /// tokens and target, one value per token.
    Preview(PreviewArgs),
    /// Check saved states against the digests saved with them; --resume does the same before it
    /// continues
    Verify(VerifyArgs),
}

/// Arguments of `verify`.
#[derive(clap::Args, Debug)]
pub struct VerifyArgs {
    /// OUT.checkpoints, or one step-N in it
    #[arg(value_name = "DIR", help_heading = IO)]
    pub states: PathBuf,
}

/// Arguments of `preview`.
#[derive(clap::Args, Debug)]
pub struct PreviewArgs {
    /// Checkpoint whose tokenizer and chat template are used: a Hugging Face directory, or
    /// org/name[@revision] on the Hub
    #[arg(long, value_name = "MODEL", help_heading = IO)]
    pub model: PathBuf,
    /// Task list, tasks.toml
    #[arg(long, value_name = "FILE", help_heading = IO)]
    pub tasks: PathBuf,
    /// Show only these tasks (names, separated by commas) [default: all]
    #[arg(long = "task", value_name = "NAME", value_delimiter = ',', help_heading = DATA)]
    pub only: Vec<String>,
    /// Examples per task
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = DATA)]
    pub rows: usize,
    /// Maximum length of an example in tokens; overrides max_length of the tasks
    #[arg(long, value_name = "N", help_heading = DATA)]
    pub max_length: Option<usize>,
    /// Refuse unknown fields of config.json instead of warning about them
    #[arg(long, help_heading = DATA)]
    pub strict_config: bool,
    /// Colours: auto (on a terminal, unless NO_COLOR is set), always or never
    #[arg(long, value_name = "WHEN", hide_possible_values = true, default_value = "auto", help_heading = LOGGING)]
    pub color: ColorChoice,
}

/// Arguments of `plan`.
#[derive(clap::Args, Debug)]
pub struct PlanArgs {
    /// Model: a Hugging Face directory, or org/name[@revision] on the Hub; only config.json and the
    /// headers of its weights are read
    #[arg(long, value_name = "MODEL", required_unless_present = "model_config", help_heading = IO)]
    pub model: Option<PathBuf>,
    /// A model's config.json instead of a directory
    #[arg(long, value_name = "FILE", conflicts_with = "model", help_heading = IO)]
    pub model_config: Option<PathBuf>,
    /// Task list, tasks.toml, for the length of the longest example and the number of probes
    #[arg(long, value_name = "FILE", help_heading = IO)]
    pub tasks: Option<PathBuf>,
    /// Directory of the outputs, for its free disk space
    #[arg(long, value_name = "DIR", default_value = ".", help_heading = IO)]
    pub out: PathBuf,
    /// Share of the elements that are frozen, in percent: --percent of cpift-mask times the tasks
    /// of earlier groups
    #[arg(long, value_name = "P", allow_negative_numbers = true, default_value_t = 0.0, help_heading = ISOLATION)]
    pub frozen_percent: f64,
    /// Number of probes of the pipeline [default: the number of tasks, or 5]
    #[arg(long, value_name = "N", help_heading = METHOD)]
    pub probes: Option<u64>,
    /// Adapters.
    #[command(flatten)]
    pub lora: LoraArgs,
    /// Fine-tuning arguments.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Tokens per batch [default: --batch-size times --max-length, or the tasks' largest
    /// max_length, or 1024]
    #[arg(long, value_name = "N", help_heading = DATA)]
    pub batch_tokens: Option<u64>,
    /// Memory of the device in GiB [default: that of --device; for the CPU that of the machine,
    /// within the limits on the process]
    #[arg(long, value_name = "GIB", allow_negative_numbers = true, help_heading = MEMORY)]
    pub device_memory: Option<f64>,
    /// Ranks that share the model and each batch
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = MEMORY)]
    pub world: u64,
    /// Ranks on each node [default: all]
    #[arg(long, value_name = "N", help_heading = MEMORY)]
    pub per_node: Option<u64>,
    /// Rate in GB/s at which a rank receives from other ranks (from other nodes with --per-node),
    /// and at which --offload copies between host and device [default: no estimate]
    #[arg(long, value_name = "GB/S", allow_negative_numbers = true, help_heading = MEMORY)]
    pub link: Option<f64>,
    /// Compute rate of training in TFLOP/s (matmul rate of the device times the share training
    /// reaches), to estimate the time [default: no estimate]
    #[arg(long, value_name = "F", allow_negative_numbers = true, help_heading = MEMORY)]
    pub tflops: Option<f64>,
}

/// Arguments of `run`.
///
/// Serialized, they are the arguments that the weights depend on beside those of `training`. The
/// plan resolves the skipped ones to stages, examples and digests.
#[derive(clap::Args, Debug, Serialize)]
pub struct RunArgs {
    /// Checkpoint to start from: a Hugging Face directory, or org/name[@revision] on the Hub
    #[arg(long, aliases = ["model_name_or_path", "model-name-or-path"], value_name = "MODEL", help_heading = IO)]
    #[serde(skip)]
    pub model: PathBuf,
    /// Task list, tasks.toml
    #[arg(long, value_name = "FILE", help_heading = IO)]
    #[serde(skip)]
    pub tasks: PathBuf,
    /// Groups and their order, groups.json [default: all tasks form one stage]
    #[arg(long, value_name = "FILE", help_heading = IO)]
    #[serde(skip)]
    pub groups: Option<PathBuf>,
    /// Core-region mask of a task; one for every task of groups.json
    #[arg(long = "mask", value_name = "NAME=FILE", requires = "groups", help_heading = IO)]
    #[serde(skip)]
    pub masks: Vec<Named>,
    /// Mask of elements that keep their bits while tasks are added; of several, their union
    #[arg(long, value_name = "FILE", requires = "add", help_heading = IO)]
    #[serde(skip)]
    pub protect: Vec<PathBuf>,
    /// Rows to replay instead of those of the earlier tasks in tasks.toml, for instance written by
    /// cpift-eval sample: .jsonl, .json or .parquet. NAME.jsonl has the template_args and
    /// max_length of the task NAME if tasks.toml lists it
    #[arg(long, value_name = "FILE", requires = "add", help_heading = IO)]
    #[serde(skip)]
    pub replay_from: Vec<PathBuf>,
    /// Base that the masks were made for [default: --model]
    #[arg(long, value_name = "MODEL", help_heading = IO)]
    #[serde(skip)]
    pub base: Option<PathBuf>,
    /// Output directory
    #[arg(long, aliases = ["output_dir", "output-dir"], value_name = "DIR", help_heading = IO)]
    #[serde(skip)]
    pub out: PathBuf,
    /// Isolation and its settings.
    #[command(flatten)]
    pub isolation: IsolationArgs,
    /// Keep the bits of the embedding table and of the first N decoder blocks while tasks are added
    #[arg(long, value_name = "N", requires = "add", default_value_t = 0, help_heading = ISOLATION)]
    pub freeze_layers: u32,
    /// Freeze nothing: plain multi-stage SFT
    #[arg(long, requires = "groups", conflicts_with = "masks", help_heading = ISOLATION)]
    #[serde(skip)]
    pub no_freeze: bool,
    /// Trainable elements of a stage, apart from those frozen: `all`, or `cores` (TRACE, arXiv
    /// 2605.31025), the core regions of the group's own tasks without those of earlier groups
    #[arg(long, alias = "train", value_enum, value_name = "WHAT", default_value_t = Trainable::All)]
    #[arg(help_heading = ISOLATION)]
    #[serde(rename = "only_cores", serialize_with = "is_cores")]
    pub trainable: Trainable,
    /// Share of each earlier task's rows that is added to the rows of every stage, 0 to 1
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true, help_heading = METHOD)]
    #[serde(skip)]
    pub replay: f64,
    /// Share of every stage's tokens that are rows of earlier tasks, 0 or above and below 1: the
    /// same number of tokens of each task, at least one row; rows are repeated if there are too few
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true, help_heading = METHOD)]
    #[arg(conflicts_with = "replay")]
    #[serde(skip)]
    pub replay_share: f64,
    /// Adapters.
    #[command(flatten)]
    pub lora: LoraArgs,
    /// Fine-tuning arguments.
    #[command(flatten)]
    #[serde(skip)]
    pub training: TrainingArgs,
    /// Factor of --lr, for a stage at a share of the rate of others
    #[arg(long, value_name = "F", default_value_t = 1.0, allow_negative_numbers = true, help_heading = BUDGET)]
    #[serde(skip)]
    pub lr_scale: f64,
    /// Peak learning rate of each stage, separated by commas [default: --lr in all]
    #[arg(long, value_name = "F,…", value_delimiter = ',', requires = "groups", allow_negative_numbers = true)]
    #[arg(help_heading = BUDGET)]
    #[serde(skip)]
    pub stage_lr: Vec<f64>,
    /// Train only on these tasks (names, separated by commas) [default: all, or those of
    /// groups.json]
    #[arg(long, value_name = "NAME", value_delimiter = ',', conflicts_with = "groups", help_heading = DATA)]
    #[serde(skip)]
    pub only: Vec<String>,
    /// Add these tasks (names, separated by commas) to a model that is tuned on others: one stage
    /// on their rows. The other tasks of tasks.toml are earlier ones, whose rows are read only for
    /// --replay-share and --isolation dynamic (or those of --replay-from instead)
    #[arg(long, value_name = "NAME", value_delimiter = ',', conflicts_with_all = ["groups", "only"])]
    #[arg(help_heading = DATA)]
    #[serde(skip)]
    pub add: Vec<String>,
    /// Rows of a stage: `mixed`, those of all tasks; `group`, those of the group's own tasks
    /// [default: mixed if --mask freezes the cores of earlier groups, CPI-FT's last stage; group
    /// with --no-freeze, --isolation dynamic, --trainable cores, --replay or --replay-share]
    #[arg(long, value_enum, value_name = "WHICH", overrides_with = "stage_data", help_heading = DATA)]
    #[serde(skip)]
    pub stage_data: Option<StageData>,
    /// Rows of each task: `balanced` (its `sample` in tasks.toml; default the smallest task's rows,
    /// at most 1000), `all`, or a number [default: balanced when freezing, else all]
    #[arg(long, value_name = "balanced|all|N", help_heading = DATA)]
    #[serde(skip)]
    pub sample: Option<SampleRows>,
    /// Mix the tasks of a stage by temperature (T5, arXiv 1910.10683): each task's share of the
    /// rows of an epoch is proportional to n^(1/T) for its n rows (times its `weight` in
    /// tasks.toml). 1: all rows as they are; 2: square roots; large T: equal shares. Rows of small
    /// tasks are repeated, rows of large ones wait for a later epoch [default: 1]
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = DATA)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixture_temperature: Option<f64>,
}

/// Parameter isolation. Serialized: its name, or the settings of a dynamic mask.
#[derive(clap::Args, Debug)]
pub struct IsolationArgs {
    /// Parameter isolation: `static`, the masks of earlier groups keep their bits; `dynamic` (EPI,
    /// arXiv 2604.14010), without --mask: the elements that currently matter most to earlier tasks
    /// keep their bits, measured on the rows that are replayed, or on all of theirs if none are
    #[arg(long = "isolation", value_enum, value_name = "KIND", default_value_t = IsolationKind::Static)]
    #[arg(help_heading = ISOLATION)]
    pub kind: IsolationKind,
    /// Settings of a dynamic mask.
    #[command(flatten)]
    pub dynamic: DynamicArgs,
}

/// Settings of `--isolation dynamic`.
#[derive(clap::Args, Debug, Serialize)]
pub struct DynamicArgs {
    /// With --isolation dynamic, share of the trainable parameters that is protected, in percent
    #[arg(long, value_name = "P", default_value_t = 5.0, help_heading = ISOLATION)]
    pub percent: f64,
    /// With --isolation dynamic, β of the moving average of squared gradients of earlier tasks'
    /// rows (four batches per update)
    #[arg(long, value_name = "F", default_value_t = 0.9, help_heading = ISOLATION)]
    pub ema: f64,
    /// With --isolation dynamic, steps between updates of the mask
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = ISOLATION)]
    pub mask_interval: usize,
}

/// Low-rank adapters. Serialized: their settings, or null.
#[derive(clap::Args, Debug)]
pub struct LoraArgs {
    /// Train low-rank adapters (LoRA, arXiv 2106.09685) of this rank instead of the weights: the
    /// base has no gradients and moments, and lies in --compute-dtype. With groups all stages train
    /// the same adapters
    #[arg(long = "lora-rank", aliases = ["lora_rank", "lora_r", "lora-r"], value_name = "R", help_heading = METHOD)]
    pub rank: Option<u32>,
    /// LoRA's α: products are scaled by α/rank [default: twice the rank]
    #[arg(long = "lora-alpha", aliases = ["lora_alpha"], value_name = "F", requires = "rank", help_heading = METHOD)]
    #[arg(allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Modules that get adapters, as in PEFT's target_modules: names or ends of names, separated by
    /// commas, or all-linear, the linear layers of all blocks. Experts take no adapters
    #[arg(long = "lora-target", value_name = "NAME,…")]
    #[arg(aliases = ["lora_target", "lora_target_modules", "lora-target-modules", "target_modules", "target-modules"])]
    #[arg(value_delimiter = ',', default_value = "all-linear", help_heading = METHOD)]
    pub target: Vec<String>,
    /// Scale the products by α over the root of the rank (rsLoRA, arXiv 2312.03732)
    #[arg(long = "lora-rslora", aliases = ["lora_rslora", "use_rslora", "use-rslora"], requires = "rank")]
    #[arg(help_heading = METHOD)]
    pub rslora: bool,
    /// Dropout of the adapters' inputs; only 0 is supported
    #[arg(long = "lora-dropout", aliases = ["lora_dropout"], value_name = "F", default_value_t = 0.0)]
    #[arg(allow_negative_numbers = true, help_heading = METHOD)]
    pub dropout: f64,
    /// Output of LoRA: `merged`, a model directory with the adapters merged into the weights; or
    /// `adapter`, a PEFT directory, which cpift-eval, -merge and -mask take as MODEL+ADAPTER
    #[arg(long = "lora-output", alias = "lora_output", value_name = "FORM", value_enum)]
    #[arg(default_value_t = LoraOutput::Merged, help_heading = METHOD)]
    pub output: LoraOutput,
}

impl LoraArgs {
    /// Settings of the adapters, if there are any.
    pub fn config(&self, seed: u64) -> Option<LoraConfig> {
        let rank = self.rank?;
        let all = self.target.iter().any(|name| ["all-linear", "all"].contains(&name.as_str()));
        Some(LoraConfig {
            rank: i64::from(rank),
            alpha: self.alpha.unwrap_or(2.0 * f64::from(rank)),
            rank_stabilized: self.rslora,
            targets: if all { Vec::new() } else { self.target.clone() },
            output: self.output,
            seed,
        })
    }

    /// Checks ranges, and combinations with other arguments of training.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] naming the argument.
    pub fn check(&self, training: &TrainingArgs) -> Result<()> {
        let used = self.rank.is_some();
        let problem = if self.rank == Some(0) || self.alpha.is_some_and(|a| !(a.is_finite() && a > 0.0)) {
            "--lora-rank and --lora-alpha must be positive"
        } else if self.dropout != 0.0 {
            "--lora-dropout must be 0: adapters are trained without dropout"
        } else if !used && (self.output != LoraOutput::Merged || self.target != ["all-linear"]) {
            "--lora-output and --lora-target are settings of adapters: they need --lora-rank"
        } else if self.target.iter().any(String::is_empty) {
            "--lora-target must be names of modules, or all-linear"
        } else if used && training.master_dtype != Dtype::F32 {
            "--lora-rank keeps the base in --compute-dtype and the adapters in f32: leave out --master-dtype"
        } else if used && training.average_last.is_some() {
            "--lora-rank and --average-last exclude each other: the means of A and of B have another product"
        } else if used && training.offload != Offload::None {
            "--lora-rank and --offload exclude each other"
        } else {
            return Ok(());
        };
        Err(usage(problem))
    }
}

impl Serialize for IsolationArgs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.kind {
            IsolationKind::Static => serializer.serialize_str("static"),
            IsolationKind::Dynamic => self.dynamic.serialize(serializer),
        }
    }
}

impl Serialize for LoraArgs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.config(0).serialize(serializer)
    }
}

fn is_cores<S: Serializer>(trainable: &Trainable, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bool(*trainable == Trainable::Cores)
}

/// Choice of the protected elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IsolationKind {
    /// The given masks.
    Static,
    /// The most important elements, tracked during training.
    #[value(alias = "evolving")]
    Dynamic,
}

/// Trainable elements of a stage, apart from the frozen ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Trainable {
    /// All elements.
    All,
    /// The core regions of the group's own tasks.
    #[value(alias = "only-cores")]
    Cores,
}

impl RunArgs {
    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] naming the argument.
    pub fn check(&self) -> Result<()> {
        self.training.check()?;
        let dynamic = self.isolation.kind == IsolationKind::Dynamic;
        let staged = self.groups.is_some() || !self.add.is_empty();
        let problem = if self.base.is_some() && self.masks.is_empty() && self.protect.is_empty() {
            "--base is the base that masks were made for: it needs --mask or --protect"
        } else if dynamic && !staged {
            "--isolation dynamic needs --groups or --add: without stages there are no earlier tasks"
        } else if dynamic && !(self.protect.is_empty() && self.freeze_layers == 0) {
            "--isolation dynamic computes its masks itself: leave out --protect and --freeze-layers"
        } else if self.lora.rank.is_some() && (dynamic || self.freezes()) {
            "--lora-rank trains adapters beside the weights, which have no elements to freeze: leave out --mask, --protect, --freeze-layers and --isolation dynamic"
        } else if self.stage_lr.iter().any(|lr| !(lr.is_finite() && *lr > 0.0)) {
            "--stage-lr must be positive"
        } else if !(self.lr_scale.is_finite() && self.lr_scale > 0.0) {
            "--lr-scale must be positive"
        } else if dynamic && (!self.masks.is_empty() || self.no_freeze) {
            "--isolation dynamic computes its masks itself: leave out --mask and --no-freeze"
        } else if self.groups.is_some() && self.masks.is_empty() && !self.no_freeze && !dynamic {
            "--groups needs a --mask NAME=FILE for every task, --isolation dynamic, or --no-freeze"
        } else if self.trainable == Trainable::Cores && self.masks.is_empty() {
            "--trainable cores needs a --mask NAME=FILE for every task"
        } else if dynamic && !(self.isolation.dynamic.percent > 0.0 && self.isolation.dynamic.percent <= 100.0) {
            "--percent must be above 0 and at most 100"
        } else if !(0.0..1.0).contains(&self.isolation.dynamic.ema) || self.isolation.dynamic.mask_interval == 0 {
            "--ema must be 0 or above and below 1, --mask-interval at least 1"
        } else if self.mixture_temperature.is_some_and(|t| !(t.is_finite() && t > 0.0)) {
            "--mixture-temperature must be positive"
        } else if !(0.0..=1.0).contains(&self.replay) {
            "--replay must be 0 to 1"
        } else if self.replay > 0.0 && self.groups.is_none() {
            "--replay needs --groups: without stages there are no earlier tasks"
        } else if !self.replay_from.is_empty() && self.replay_share == 0.0 && !dynamic {
            "--replay-from gives rows for --replay-share or --isolation dynamic: add one of them"
        } else if !(0.0..1.0).contains(&self.replay_share) {
            "--replay-share must be 0 or above and below 1"
        } else if self.replay_share > 0.0 && !staged {
            "--replay-share needs --groups or --add: without stages there are no earlier tasks"
        } else if self.replays() && self.stage_data == Some(StageData::Mixed) {
            "--replay and --replay-share add rows of earlier tasks to the group's own, so --stage-data mixed, which has the rows of all tasks, excludes them"
        } else {
            return self.lora.check(&self.training);
        };
        Err(usage(problem))
    }

    /// Returns true if given elements keep their bits.
    fn freezes(&self) -> bool {
        !self.masks.is_empty() || !self.protect.is_empty() || self.freeze_layers > 0
    }

    /// Returns true if rows of earlier tasks are trained on again.
    pub(crate) fn replays(&self) -> bool {
        self.replay > 0.0 || self.replay_share > 0.0
    }

    /// Rows of a stage: as given, else by the definition of the method that the other arguments
    /// select.
    #[must_use]
    pub fn stage_data(&self) -> StageData {
        let last_stage = !self.masks.is_empty() && self.trainable == Trainable::All && !self.replays();
        self.stage_data.unwrap_or(if last_stage { StageData::Mixed } else { StageData::Group })
    }
}

/// Tasks whose rows a stage trains on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StageData {
    /// The tasks of the group.
    Group,
    /// All tasks.
    Mixed,
}

impl StageData {
    /// The value as typed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::Mixed => "mixed",
        }
    }
}

/// Number of rows of each task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleRows {
    /// The same number for each task unless tasks.toml sets `sample`.
    Balanced,
    /// All rows.
    All,
    /// At most this many rows of each task.
    Count(usize),
}

impl std::str::FromStr for SampleRows {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "balanced" => Ok(Self::Balanced),
            "all" => Ok(Self::All),
            other => match other.parse() {
                Ok(n) if n > 0 => Ok(Self::Count(n)),
                _ => Err(format!("expected balanced, all or a number of rows, found {other:?}")),
            },
        }
    }
}
