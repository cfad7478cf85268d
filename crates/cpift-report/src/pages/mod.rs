//! report.html: the results of a run on one page that opens from disk; and comparisons and
//! experiments as pages of their own.

mod added;
mod cores;
mod experiments;
mod folder;
mod scores;
mod training;

use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use maud::{Markup, html};

use crate::args::ReportArgs;
use crate::comparison::{Comparison, Question};
use crate::html::{missing, page, section};
use crate::sheet::counted;

pub(crate) use added::FILE_NAME as ADDED;
pub(crate) use experiments::alone as experiment;
pub(crate) use folder::record_files;
pub(crate) use scores::compared;

/// A section of the page.
struct Section {
    id: &'static str,
    title: &'static str,
    body: Markup,
}

impl Section {
    /// A section; if a file cannot be read, it holds the error message.
    fn new(id: &'static str, title: &'static str, body: Result<Markup>) -> Self {
        let body = body.unwrap_or_else(|e| missing(&format!("This section cannot be shown: {e:#}")));
        Self { id, title, body }
    }
}

/// Renders the page of the run in `args.run`, for `page_file`. Missing and unreadable parts are
/// reported on the page.
///
/// # Errors
/// [`BadInput`] when the directory is not one of a run; [`cpift_core::Usage`] for a baseline
/// without scores, or a number of resamples out of range.
pub(crate) fn render(args: &ReportArgs, page_file: &Path) -> Result<String> {
    let dir = &args.run;
    let records = folder::find(dir, page_file)?;
    let experiments = experiments::files(dir)?;
    if records.is_empty() && experiments.is_empty() && !dir.join("scores").is_dir() {
        return Err(BadInput::new(dir, "not the directory of a run")
            .expected("scores/, groups.json, experiments/, or outputs with their cpift.json")
            .hint("give the RUN= directory of make pipeline")
            .into());
    }
    Question { baseline: None, resamples: args.bootstrap.resamples, seed: args.bootstrap.seed }.check()?;
    let scored = scores::compare(args)?;
    let (table, seesaw, samples) = scored.sections(args.samples);
    let mut sections = vec![
        Section::new("scores", "Scores", Ok(table)),
        Section::new("seesaw", "Gain and loss by task", Ok(seesaw)),
        Section::new("overlap", "Overlap of the core regions", cores::overlap(dir)),
        Section::new("density", "Where the core regions lie", cores::density(dir)),
        Section::new("training", "Training", training::curves(dir)),
        Section::new("forgetting", "Forgetting over the stages", training::forgetting(dir)),
        Section::new("outputs", "Sample outputs", Ok(samples)),
        Section::new("provenance", "Provenance", Ok(folder::provenance(dir, &records))),
    ];
    if let Some(body) = added::section(dir) {
        sections.insert(0, Section::new("added", "Added task", body));
    }
    if !experiments.is_empty() {
        let body = experiments::section(args, &experiments);
        sections.insert(0, Section::new("experiments", "Experiments", Ok(body)));
    }
    if let Some(comparison) = &scored.comparison
        && let Some(body) = scores::summary(comparison, &records).transpose()
    {
        sections.insert(0, Section::new("summary", "Summary", body));
    }
    let name = dir.canonicalize().unwrap_or_else(|_| dir.clone());
    let name = name.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
    Ok(page(&format!("CPI-FT run {name}"), &body(&name, &sections, scored.comparison.as_ref())))
}

fn body(name: &str, sections: &[Section], comparison: Option<&Comparison>) -> Markup {
    html! {
        a.skip href="#content" { "Skip to the content" } "\n"
        header {
            "\n"
            h1 { "CPI-FT run " (name) } "\n"
            @if let Some(comparison) = comparison { p.lead { (lead(comparison)) } "\n" }
            nav aria-label="Sections" {
                "\n"
                ul { "\n" @for s in sections { li { a href={ "#" (s.id) } { (s.title) } } "\n" } } "\n"
            }
            "\n"
        }
        "\n"
        main #content { "\n" @for s in sections { (section(s.id, s.title, &s.body)) } } "\n"
    }
}

/// The models and tasks in a sentence.
fn lead(comparison: &Comparison) -> String {
    let models: Vec<&str> = comparison.runs.iter().map(|run| run.name.as_str()).collect();
    let tasks: Vec<&str> = comparison.scores.iter().filter_map(|column| column.task.as_deref()).collect();
    let (models_n, tasks_n) = (counted(models.len(), "model"), counted(tasks.len(), "task"));
    format!("{models_n} ({}) on {tasks_n} ({}).", models.join(", "), tasks.join(", "))
}
