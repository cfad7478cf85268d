//! The command line of cpift-eval.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use cpift_core::Dtype;
use cpift_core::error::usage;
use cpift_core::run::cli::Common;
use cpift_judge::JudgeArgs;
use cpift_report::{CompareArgs, ExperimentArgs, ReportArgs};
use cpift_torch::generate::Sampling;
use cpift_torch::placement::DeviceChoice;
use cpift_torch::session::set_strict_config;
use cpift_torch::weights::kind_of;
use cpift_torch::workers::Workers;
use tch::{Device, Kind};

use crate::metrics;
use crate::prompt::PromptStyle;

/// Scores a checkpoint on every task of a task list, compares checkpoints, and reports on a whole
/// run
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-eval", version)]
pub struct Args {
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
    /// Arguments shared by all stages.
    #[command(flatten)]
    pub common: Common,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Score one checkpoint: the loss on every task, and each task's own metric
    ///
    /// Writes scores.json, outputs.jsonl (per row: prompt, output, extracted text, score and loss)
    /// and cpift.json. All rows and settings of all tasks are checked before any task is scored.
    ///
    /// Every task gets the loss on its reference answers, in nats per target token, and its
    /// perplexity. `metric` in tasks.toml adds one of the metrics below.
    ///
    /// Figures of lm-evaluation-harness, 0-shot: cpift-eval run --model DIR --tasks tasks.toml
    /// --out scores --prompt harness. With --few-shot the examples differ from those that the
    /// harness draws, so the figures are comparable but not equal.
    #[command(after_long_help = metrics::table())]
    Run(RunArgs),
    /// Join the scores of one checkpoint on several tasks, made by several runs, into one directory
    ///
    /// Writes the scores.json and outputs.jsonl that one run over all of these tasks with the same
    /// arguments would have written, with the tasks in the order of the directories. A judge's
    /// verdicts are kept. Scores of another checkpoint (by digest) and tasks scored twice are
    /// refused.
    ///
    /// For example, two jobs and their join: cpift-eval run --model M --tasks tasks.toml --only
    /// gsm8k
    /// --out parts/gsm8k; the same for logiqa; then cpift-eval join parts/gsm8k parts/logiqa --out
    /// scores
    Join(JoinArgs),
    /// Grade the answers to tasks with metric = "judge" from 1 to 10 with an OpenAI-compatible chat
    /// endpoint
    ///
    /// Asks the judge about one answer per request, at temperature 0, reads `[[rating]]` in its
    /// reply, and writes the mean, its standard error and the number of verdicts without a grade
    /// into RUN/scores.json. Until then such a task is `not judged`.
    #[command(after_help = JudgeArgs::EXAMPLES)]
    Judge(JudgeArgs),
    /// Write rows that the model makes itself, to replay them while it learns another task
    /// (cpift-train run --add)
    ///
    /// With --tasks the model answers the prompts of the tasks' training rows (their own answers
    /// are not used); without, it writes whole conversations from its chat template alone. Samples
    /// that reach --max-new-tokens before the end of turn, and empty ones, are left out. The output
    /// has one JSON object with `messages` per line.
    ///
    /// For example: cpift-eval sample --model tuned --tasks tasks.toml --only gsm8k --out
    /// replay.jsonl
    Sample(SampleArgs),
    /// Measure how far a model's predictions have moved from another's: the Kullback-Leibler
    /// divergence in nats per target token
    ///
    /// KL(reference || model) over the vocabulary at every target token of the evaluation rows; the
    /// mean over a row's tokens, then over rows, with its standard error. Its size on a new task's
    /// rows predicts what a fine-tune forgets (arXiv 2509.04259).
    Divergence(DivergenceArgs),
    /// Compare several scores.json: checkpoints by tasks, the best in bold, with the Average
    /// Normalised Score
    ///
    /// Values are shown with one standard error: metrics in percent (higher is better), losses in
    /// nats per token (lower is better). With --baseline, differences are shown with 95 % intervals
    /// from a paired bootstrap: rows of both outputs.jsonl are matched by task and row, and
    /// resampled. If rows cannot be matched, the table gives the reason. A task without verdicts
    /// shows "not judged". Runs with different evaluation files, templates or settings, or a
    /// scores.json of another version, are refused without --force.
    ///
    /// For example: cpift-eval compare base=runs/mine/scores/base runs/mine/scores/cpi-ft
    /// --baseline base
    Compare(CompareArgs),
    /// Show an experiment over seeds: means and standard deviations of methods, or forgetting, with
    /// bootstrap intervals
    ///
    /// FILE lists, per method, one scores directory per seed (kind scores), or pairs of tasks with
    /// the scores after the first and after the second (kind forgetting). Differences to the
    /// baseline have 95 % intervals: seeds, and for each task its rows, are resampled, the same for
    /// both methods. Scores with different evaluation files, templates or settings are refused
    /// without --force. `report` includes all of RUN_DIR/experiments.
    ///
    /// For example: cpift-eval experiment runs/mine/experiments/reproduce.json
    Experiment(ExperimentArgs),
    /// Write an HTML report of a run: experiments, scores, differences, core regions, losses,
    /// samples, provenance
    ///
    /// Reads experiments/NAME.json, scores/NAME (scores.json, outputs.jsonl), groups.json,
    /// masks/NAME.safetensors, metrics.jsonl of probes/NAME and of every model directory, and each
    /// cpift.json under RUN_DIR. The page names missing files. It is one file without scripts that
    /// loads nothing; the same files give the same bytes. Model outputs are shown as plain text.
    Report(ReportArgs),
}

