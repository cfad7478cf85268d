//! The arguments of `cpift-eval compare`, `experiment` and `report`.

use std::path::PathBuf;

/// Arguments of `compare`.
#[derive(clap::Args, Debug, Clone)]
pub struct CompareArgs {
    /// Folders with a scores.json (or such files); NAME=DIR names the row, which is the folder's name otherwise
    #[arg(required = true, value_name = "[NAME=]RUN")]
    pub runs: Vec<String>,
    /// Show every run's difference to this one, with a 95 % paired bootstrap interval over the rows of outputs.jsonl
    #[arg(long, value_name = "NAME")]
    pub baseline: Option<String>,
    /// Resamples of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub resamples: usize,
    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// How to write it: terminal (Markdown, with bold type instead of asterisks where stdout is a terminal), markdown, csv (one
    /// line a run and figure, unrounded), json, or html (one file, nothing loaded from elsewhere)
    #[arg(long, value_name = "FORMAT", default_value = "terminal", hide_possible_values = true)]
    pub format: Format,
    /// Write to this file instead of stdout
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// The form of a comparison or an experiment.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A Markdown table that lines up as text; bold where stdout is a terminal.
    Terminal,
    /// A Markdown table.
    Markdown,
    /// One line a run and figure.
    Csv,
    /// One JSON object.
    Json,
    /// One HTML page.
    Html,
}

/// Arguments of `experiment`.
#[derive(clap::Args, Debug, Clone)]
pub struct ExperimentArgs {
    /// The experiment: RUN_DIR/experiments/NAME.json; the scores folders it names are under RUN_DIR
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Resamples of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub resamples: usize,
    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// How to write it: terminal (Markdown, with bold type instead of asterisks where stdout is a terminal), markdown, csv (one
    /// line a row and figure, unrounded), json (with the values of every seed), or html (one file, nothing loaded from elsewhere)
    #[arg(long, value_name = "FORMAT", default_value = "terminal", hide_possible_values = true)]
    pub format: Format,
    /// Write to this file instead of stdout
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments of `report`.
#[derive(clap::Args, Debug, Clone)]
pub struct ReportArgs {
    /// The folder of a run as `make pipeline` lays it out: scores/, masks/, probes/, groups.json, the models' folders, and
    /// experiments/ where there are some
    #[arg(value_name = "RUN_DIR")]
    pub run: PathBuf,
    /// The page [default: RUN_DIR/report.html]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// The run the others are compared with: a folder's name under RUN_DIR/scores [default: base, where it was scored]
    #[arg(long, value_name = "NAME")]
    pub baseline: Option<String>,
    /// Sample outputs shown for each task
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub samples: usize,
    /// Resamples of the bootstrap behind the intervals
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub resamples: usize,
    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}
