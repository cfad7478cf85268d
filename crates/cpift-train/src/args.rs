//! The command line of cpift-train.

use std::path::PathBuf;

use anyhow::Result;
use clap::{ColorChoice, Parser, Subcommand, ValueEnum};
use cpift_core::error::usage;
use cpift_core::run::cli::{Common, Named};
use cpift_torch::args::TrainingArgs;

use crate::memory_plan::PlanArgs;

/// Fine-tunes a checkpoint in stages, group by group, while the core regions of earlier groups stay frozen.
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input; 75 stopped by SIGTERM or SIGUSR1 with the state saved.
#[derive(Parser, Debug)]
#[command(name = "cpift-train", version)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Arguments of every stage.
    #[command(flatten)]
    pub common: Common,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Train: CPI-FT's last stage with --groups and --mask, plain multi-stage SFT with --groups --no-freeze, plain multi-task
    /// SFT without --groups
    ///
    /// With groups there is one stage for each group, in the order of groups.json, and the budget (--steps or --tokens) is shared
    /// equally. In stage k every element that is core to a task of an earlier group keeps its bits (as --master
    /// and --save-dtype have it). With masks every stage trains on the same balanced mixture of all tasks, without them on the rows of its
    /// own group (--stage-data). The optimizer starts afresh in every stage. The output is a Hugging Face folder with metrics.jsonl
    /// (while it is at work, in OUT.checkpoints) and cpift.json.
    Run(Box<RunArgs>),
    /// Print the memory and the disk that training takes, computed before anything is loaded, and what would make it fit
    ///
    /// Memory is shown by part at the five moments of a step that can be its highest: the loss (all activations are there), the first and
    /// the last block of the backward pass, the embedding after them, the update. It is computed, not measured; what an allocator loses to
    /// fragmentation comes on top. LLaMA-2-7B, 1 x 4096 tokens, bf16 compute, recomputation, updates in the backward pass, in GiB:
    /// f32 masters and moments: weights 25.1, moments 50.2, gradients 0.8, activations 2.0, casts 0.4, CUDA 1.0: 79.4;
    /// bf16 masters and moments: weights 12.6, moments 25.1, gradients 0.4, activations 2.0, CUDA 1.0: 41.0.
    ///
    /// --device cuda --device-memory GIB plans for a device that is not here.
    Plan(Box<PlanArgs>),
    /// Show the first examples of each task as the model gets them: which tokens the loss counts, what was cut
    ///
    /// Target tokens stand on green, the others are dim; without colours targets stand between « and ». A line break shows as ↵,
    /// other control characters as their symbols. All rows are read and counted. No weights are loaded. With --json: a list of objects
    /// with ids, tokens and target, a value for each token.
    Preview(PreviewArgs),
    /// Check saved states against the digests that were saved with them; --resume does the same before it goes on
    Verify(VerifyArgs),
}

/// Arguments of `verify`.
#[derive(clap::Args, Debug)]
pub struct VerifyArgs {
    /// OUT.checkpoints, or one step-N in it
    #[arg(value_name = "DIR")]
    pub states: PathBuf,
}

/// Arguments of `preview`.
#[derive(clap::Args, Debug)]
pub struct PreviewArgs {
    /// The checkpoint whose tokenizer and chat template are used: a Hugging Face folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The task list, tasks.toml
    #[arg(long, value_name = "FILE")]
    pub tasks: PathBuf,
    /// Show these tasks only (names, separated by commas) [default: all]
    #[arg(long = "task", value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Examples of each task
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rows: usize,
    /// Longest example in tokens, over the tasks' own max_length
    #[arg(long, value_name = "N")]
    pub max_length: Option<usize>,
    /// Refuse fields of config.json that this program does not know, instead of a warning
    #[arg(long)]
    pub strict_config: bool,
    /// Colours: auto (on a terminal, unless NO_COLOR is set), always or never
    #[arg(long, value_name = "WHEN", hide_possible_values = true, default_value = "auto")]
    pub color: ColorChoice,
}

