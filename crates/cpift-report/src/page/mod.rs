//! report.html: all that a run came to, on one page that opens from disk.

mod comparable;
mod cores;
mod experiments;
mod plots;
mod records;
mod samples;
mod scores;
mod training;

use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::files::RECORD_NAME;

use crate::args::ReportArgs;
use crate::comparison::{Comparison, Question};
use crate::experiment::counted;
use crate::html::{escape, missing, page};

pub use experiments::alone as experiment;
pub use scores::compared;

/// The methods as the pipeline names them, in the order a reader expects; others stand between these by name.
const FIRST: [&str; 3] = ["base", "full-sft", "multi-stage"];
const LAST: [&str; 6] = ["backbone", "fused", "cpi-ft-group", "cpi-ft", "mixture", "cpi-ft-plus"];

/// A part of the page.
struct Section {
    id: &'static str,
    title: &'static str,
    /// HTML.
    body: String,
}

impl Section {
    /// What a stage left behind; a file that cannot be read leaves its message where the section would be.
    fn new(id: &'static str, title: &'static str, body: Result<String>) -> Self {
        let body = body.unwrap_or_else(|e| missing(&format!("This part could not be made: {e:#}")));
        Self { id, title, body }
    }
}

/// The page of the run in `args.run`.
///
/// # Errors
/// [`BadInput`] when it is no folder of a run; [`cpift_core::Usage`] for a baseline that was not scored, or a number of resamples out of
/// range. What is missing in it or cannot be read is said on the page.
pub fn render(args: &ReportArgs) -> Result<String> {
    let folder = &args.run;
    let records = records::find(folder)?;
    let experiments = experiments::files(folder)?;
    if records.is_empty() && experiments.is_empty() && !folder.join("scores").is_dir() {
        return Err(BadInput::new(folder, "is no folder of a run")
            .expected("scores/, groups.json, experiments/, or outputs with their cpift.json")
            .hint("give the RUN= folder of make pipeline")
            .into());
    }
    Question { baseline: None, resamples: args.resamples, seed: args.seed }.check()?;
    let compared = comparable::compare(args)?;
    let comparison = compared.comparison.as_ref();
    let (table, seesaw, outputs) = match comparison {
        Some(c) => (
            scores::tables(c) + &compared.left_out_list(),
            scores::seesaw(c, !compared.left_out.is_empty()),
            samples::section(c, args.samples),
        ),
        None if compared.left_out.is_empty() => {
            let none = missing("No scores: the folder scores/ holds no NAME/scores.json. cpift-eval run makes them.");
            (none.clone(), none.clone(), Ok(none))
        }
        None => {
            let table = missing("No scores: none of them can be read.") + &compared.left_out_list();
            let again = missing("No scores can be read: see Scores.");
            (table, again.clone(), Ok(again))
        }
    };
    let mut sections = vec![
        Section::new("scores", "Scores", Ok(table)),
        Section::new("seesaw", "Gain and loss by task", Ok(seesaw)),
        Section::new("overlap", "Overlap of the core regions", cores::overlap(folder)),
        Section::new("density", "Where the core regions lie", cores::density(folder)),
        Section::new("training", "Training", training::curves(folder)),
        Section::new("forgetting", "Forgetting over the stages", training::forgetting(folder)),
        Section::new("outputs", "Sample outputs", outputs),
        Section::new("provenance", "Provenance", Ok(records::section(folder, &records))),
    ];
    if !experiments.is_empty() {
        let body = experiments::section(args, &experiments);
        sections.insert(0, Section::new("experiments", "Experiments", Ok(body)));
    }
    let name = folder.canonicalize().unwrap_or_else(|_| folder.clone());
    let name = name.file_name().map_or_else(|| folder.display().to_string(), |n| n.to_string_lossy().into_owned());
    Ok(page(&format!("CPI-FT run {name}"), &body(&name, &sections, comparison)))
}

fn body(name: &str, sections: &[Section], comparison: Option<&Comparison>) -> String {
    let links: String =
        sections.iter().map(|s| format!("<li><a href=\"#{}\">{}</a></li>\n", s.id, escape(s.title))).collect();
    let parts: String = sections
        .iter()
        .map(|s| {
            let (id, title) = (s.id, escape(s.title));
            format!("<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title}</h2>\n{}</section>\n", s.body)
        })
        .collect();
    let lead = comparison.map_or(String::new(), |c| {
        let models: Vec<&str> = c.runs.iter().map(|run| run.name.as_str()).collect();
        let tasks: Vec<&str> = c.scores.iter().filter_map(|column| column.task.as_deref()).collect();
        let text = format!(
            "{} ({}) on {} ({}).",
            counted(models.len(), "model"),
            models.join(", "),
            counted(tasks.len(), "task"),
            tasks.join(", ")
        );
        format!("<p class=\"lead\">{}</p>\n", escape(&text))
    });
    format!(
        "<a class=\"skip\" href=\"#content\">Skip to the content</a>\n<header>\n<h1>CPI-FT run {}</h1>\n{lead}\
         <nav aria-label=\"Sections\">\n<ul>\n{links}</ul>\n</nav>\n</header>\n<main id=\"content\">\n{parts}</main>\n",
        escape(name)
    )
}

/// Where a model stands among the others.
fn rank(name: &str) -> (usize, usize, String) {
    let first = FIRST.iter().position(|n| *n == name).map(|i| (0, i));
    let last = LAST.iter().position(|n| *n == name).map(|i| (2, i));
    let (group, place) = first.or(last).unwrap_or((1, 0));
    (group, place, name.to_owned())
}

/// What a folder holds, by name; nothing where there is no such folder. Unfinished outputs are left out.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let error = |e| BadInput::new(folder, format!("cannot be listed: {e}"));
    let list: Result<Vec<PathBuf>, _> =
        std::fs::read_dir(folder).map_err(error)?.map(|e| e.map(|e| e.path())).collect();
    let mut list = list.map_err(error)?;
    list.retain(|path| !file_name(path).starts_with('.'));
    list.sort();
    Ok(list)
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

/// The folders of a run that hold a model of ours, as names under it: probes first, then the rest as [`rank`] has it.
fn models(folder: &Path) -> Result<Vec<String>> {
    let is_model = |path: &PathBuf| path.join(RECORD_NAME).is_file() && path.join("config.json").is_file();
    let probes = entries(&folder.join("probes"))?.into_iter().filter(is_model);
    let probes: Vec<String> = probes.map(|path| format!("probes/{}", file_name(&path))).collect();
    let mut rest: Vec<String> = entries(folder)?.into_iter().filter(is_model).map(|path| file_name(&path)).collect();
    rest.sort_by_key(|name| rank(name));
    Ok([probes, rest].concat())
}
