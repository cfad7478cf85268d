//! The command line of cpift-eval.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use cpift_core::cli::Common;
use cpift_judge::JudgeArgs;
use cpift_torch::device::DeviceChoice;

/// Scores a checkpoint on every task of a task list, and compares the scores of several checkpoints.
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
    /// log-likelihood; `judge` generates for `cpift-eval judge`; `nll` is the loss alone, in nats a target token.
    Run(RunArgs),
    /// Grade the answers to tasks with metric = "judge" from 1 to 10 by an OpenAI-compatible chat endpoint
    ///
    /// Asks the judge for one answer at a time, at temperature 0, reads `[[rating]]` in its reply, and writes mean, standard error and
    /// counts of what has no grade into RUN/scores.json. Until then such a task is `not judged`.
    #[command(after_help = JudgeArgs::EXAMPLES)]
    Judge(JudgeArgs),
    /// Print a table of several scores.json: checkpoints by tasks, with the Average Normalised Score
    Compare(CompareArgs),
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

/// Arguments of `compare`.
#[derive(clap::Args, Debug)]
pub struct CompareArgs {
    /// Folders with a scores.json (or such files); NAME=DIR names the row
    #[arg(required = true, value_name = "[NAME=]DIR")]
    pub runs: Vec<String>,
}
