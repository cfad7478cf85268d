//! The command line of cpift-train.

use std::path::PathBuf;

use clap::{ColorChoice, Parser, Subcommand, ValueEnum};
use cpift_core::cli::{Common, Named};
use cpift_torch::args::TrainingArgs;

use crate::estimate::PlanArgs;

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
    /// equally. In stage k every element that is core to a task of an earlier group keeps its bits (as --master and --save-dtype have it). The optimizer starts afresh in every
    /// stage. The output is a Hugging Face folder with metrics.jsonl (while it is at work, in OUT.checkpoints) and cpift.json.
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
    /// The rows of a stage: `group`, those of the group's own tasks; `mixed`, those of all tasks
    #[arg(long, value_enum, default_value_t = StageData::Group)]
    pub stage_data: StageData,
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

/// Which tasks' rows a stage sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StageData {
    /// The group's own.
    Group,
    /// All tasks'.
    Mixed,
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