/// Arguments of `run`.
#[derive(clap::Args, Debug)]
pub struct RunArgs {
    /// The checkpoint: a Hugging Face directory, or org/name[@revision] on the Hub
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    pub model: PathBuf,
    /// The task list, tasks.toml
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    pub tasks: PathBuf,
    /// Output directory
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    pub out: PathBuf,
    /// Style of the prompts
    #[arg(
        long,
        value_name = "STYLE",
        value_enum,
        default_value_t = PromptStyle::Chat,
        help_heading = "Method"
    )]
    pub prompt: PromptStyle,
    /// Examples from the training file before every question, drawn per row with --seed [default:
    /// few_shot of the task]
    #[arg(long, visible_alias = "fewshot", value_name = "N", help_heading = "Method")]
    pub few_shot: Option<usize>,
    /// Sampling temperature; 0 for greedy decoding
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Method")]
    pub temperature: f64,
    /// Nucleus sampling: sample from the most likely tokens with at least this total probability
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Method")]
    pub top_p: f64,
    /// Maximum length of a generated answer in tokens [default: max_new_tokens of the task]
    #[arg(long, value_name = "N", help_heading = "Method")]
    pub max_new_tokens: Option<usize>,
    /// Score only these tasks (comma-separated names), in the order of tasks.toml [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',', help_heading = "Data")]
    pub only: Vec<String>,
    /// Score only the first N rows of each task [default: all]
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub limit: Option<usize>,
    /// Leave out the first N rows of each task, which --limit does not count
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Data")]
    pub skip: usize,
    /// Arguments of the inference.
    #[command(flatten)]
    pub inference: InferenceArgs,
    /// Seed of the sampling and of the choice of examples
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Run")]
    pub seed: u64,
}

/// Arguments of every command that runs a model.
#[derive(clap::Args, Debug)]
pub struct InferenceArgs {
    /// Refuse unknown fields of config.json instead of warning
    #[arg(long, help_heading = "Input and output")]
    pub strict_config: bool,
    /// Rows per batch; when an answer ends, the next row takes its place
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Memory and speed")]
    pub batch_size: usize,
    /// Element type of weights and arithmetic: f32 or bf16 [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_name = "TYPE", help_heading = "Memory and speed")]
    pub compute_dtype: Option<Dtype>,
    /// cpu, cuda, cuda:N, or auto: CUDA if available
    #[arg(long, value_name = "DEVICE", default_value = "auto", help_heading = "Run")]
    pub device: DeviceChoice,
}

