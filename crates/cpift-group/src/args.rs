//! The command line of `cpift-group`.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use cpift_core::format::names::TensorKind;
use cpift_core::run::cli::{Common, Named};

/// Groups tasks whose core regions overlap, and puts the groups in training order.
///
/// Tasks are joined where the Jaccard similarity of their core regions is at least τ; the groups
/// are the connected components. `--partition kind` and `random` make the groups of the multi-stage
/// baselines instead; the masks are read and compared all the same. Writes groups.json with a heat
/// map of the similarities, and the similarities of each layer with a heat map.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-group", version)]
pub struct Args {
    /// The core region of a task, as cpift-mask wrote it; once for each task, in the order of the
    /// matrix
    #[arg(long = "mask", value_name = "NAME=FILE", required = true)]
    pub masks: Vec<Named>,
    /// Similarity from which tasks share a group: a number, or `auto` for the middle of the longest
    /// interval of τ whose partition does not change and is neither one group nor every task alone.
    /// 0 gives one group; above 1 every task is alone
    #[arg(long, value_name = "TAU", default_value = "0.1", allow_negative_numbers = true)]
    pub tau: Tau,
    /// How the groups are made
    #[arg(long, value_enum, default_value_t = Parts::Overlap)]
    pub partition: Parts,
    /// tasks.toml in which every task has a `kind` (--partition kind)
    #[arg(long, value_name = "FILE")]
    pub tasks: Option<PathBuf>,
    /// Number of groups, 1 to the number of tasks (--partition random)
    #[arg(long, value_name = "K")]
    pub groups: Option<usize>,
    /// Another groups.json of the same tasks, whose groups and order are taken over (--partition
    /// like)
    #[arg(long, value_name = "FILE")]
    pub like: Option<PathBuf>,
    /// Order of the groups; --partition like has its own
    #[arg(long, value_enum, default_value_t = Method::Random)]
    pub order: Method,
    /// Seed of --order random and of --partition random
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// groups.json to write
    #[arg(long, value_name = "FILE", required_unless_present = "sweep")]
    pub out: Option<PathBuf>,
    /// Heat map to write; --out with the extension .svg when not given
    #[arg(long, value_name = "FILE", requires = "out")]
    pub svg: Option<PathBuf>,
    /// Similarities of each layer to write; --out with the extension .layers.json when not given
    #[arg(long, value_name = "FILE", requires = "out")]
    pub layers: Option<PathBuf>,
    /// Heat map of pairs by layers to write; --out with the extension .layers.svg when not given
    #[arg(long, value_name = "FILE", requires = "out")]
    pub layers_svg: Option<PathBuf>,
    /// Print the groups for every τ where they change, with marks at the one --tau auto takes and
    /// the one of --tau; without --out nothing is written
    #[arg(long)]
    pub sweep: bool,
    /// Kinds of tensors to leave out of the comparison: embeddings, norms
    #[arg(long, value_name = "KIND,…", value_delimiter = ',')]
    pub exclude: Vec<TensorKind>,
    /// scores.json of the base model on all tasks (--order difficulty, and dependency with
    /// --probe-scores)
    #[arg(long, value_name = "FILE")]
    pub scores: Option<PathBuf>,
    /// TOML of `[[edge]]` tables with `before` and `after`, each a task's name (--order dependency)
    #[arg(long, value_name = "FILE", conflicts_with = "probe_scores")]
    pub edges: Option<PathBuf>,
    /// Folder with the scores.json of every probe on all tasks, as TASK/scores.json or TASK.json
    /// (--order dependency)
    #[arg(long, value_name = "DIR", requires = "scores")]
    pub probe_scores: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "a doc comment here would become the command's help")]
    pub common: Common,
}

/// The similarity threshold as typed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tau {
    /// This value.
    Fixed(f64),
    /// The most stable partition's.
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

/// How the groups are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Parts {
    /// Tasks whose core regions overlap, by --tau (the paper)
    Overlap,
    /// Tasks of one `kind` in tasks.toml (--tasks): the multi-stage baseline by hand
    Kind,
    /// A shuffle of the tasks by --seed, cut into --groups groups of nearly equal size: the random
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

/// How the groups are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// A seeded shuffle (the paper)
    Random,
    /// The group whose core overlaps the others' least goes first
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
