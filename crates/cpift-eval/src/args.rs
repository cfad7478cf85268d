//! The command line of cpift-eval.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use cpift_core::cli::Common;
use cpift_report::{CompareArgs, ReportArgs};
use cpift_torch::device::DeviceChoice;

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
    /// Writes scores.json, outputs.jsonl (what was generated for each row, what was extracted, the score) and cpift.json. Metrics of
    /// tasks.toml: `exact-match` and `gsm8k` generate greedily from the chat prompt; `choice` takes the letter with the highest
    /// log-likelihood; `nll` is the loss alone, in nats a target token.
    Run(RunArgs),
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
    /// Write all of a run on one HTML page: scores, gains and losses, cores, losses, samples, provenance
    ///
    /// Reads scores/NAME (scores.json, outputs.jsonl), groups.json, masks/NAME.safetensors, metrics.jsonl of probes/NAME and of every
    /// model folder, and each cpift.json under RUN_DIR. What is not there is said on the page. The page is one file without scripts that
    /// opens from disk and loads nothing; the same files give the same bytes. Model outputs on it are shown as text, whatever they hold.
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
    /// Score these tasks only (names, separated by commas) [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Score the first N rows of each task only
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Rows in a batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch_size: usize,
    /// Longest generated answer in tokens, over the tasks' own max_new_tokens
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// cpu, cuda, cuda:N, or auto: CUDA where there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
}
