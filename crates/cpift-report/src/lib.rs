//! Scores compared, and a whole run as one page: what `cpift-eval compare`, `experiment` and `report` do. Without libtorch.

mod args;
mod bootstrap;
mod chart;
mod comparison;
mod experiment;
mod html;
mod outputs;
mod page;
mod pairing;
mod runs;
mod text;
mod unit;

pub use args::{CompareArgs, ExperimentArgs, Format, ReportArgs};
pub use comparison::{Comparison, Question};
pub use unit::{ANS_FORMULA, Unit};

use std::io::IsTerminal;
use std::path::Path;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::{check_not_input, check_output, write_text};
use cpift_core::run::cli::{Common, print};

use experiment::Experiment;
use text::Bold;

/// Runs `cpift-eval compare`.
///
/// # Errors
/// [`cpift_core::Usage`] for arguments that make no sense; [`cpift_core::BadInput`] when a run cannot be read or compared, or the
/// output exists.
pub fn compare(args: &CompareArgs, common: &Common) -> Result<()> {
    if common.json && !matches!(args.format, Format::Terminal | Format::Json) {
        return Err(usage("--json and --format name different forms"));
    }
    if let Some(out) = &args.out {
        check_output(out, common.force())?;
    }
    let runs = runs::read_all(&args.runs, common.force())?;
    if let Some(out) = &args.out {
        check_not_input("--out", out, runs.iter().map(|run| run.path.as_path()))?;
    }
    let question = Question { baseline: args.baseline.clone(), resamples: args.resamples, seed: args.seed };
    let comparison = Comparison::new(runs, question)?;
    let text = match args.format {
        _ if common.json => format!("{}\n", text::json(&comparison)),
        Format::Terminal => text::markdown(&comparison, bold(args.out.as_deref())),
        Format::Markdown => text::markdown(&comparison, Bold::Markdown),
        Format::Csv => text::csv(&comparison),
        Format::Json => format!("{}\n", text::json(&comparison)),
        Format::Html => page::compared(&comparison),
    };
    show(args.out.as_deref(), &text, common)
}

/// Runs `cpift-eval experiment`.
///
/// # Errors
/// As [`compare`].
pub fn experiment(args: &ExperimentArgs, common: &Common) -> Result<()> {
    if common.json && !matches!(args.format, Format::Terminal | Format::Json) {
        return Err(usage("--json and --format name different forms"));
    }
    if let Some(out) = &args.out {
        check_output(out, common.force())?;
        check_not_input("--out", out, [args.file.as_path()])?;
    }
    let question = Question { baseline: None, resamples: args.resamples, seed: args.seed };
    let experiment = Experiment::read(&args.file, question, common.force())?;
    let text = match args.format {
        _ if common.json => format!("{}\n", experiment::json(&experiment)),
        Format::Terminal => experiment::markdown(&experiment, bold(args.out.as_deref())),
        Format::Markdown => experiment::markdown(&experiment, Bold::Markdown),
        Format::Csv => experiment::csv(&experiment),
        Format::Json => format!("{}\n", experiment::json(&experiment)),
        Format::Html => page::experiment(&experiment),
    };
    show(args.out.as_deref(), &text, common)
}

/// Bold type where a person reads it from a terminal.
fn bold(out: Option<&Path>) -> Bold {
    let terminal = out.is_none() && std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if terminal { Bold::Terminal } else { Bold::Markdown }
}

fn show(out: Option<&Path>, text: &str, common: &Common) -> Result<()> {
    match out {
        Some(out) => write_text(out, text, common.force()),
        None => {
            print(text);
            Ok(())
        }
    }
}

/// Runs `cpift-eval report`.
///
/// # Errors
/// [`cpift_core::BadInput`] when the folder is none of a run or the page exists; what is missing or unreadable inside is said on the
/// page.
pub fn report(args: &ReportArgs, common: &Common) -> Result<()> {
    let out = args.out.clone().unwrap_or_else(|| args.run.join("report.html"));
    check_output(&out, common.force())?;
    write_text(&out, &page::render(args)?, common.force())?;
    log::info!("wrote {}", out.display());
    common.print_json(&serde_json::json!({"out": out.display().to_string()}));
    Ok(())
}
