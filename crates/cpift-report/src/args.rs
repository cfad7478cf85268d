//! The arguments of `cpift-eval compare`, `experiment` and `report`.

use std::path::PathBuf;

/// Arguments of `compare`.
#[derive(clap::Args, Debug, Clone)]
#[command(next_help_heading = "Input and output")]
pub struct CompareArgs {
    /// Directories with a scores.json, or such files; NAME= sets the name of the row [default: the
    /// directory's name]
    #[arg(required = true, value_name = "[NAME=]RUN")]
    pub runs: Vec<String>,
    /// Output format: terminal (Markdown, with bold type instead of asterisks if stdout is a
    /// terminal), markdown, csv (one line per run and figure, unrounded), json, or html (one file
    /// that loads nothing)
    #[arg(long, value_name = "FORMAT", default_value = "terminal", hide_possible_values = true)]
    pub format: Format,
    /// Output file [default: stdout]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Run that the others are compared with: adds every run's difference to it, with a 95 % paired
    /// bootstrap interval over the rows of outputs.jsonl [default: none]
    #[arg(long, value_name = "NAME", help_heading = "Method")]
    pub baseline: Option<String>,
    /// Bootstrap arguments.
    #[command(flatten)]
    pub bootstrap: BootstrapArgs,
}

/// Arguments of the bootstrap behind the intervals.
#[derive(clap::Args, Debug, Clone)]
pub struct BootstrapArgs {
    /// Number of resamples of the bootstrap, 1 to 1000000
    #[arg(long, value_name = "N", default_value_t = 10_000, help_heading = "Method")]
    pub resamples: usize,
    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Run")]
    pub seed: u64,
}

/// Output format of a comparison or an experiment.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A Markdown table that lines up as text; bold if stdout is a terminal.
    Terminal,
    /// A Markdown table.
    Markdown,
    /// One line per run and figure.
    Csv,
    /// One JSON object.
    Json,
    /// One HTML page.
    Html,
}

/// Arguments of `experiment`.
#[derive(clap::Args, Debug, Clone)]
#[command(next_help_heading = "Input and output")]
pub struct ExperimentArgs {
    /// The experiment: RUN_DIR/experiments/NAME.json; the scores directories that it names are
    /// under RUN_DIR
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Output format: terminal (Markdown, with bold type instead of asterisks if stdout is a
    /// terminal), markdown, csv (one line per row and figure, unrounded), json (with the values of
    /// every seed), or html (one file that loads nothing)
    #[arg(long, value_name = "FORMAT", default_value = "terminal", hide_possible_values = true)]
    pub format: Format,
    /// Output file [default: stdout]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Bootstrap arguments.
    #[command(flatten)]
    pub bootstrap: BootstrapArgs,
}

/// Arguments of `report`.
#[derive(clap::Args, Debug, Clone)]
#[command(next_help_heading = "Input and output")]
pub struct ReportArgs {
    /// Directory of a run as `make pipeline` lays it out: scores/, masks/, probes/, groups.json,
    /// the models' directories, and experiments/ if there are any
    #[arg(value_name = "RUN_DIR")]
    pub run: PathBuf,
    /// The page [default: RUN_DIR/report.html]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Number of sample outputs per task
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub samples: usize,
    /// Run that the others are compared with, by its directory's name under RUN_DIR/scores
    /// [default: base, if it was scored]
    #[arg(long, value_name = "NAME", help_heading = "Method")]
    pub baseline: Option<String>,
    /// Bootstrap arguments.
    #[command(flatten)]
    pub bootstrap: BootstrapArgs,
}

#[cfg(test)]
mod tests {
    use clap::Args;

    use super::*;

    #[test]
    fn every_argument_has_a_heading() {
        let command = || clap::Command::new("command");
        for command in [
            CompareArgs::augment_args(command()),
            ExperimentArgs::augment_args(command()),
            ReportArgs::augment_args(command()),
        ] {
            assert!(command.get_arguments().count() > 4);
            for arg in command.get_arguments() {
                let heading = arg.get_help_heading();
                let known = ["Input and output", "Method", "Run"];
                assert!(heading.is_some_and(|h| known.contains(&h)), "{}: {heading:?}", arg.get_id());
            }
        }
    }
}
