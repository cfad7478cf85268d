//! The command line of `cpift-group`.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use cpift_core::format::names::TensorKind;
use cpift_core::run::cli::{Common, Named};

/// Headings of `--help`.
const IO: &str = "Input and output";
const METHOD: &str = "Method";

/// Groups tasks whose core regions overlap, and puts the groups in training order.
///
/// Two tasks are joined if the Jaccard similarity of their core regions is at least τ; the groups
/// are the connected components. `--partition kind` and `random` make the groups of the multi-stage
/// baselines instead; the masks are still read and compared. Writes groups.json and the
/// similarities of each layer, each with a heat map.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-group", version)]
pub struct Args {
    /// Core region of a task, written by cpift-mask; once per task, in the order of the matrix
    /// (required)
    #[arg(long = "mask", value_name = "NAME=FILE", required = true, help_heading = IO)]
    pub masks: Vec<Named>,
    /// groups.json to write (required without --sweep)
    #[arg(long, value_name = "FILE", required_unless_present = "sweep", help_heading = IO)]
    pub out: Option<PathBuf>,
    /// Heat map to write [default: --out with the extension .svg]
    #[arg(long, value_name = "FILE", requires = "out", help_heading = IO)]
    pub svg: Option<PathBuf>,
    /// Similarities of each layer to write [default: --out with the extension .layers.json]
    #[arg(long, value_name = "FILE", requires = "out", help_heading = IO)]
    pub layers: Option<PathBuf>,
    /// Heat map of pairs by layers to write [default: --out with the extension .layers.svg]
    #[arg(long, value_name = "FILE", requires = "out", help_heading = IO)]
    pub layers_svg: Option<PathBuf>,
    /// Print the groups for every interval of τ on stdout, with the interval of --tau auto and the
    /// one of --tau marked; writes no file without --out
    #[arg(long, help_heading = IO)]
    pub sweep: bool,
    /// Jaccard similarity from which two tasks share a group: a number from 0, or `auto` for the
    /// middle of the longest interval of τ in which the groups do not change and are neither one
    /// group nor all single tasks. 0 gives one group; above 1 every task is alone
    #[arg(long, value_name = "TAU", default_value = "0.1", allow_negative_numbers = true, help_heading = METHOD)]
    pub tau: Tau,
    /// Kinds of tensors to leave out of the comparison: embeddings, norms [default: none]
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', help_heading = METHOD)]
    pub exclude: Vec<TensorKind>,
    /// Method of making groups
    #[arg(long, value_enum, default_value_t = Parts::Overlap, help_heading = METHOD)]
    pub partition: Parts,
    /// tasks.toml in which every task has a `kind` (for --partition kind)
    #[arg(long, value_name = "FILE", help_heading = METHOD)]
    pub tasks: Option<PathBuf>,
    /// Number of groups, 1 to the number of tasks (for --partition random)
    #[arg(long, value_name = "K", help_heading = METHOD)]
    pub groups: Option<usize>,
    /// Another groups.json of the same tasks, whose groups and order are used (for --partition
    /// like)
    #[arg(long, value_name = "FILE", help_heading = METHOD)]
    pub like: Option<PathBuf>,
    /// Order of the groups; --partition like keeps the order of its file
    #[arg(long, value_enum, default_value_t = Method::Random, help_heading = METHOD)]
    pub order: Method,
    /// scores.json of the base model on all tasks (for --order difficulty, and for --order
    /// dependency with --probe-scores)
    #[arg(long, value_name = "FILE", help_heading = METHOD)]
    pub scores: Option<PathBuf>,
    /// TOML of `[[edge]]` tables with `before` and `after`, each the name of a task (for --order
    /// dependency)
    #[arg(long, value_name = "FILE", conflicts_with = "probe_scores", help_heading = METHOD)]
    pub edges: Option<PathBuf>,
    /// Directory with the scores.json of every probe on all tasks, as TASK/scores.json or TASK.json
    /// (for --order dependency)
    #[arg(long, value_name = "DIR", requires = "scores", help_heading = METHOD)]
    pub probe_scores: Option<PathBuf>,
    /// Seed of --order random and of --partition random
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Run")]
    pub seed: u64,
    #[command(flatten)]
    #[allow(missing_docs, reason = "a doc comment here would become the command's help")]
    pub common: Common,
}

/// The similarity threshold as typed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tau {
    /// A value.
    Fixed(f64),
    /// The τ of the most stable partition.
    Auto,
}

impl FromStr for Tau {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        match text.parse::<f64>() {
            Ok(tau) if tau >= 0.0 && tau.is_finite() => Ok(Self::Fixed(tau)),
            Ok(_) => Err("τ must be a finite number, 0 or above".to_owned()),
            Err(_) => Err(format!("expected a number or auto, found {text:?}")),
        }
    }
}

/// Method of making groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Parts {
    /// Tasks whose core regions overlap, by --tau (the paper)
    Overlap,
    /// Tasks of one `kind` in tasks.toml (--tasks): the multi-stage baseline by hand
    Kind,
    /// The tasks shuffled by --seed and cut into --groups groups of nearly equal size: the random
    /// multi-stage baseline
    Random,
    /// The groups of another groups.json (--like), for other masks: a control that differs in the
    /// masks alone
    Like,
}

impl Parts {
    /// The name as typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Overlap => "overlap",
            Self::Kind => "kind",
            Self::Random => "random",
            Self::Like => "like",
        }
    }
}

/// Method of ordering groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// A seeded shuffle (the paper)
    Random,
    /// The group whose core region overlaps the others' least goes first
    Overlap,
    /// Easy to hard, by the base model's mean loss on the group's tasks (--scores)
    Difficulty,
    /// Groups that help others go first (--edges, or --probe-scores with --scores)
    Dependency,
}

impl Method {
    /// The name as typed and recorded.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Overlap => "overlap",
            Self::Difficulty => "difficulty",
            Self::Dependency => "dependency",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, CommandFactory};

    use super::*;

    #[test]
    fn every_flag_of_the_stage_has_a_heading() {
        let common = Common::augment_args(clap::Command::new("common"));
        let own = |arg: &&clap::Arg| common.get_arguments().all(|other| other.get_id() != arg.get_id());
        for arg in Args::command().get_arguments().filter(own) {
            let heading = arg.get_help_heading();
            assert!(heading.is_some_and(|h| [IO, METHOD, "Run"].contains(&h)), "{}: {heading:?}", arg.get_id());
        }
    }
}
