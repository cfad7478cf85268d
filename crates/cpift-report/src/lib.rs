//! The commands `cpift-eval compare`, `experiment` and `report`: scores of several checkpoints side
//! by side, experiments over seeds, and a whole run as one page. Needs no libtorch.
//!
//! `runs` reads scores, `comparison` and `experiment` compare them with intervals from `bootstrap`,
//! `tables` writes both as text, and `pages` as pages, from the building blocks of `html`; `sheet`
//! has the tables of experiments, the same for both.

mod args;
mod bootstrap;
mod comparison;
mod experiment;
mod experiment_file;
mod html;
mod pages;
mod runs;
mod sheet;
mod tables;

pub use args::{CompareArgs, ExperimentArgs, Format, ReportArgs};

use std::io::IsTerminal;
use std::path::Path;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::{StagedFile, check_not_input, check_output, write_text};
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::Scores;
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::{Common, print};

use comparison::{Comparison, Question};
use experiment::Experiment;
use tables::Bold;

/// Program whose commands these are, in records.
const STAGE: &str = "cpift-eval";

/// Runs `cpift-eval compare`.
///
/// # Errors
/// [`cpift_core::Usage`] for contradictory arguments; [`cpift_core::BadInput`] when a run cannot be
/// read or compared, or the output exists.
pub fn compare(args: &CompareArgs, common: &Common) -> Result<()> {
    if common.json && !matches!(args.format, Format::Terminal | Format::Json) {
        return Err(usage("--json and --format name different formats"));
    }
    let mut recorder = Recorder::start(STAGE);
    if let Some(out) = &args.out {
        if common.up_to_date(&Expected::new(STAGE, out)) {
            return Ok(());
        }
        check_output(out, common.force())?;
    }
    let runs = runs::read_all(&args.runs, common.force)?;
    if let Some(out) = &args.out {
        check_not_input("--out", out, runs.iter().map(|run| run.path.as_path()))?;
        for run in &runs {
            let scores = Scores::file(&run.path);
            recorder.input(format!("scores:{}", run.name), &scores, Digest::of_file(&scores)?);
        }
    }
    let question =
        Question { baseline: args.baseline.clone(), resamples: args.bootstrap.resamples, seed: args.bootstrap.seed };
    let comparison = Comparison::new(runs, question)?;
    let text = match args.format {
        _ if common.json => format!("{}\n", tables::comparison_json(&comparison)),
        Format::Terminal => tables::comparison_markdown(&comparison, bold(args.out.as_deref())),
        Format::Markdown => tables::comparison_markdown(&comparison, Bold::Markdown),
        Format::Csv => tables::comparison_csv(&comparison),
        Format::Json => format!("{}\n", tables::comparison_json(&comparison)),
        Format::Html => pages::compared(&comparison),
    };
    match &args.out {
        Some(out) => write(out, &text, recorder, common),
        None => show(None, &text, common),
    }
}

/// Runs `cpift-eval experiment`.
///
/// # Errors
/// As [`compare`].
pub fn experiment(args: &ExperimentArgs, common: &Common) -> Result<()> {
    if common.json && !matches!(args.format, Format::Terminal | Format::Json) {
        return Err(usage("--json and --format name different formats"));
    }
    if let Some(out) = &args.out {
        check_output(out, common.force())?;
        check_not_input("--out", out, [args.file.as_path()])?;
    }
    let question = Question { baseline: None, resamples: args.bootstrap.resamples, seed: args.bootstrap.seed };
    let experiment = Experiment::read(&args.file, question, common.force())?;
    let text = match args.format {
        _ if common.json => format!("{}\n", tables::experiment_json(&experiment)),
        Format::Terminal => tables::experiment_markdown(&experiment, bold(args.out.as_deref())),
        Format::Markdown => tables::experiment_markdown(&experiment, Bold::Markdown),
        Format::Csv => tables::experiment_csv(&experiment),
        Format::Json => format!("{}\n", tables::experiment_json(&experiment)),
        Format::Html => pages::experiment(&experiment),
    };
    show(args.out.as_deref(), &text, common)
}

/// Bold type if the output goes to a terminal.
fn bold(out: Option<&Path>) -> Bold {
    let terminal = out.is_none() && std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if terminal { Bold::Terminal } else { Bold::Markdown }
}

/// Writes `text` to `out`, with its record beside it.
fn write(out: &Path, text: &str, recorder: Recorder, common: &Common) -> Result<()> {
    recorder.commit(StagedFile::of_text(out, text, common.force())?.into_path(), &[])
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
/// [`cpift_core::BadInput`] when the directory is not one of a run, or the page exists. Missing and
/// unreadable parts of the run are reported on the page.
pub fn report(args: &ReportArgs, common: &Common) -> Result<()> {
    let out = args.out.clone().unwrap_or_else(|| args.run.join("report.html"));
    let mut recorder = Recorder::start(STAGE);
    if common.up_to_date(&Expected::new(STAGE, &out)) {
        return Ok(());
    }
    check_output(&out, common.force())?;
    // The page follows every artifact of the run: each has a record, which names when it was made.
    let added = Some(args.run.join(pages::ADDED)).filter(|file| file.exists());
    for file in pages::record_files(&args.run, &out)?.into_iter().chain(added) {
        let role = file.strip_prefix(&args.run).unwrap_or(&file).display().to_string();
        recorder.input(role, &file, Digest::of_file(&file)?);
    }
    write(&out, &pages::render(args, &out)?, recorder, common)?;
    log::info!("wrote {}", out.display());
    common.print_json(&serde_json::json!({"out": out.display().to_string()}));
    Ok(())
}
