//! The command line of cpift-eval.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use cpift_core::Dtype;
use cpift_core::error::usage;
use cpift_core::run::cli::Common;
use cpift_judge::JudgeArgs;
use cpift_report::{CompareArgs, ExperimentArgs, ReportArgs};
use cpift_torch::device::DeviceChoice;
use cpift_torch::generate::Sampling;
use cpift_torch::weights::kind_of;
use tch::{Device, Kind};

use crate::prompt::PromptStyle;

/// Scores a checkpoint on every task of a task list, compares several checkpoints, and shows a whole run as one page.
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-eval", version)]
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
    /// Score one checkpoint: loss on every task, and each task's own metric
    ///
    /// Writes scores.json, outputs.jsonl (prompt, output, what was extracted, score and loss of each row) and cpift.json. All rows and
    /// settings of all tasks are checked before anything is scored.
    ///
    /// The loss on the reference answers, in nats a target token, and its perplexity are always there. `metric` of a task in tasks.toml
    /// adds: `exact-match`, `contains`, `rouge-l`, `gsm8k` and `codebleu` generate an answer; `choice` takes the option with the highest
    /// log-likelihood; `judge` generates for `cpift-eval judge`.
    ///
    /// The numbers of lm-evaluation-harness, 0-shot: cpift-eval run --model DIR --tasks tasks.toml --out scores --prompt harness
    ///
    /// With --few-shot the examples are others than the harness draws: such numbers are like its own, not the same.
    Run(RunArgs),
    /// Join the scores of one checkpoint on several tasks, made by several runs, into one folder
    ///
    /// Writes what one run over all of these tasks, with the arguments that theirs had, would have written: scores.json and
    /// outputs.jsonl with the tasks in the order of the folders. A judge's verdicts stay. Scores of another checkpoint (by its digest)
    /// and a task that is there twice are refused.
    ///
    /// For example, two jobs and what joins them: cpift-eval run --model M --tasks tasks.toml --only gsm8k --out parts/gsm8k; the
    /// same with logiqa; then cpift-eval join parts/gsm8k parts/logiqa --out scores
    Join(JoinArgs),
    /// Grade the answers to tasks with metric = "judge" from 1 to 10 by an OpenAI-compatible chat endpoint
    ///
    /// Asks the judge for one answer at a time, at temperature 0, reads `[[rating]]` in its reply, and writes mean, standard error and
    /// counts of what has no grade into RUN/scores.json. Until then such a task is `not judged`.
    #[command(after_help = JudgeArgs::EXAMPLES)]
    Judge(JudgeArgs),
    /// Compare several scores.json: checkpoints by tasks, the best in bold, with the Average Normalised Score
    ///
    /// Values are shown with one standard error; metrics in percent (more is better), losses in nats a token (less is better). With
    /// --baseline every difference is shown too, with a 95 % interval: rows of both outputs.jsonl are matched by task and row, and
    /// their differences drawn with replacement. Where rows cannot be matched the table says why. A task that waits for a judge shows
    /// "not judged". Runs on other evaluation files, templates or settings, or a scores.json of another version, are refused unless
    /// --force is given.
    ///
    /// For example: cpift-eval compare base=runs/mine/scores/base runs/mine/scores/cpi-ft --baseline base
    Compare(CompareArgs),
    /// Show an experiment over seeds: methods' means and standard deviations, or what they forget, with bootstrap intervals
    ///
    /// FILE lists, for each method, one scores folder a seed (kind scores), or pairs of tasks with the scores after the first and
    /// after the second (kind forgetting). Differences to its baseline have 95 % intervals: seeds, and for each task its rows, are
    /// drawn with replacement, the same for both methods. Scores on other evaluation files, templates or settings are refused unless
    /// --force is given. `report` shows all of RUN_DIR/experiments on its page.
    ///
    /// For example: cpift-eval experiment runs/mine/experiments/reproduce.json
    Experiment(ExperimentArgs),
    /// Write all of a run on one HTML page: experiments, scores, gains and losses, cores, losses, samples, provenance
    ///
    /// Reads experiments/NAME.json, scores/NAME (scores.json, outputs.jsonl), groups.json, masks/NAME.safetensors, metrics.jsonl of
    /// probes/NAME and of every model folder, and each cpift.json under RUN_DIR. What is not there is said on the page, which has
    /// experiments only where there are some. It is one file without scripts that opens from disk and loads nothing; the same files
    /// give the same bytes. Model outputs on it are shown as text, whatever they hold.
    Report(ReportArgs),
}

/// Arguments of `run`.
#[derive(clap::Args, Debug)]
pub struct RunArgs {
    /// The checkpoint: a Hugging Face folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The task list, tasks.toml
    #[arg(long, value_name = "FILE")]
    pub tasks: PathBuf,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Score these tasks only (names, separated by commas), in the order of tasks.toml [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Score the first N rows of each task only
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Rows in a batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch_size: usize,
    /// How a row becomes a prompt
    #[arg(long, value_name = "STYLE", value_enum, default_value_t = PromptStyle::Chat)]
    pub prompt: PromptStyle,
    /// Examples of the training file before every question, over the tasks' own few_shot; each row's are drawn by --seed
    #[arg(long, visible_alias = "fewshot", value_name = "N")]
    pub few_shot: Option<usize>,
    /// Sample with the logits divided by this; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Sample among the likeliest tokens only, as few as reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// Seed of the sampling and of the choice of examples
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Longest generated answer in tokens, over the tasks' own max_new_tokens
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// cpu, cuda, cuda:N, or auto: CUDA where there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Refuse fields of config.json that this program does not know, instead of a warning
    #[arg(long)]
    pub strict_config: bool,
    /// Element type of weights and arithmetic: f32 or bf16 [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_name = "TYPE")]
    pub compute_dtype: Option<Dtype>,
}

/// Arguments of `join`.
#[derive(clap::Args, Debug)]
pub struct JoinArgs {
    /// Folders that `cpift-eval run` wrote
    #[arg(required = true, value_name = "SCORES")]
    pub parts: Vec<PathBuf>,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

impl RunArgs {
    /// # Errors
    /// [`cpift_core::Usage`] for a value out of range.
    pub fn check(&self) -> anyhow::Result<()> {
        let counts = [Some(self.batch_size), self.limit, self.max_new_tokens];
        let problem = if counts.contains(&Some(0)) {
            "--batch-size, --limit and --max-new-tokens must be at least 1"
        } else if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            "--temperature must be 0 or above"
        } else if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            "--top-p must be above 0 and at most 1"
        } else if self.temperature == 0.0 && self.top_p < 1.0 {
            "--top-p has no effect without --temperature above 0"
        } else if !matches!(self.compute_dtype, None | Some(Dtype::F32 | Dtype::BF16)) {
            "--compute-dtype must be f32 or bf16"
        } else {
            return Ok(());
        };
        Err(usage(problem))
    }

    /// How tokens are chosen; `None`: the likeliest.
    pub fn sampling(&self) -> Option<Sampling> {
        let Self { temperature, top_p, seed, .. } = *self;
        (temperature > 0.0).then_some(Sampling { temperature, top_p, seed })
    }

    /// The element type on `device`.
    pub fn kind(&self, device: Device) -> Kind {
        match self.compute_dtype {
            Some(dtype) => kind_of(dtype),
            None if device.is_cuda() => Kind::BFloat16,
            None => Kind::Float,
        }
    }
}