/// Arguments of `sample`.
#[derive(clap::Args, Debug)]
pub struct SampleArgs {
    /// The checkpoint: a Hugging Face directory, or org/name[@revision] on the Hub
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    pub model: PathBuf,
    /// Task list, tasks.toml, with the rows to answer [default: whole conversations]
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    pub tasks: Option<PathBuf>,
    /// File to write, JSON lines
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    pub out: PathBuf,
    /// Sampling temperature
    #[arg(long, value_name = "T", default_value_t = 1.0, help_heading = "Method")]
    pub temperature: f64,
    /// Nucleus sampling: sample from the most likely tokens with at least this total probability
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Method")]
    pub top_p: f64,
    /// Maximum length of a turn in tokens [default: max_new_tokens of the task; 256 without tasks]
    #[arg(long, value_name = "N", help_heading = "Method")]
    pub max_new_tokens: Option<usize>,
    /// Only these tasks (comma-separated names) [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "tasks", help_heading = "Data")]
    pub only: Vec<String>,
    /// Samples of each task, at most one per row; without tasks, of conversations
    #[arg(long, value_name = "N", default_value_t = 200, help_heading = "Data")]
    pub rows: usize,
    /// Arguments of the inference.
    #[command(flatten)]
    pub inference: InferenceArgs,
    /// Seed of the sampling
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Run")]
    pub seed: u64,
}

/// Arguments of `divergence`.
#[derive(clap::Args, Debug)]
pub struct DivergenceArgs {
    /// The checkpoint whose predictions are compared: a Hugging Face directory, or
    /// org/name[@revision] on the Hub
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    pub model: PathBuf,
    /// The checkpoint to compare with, of the same architecture
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    pub reference: PathBuf,
    /// The task list, tasks.toml
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    pub tasks: PathBuf,
    /// JSON file to write
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    pub out: PathBuf,
    /// Only these tasks (comma-separated names) [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',', help_heading = "Data")]
    pub only: Vec<String>,
    /// Only the first N rows of each task [default: all]
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub limit: Option<usize>,
    /// Arguments of the inference.
    #[command(flatten)]
    pub inference: InferenceArgs,
}

/// Arguments of `join`.
#[derive(clap::Args, Debug)]
pub struct JoinArgs {
    /// Directories written by `cpift-eval run`
    #[arg(required = true, value_name = "SCORES")]
    pub parts: Vec<PathBuf>,
    /// Output directory
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    pub out: PathBuf,
}

impl InferenceArgs {
    /// Checks the values, starts the ranks of the job and runs `work` on each.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for a value out of range; an error of `work` or of another rank.
    pub(crate) fn on_ranks(&self, common: &Common, work: impl FnOnce(&Workers) -> Result<()>) -> Result<()> {
        if self.batch_size == 0 {
            return Err(usage("--batch-size must be at least 1"));
        }
        if !matches!(self.compute_dtype, None | Some(Dtype::F32 | Dtype::BF16)) {
            return Err(usage("--compute-dtype must be f32 or bf16"));
        }
        set_strict_config(self.strict_config);
        let workers = Workers::for_inference(self.device, common)?;
        let result = work(&workers);
        workers.finish(result)
    }

    /// Element type of weights and arithmetic on `device`.
    pub(crate) fn kind(&self, device: Device) -> Kind {
        match self.compute_dtype {
            Some(dtype) => kind_of(dtype),
            None if device.is_cuda() => Kind::BFloat16,
            None => Kind::Float,
        }
    }
}

impl RunArgs {
    /// Checks the ranges of the values.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for a value out of range.
    pub(crate) fn check(&self) -> Result<()> {
        let problem = if [self.limit, self.max_new_tokens].contains(&Some(0)) {
            "--limit and --max-new-tokens must be at least 1"
        } else if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            "--temperature must be 0 or above"
        } else if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            "--top-p must be above 0 and at most 1"
        } else if self.temperature == 0.0 && self.top_p < 1.0 {
            "--top-p has no effect without --temperature above 0"
        } else {
            return Ok(());
        };
        Err(usage(problem))
    }

    /// Sampling of tokens; `None` for greedy decoding.
    pub(crate) fn sampling(&self) -> Option<Sampling> {
        let Self { temperature, top_p, seed, .. } = *self;
        (temperature > 0.0).then_some(Sampling { temperature, top_p, seed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_option_has_a_help_heading() {
        let command = Args::command();
        for name in ["run", "join", "judge", "sample", "divergence"] {
            let subcommand = command.find_subcommand(name).unwrap();
            for option in subcommand.get_opts().filter(|option| !option.is_global_set()) {
                assert!(option.get_help_heading().is_some(), "{name}: {}", option.get_id());
            }
        }
    }
}