/// Arguments of `run`.
#[derive(clap::Args, Debug)]
pub struct RunArgs {
    /// The checkpoint to start from: a Hugging Face folder
    #[arg(long, aliases = ["model_name_or_path", "model-name-or-path"], value_name = "DIR")]
    pub model: PathBuf,
    /// The task list, tasks.toml
    #[arg(long, value_name = "FILE")]
    pub tasks: PathBuf,
    /// Train on these tasks only (names, separated by commas) [default: all, or those of groups.json]
    #[arg(long, value_name = "NAME", value_delimiter = ',', conflicts_with = "groups")]
    pub only: Vec<String>,
    /// Groups and their order, groups.json; without it all tasks form one stage
    #[arg(long, value_name = "FILE")]
    pub groups: Option<PathBuf>,
    /// The core region of a task; one for every task of groups.json
    #[arg(long = "mask", value_name = "NAME=FILE", requires = "groups")]
    pub masks: Vec<Named>,
    /// The base the masks were made for; needed with --mask unless --model is that base
    #[arg(long, value_name = "DIR", requires = "masks")]
    pub base: Option<PathBuf>,
    /// Freeze nothing: plain multi-stage SFT
    #[arg(long, requires = "groups", conflicts_with = "masks")]
    pub no_freeze: bool,
    /// What the masks do: `static`, core regions of earlier groups keep their bits; `evolving` (EPI, arXiv 2604.14010), without --mask: what
    /// matters most to earlier groups' tasks at the moment keeps its bits
    #[arg(long, value_enum, value_name = "KIND", default_value_t = IsolationKind::Static, requires = "groups")]
    pub isolation: IsolationKind,
    /// evolving: share of the trainable parameters that is protected, in percent
    #[arg(long, value_name = "P", default_value_t = 5.0)]
    pub percent: f64,
    /// evolving: β of the moving average of squared gradients of earlier tasks' rows (four batches at a time)
    #[arg(long, value_name = "F", default_value_t = 0.9)]
    pub ema: f64,
    /// evolving: steps between two masks
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub mask_interval: usize,
    /// What may move in a stage beside what is frozen: `all`, or `only-cores` (TRACE, arXiv 2605.31025), the core regions of the
    /// group's own tasks without those of earlier groups
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Trained::All)]
    pub train: Trained,
    /// Add this share of each earlier task's rows to the rows of every stage, 0 to 1
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    pub replay: f64,
    /// Train low-rank adapters (LoRA, arXiv 2106.09685) of this rank on all linear layers, merged at the end: a method to compare with, which
    /// saves no memory here
    #[arg(long, value_name = "R", conflicts_with_all = ["masks", "optimizer_in_backward"])]
    pub lora_rank: Option<u32>,
    /// LoRA's α [default: twice the rank]
    #[arg(long, value_name = "F", requires = "lora_rank")]
    pub lora_alpha: Option<f64>,
    /// Rows of a stage: `mixed`, those of all tasks; `group`, those of the group's own tasks [default: mixed where --mask freezes the
    /// cores of earlier groups, CPI-FT's last stage; group with --no-freeze, --isolation evolving, --train only-cores or --replay]
    #[arg(long, value_enum, value_name = "WHICH", overrides_with = "stage_data")]
    pub stage_data: Option<StageData>,
    /// How many rows of each task: `balanced` (its `sample` in tasks.toml; default the smallest task's rows, at most 1000),
    /// `all`, or a number [default: balanced when freezing, else all]
    #[arg(long, value_name = "balanced|all|N")]
    pub sample: Option<SampleRows>,
    /// Peak learning rate of each stage, separated by commas [default: --lr in all]
    #[arg(long, value_name = "F,…", value_delimiter = ',', requires = "groups", allow_negative_numbers = true)]
    pub stage_lr: Vec<f64>,
    /// The folder to write
    #[arg(long, aliases = ["output_dir", "output-dir"], value_name = "DIR")]
    pub out: PathBuf,
    /// How to fine-tune.
    #[command(flatten)]
    pub training: TrainingArgs,
}

/// How the protected elements are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IsolationKind {
    /// By the masks that are given.
    Static,
    /// By importance that is followed in training.
    Evolving,
}

/// What may move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Trained {
    /// Everything that is not frozen.
    All,
    /// Of that, the own core regions.
    OnlyCores,
}

impl RunArgs {
    /// Checks what belongs together and what is in range.
    ///
    /// # Errors
    /// [`cpift_core::Usage`].
    pub fn check(&self) -> Result<()> {
        self.training.check()?;
        let evolving = self.isolation == IsolationKind::Evolving;
        let problem = if self.stage_lr.iter().any(|lr| !(lr.is_finite() && *lr > 0.0)) {
            "--stage-lr must be positive"
        } else if evolving && (!self.masks.is_empty() || self.no_freeze) {
            "--isolation evolving finds its masks itself: leave out --mask and --no-freeze"
        } else if self.groups.is_some() && self.masks.is_empty() && !self.no_freeze && !evolving {
            "--groups needs a --mask NAME=FILE for every task, --isolation evolving, or --no-freeze"
        } else if self.train == Trained::OnlyCores && self.masks.is_empty() {
            "--train only-cores needs a --mask NAME=FILE for every task"
        } else if evolving && !(self.percent > 0.0 && self.percent <= 100.0) {
            "--percent must be above 0 and at most 100"
        } else if !(0.0..1.0).contains(&self.ema) || self.mask_interval == 0 {
            "--ema must be 0 or above and below 1, --mask-interval at least 1"
        } else if !(0.0..=1.0).contains(&self.replay) {
            "--replay must be 0 to 1"
        } else if self.replay > 0.0 && self.groups.is_none() {
            "--replay needs --groups: without stages no task is an earlier one"
        } else if self.replay > 0.0 && self.stage_data == Some(StageData::Mixed) {
            "--replay adds rows of earlier tasks to the group's own: it does not go with --stage-data mixed, which has the rows of all"
        } else if self.lora_rank == Some(0) || self.lora_alpha.is_some_and(|a| !(a.is_finite() && a > 0.0)) {
            "--lora-rank and --lora-alpha must be positive"
        } else if self.lora_rank.is_some() && evolving {
            "--lora-rank does not go with --isolation evolving"
        } else {
            return Ok(());
        };
        Err(usage(problem))
    }

    /// Rows of a stage: as given, else as the method that the other arguments ask for is defined.
    #[must_use]
    pub fn stage_data(&self) -> StageData {
        let last_stage = !self.masks.is_empty() && self.train == Trained::All && self.replay == 0.0;
        self.stage_data.unwrap_or(if last_stage { StageData::Mixed } else { StageData::Group })
    }
}

/// Tasks whose rows a stage sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StageData {
    /// Those of the group.
    Group,
    /// All.
    Mixed,
}

impl StageData {
    /// As typed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::Mixed => "mixed",
        }
    }
}

/// How many rows each task gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleRows {
    /// The same for each unless tasks.toml says otherwise.
    Balanced,
    /// All of them.
    All,
    /// At most so many of each.
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
