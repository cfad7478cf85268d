//! Experiments over seeds: for each its question, its tables with notes, and a picture.

use std::path::{Path, PathBuf};

use anyhow::Result;
use maud::{Markup, html};

use super::folder::{entries, file_name};
use super::scores::unit_name;
use crate::args::ReportArgs;
use crate::comparison::{Question, Spread, Unit};
use crate::experiment::{Column, Experiment, Forgetting, Outcome, SeedScores};
use crate::experiment_file::Axis;
use crate::html::{
    Heads, Line, Mark, Table, bars, dots, figure, lines, missing, notes, page, paragraph, reach, series_legend,
};
use crate::sheet::{self, Sheet};

/// The experiment files of a run, by name.
///
/// # Errors
/// [`cpift_core::BadInput`] when the directory cannot be listed.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = entries(&folder.join("experiments"))?;
    files.retain(|path| path.extension().is_some_and(|e| e == "json"));
    Ok(files)
}

/// The section with all experiments; in place of one that cannot be read is its error message.
pub(crate) fn section(args: &ReportArgs, files: &[PathBuf]) -> Markup {
    let one = |path: &PathBuf| {
        let question = Question { baseline: None, resamples: args.bootstrap.resamples, seed: args.bootstrap.seed };
        match Experiment::read(path, question, false) {
            Ok(experiment) => html! { h3 { (experiment.head.title) } "\n" (body(&experiment)) },
            Err(e) => html! {
                h3 { (file_name(path)) } "\n"
                (missing(&format!("This experiment cannot be shown: {e:#}")))
            },
        }
    };
    html! { @for path in files { (one(path)) } }
}

/// The page of `cpift-eval experiment --format html`.
pub(crate) fn alone(experiment: &Experiment) -> String {
    let title = &experiment.head.title;
    page(title, &html! { main { "\n" h1 { (title) } "\n" (body(experiment)) } "\n" })
}

fn body(experiment: &Experiment) -> Markup {
    let picture = match &experiment.outcome {
        Outcome::Scores(seeds) => match &seeds.axis {
            Some(axis) => sweep(seeds, axis),
            None => methods(experiment, seeds),
        },
        Outcome::Forgetting(forgetting) => changes(forgetting),
    };
    html! {
        (paragraph(&experiment.head.question))
        @for sheet in sheet::sheets(experiment) { (table(&sheet)) }
        (notes("note", sheet::notes(experiment)))
        (picture)
    }
}

fn table(sheet: &Sheet) -> Markup {
    let mut table = Table::new(&sheet.caption, &sheet.header);
    for column in 1..sheet.names {
        table = table.name_column(column);
    }
    for line in &sheet.lines {
        table.markup_row(line.iter().map(|(text, best)| html! { @if *best { strong { (text) } } @else { (text) } }));
    }
    table.markup()
}

/// A mean with its standard deviation to either side.
fn spread_mark(name: &str, spread: &Spread, unit: Unit, text: String) -> Mark {
    let (mean, sd) = (spread.mean(), spread.sd());
    let ends = sd.map(|sd| (unit.shown(mean - sd), unit.shown(mean + sd)));
    Mark { name: name.to_owned(), value: unit.shown(mean), ends, text }
}

/// One plot for all tasks, then one per task: differences to the baseline, or scores without one.
fn methods(experiment: &Experiment, seeds: &SeedScores) -> Markup {
    let base = experiment.head.baseline.as_deref().filter(|_| seeds.compared());
    let columns = [seeds.overall()].into_iter().chain(&seeds.scores);
    let columns: Vec<(&Column, Vec<Mark>)> = columns.map(|c| (c, marks(seeds, c, base.is_some()))).collect();
    let mut table = Table::new(
        &base.map_or("Every method by task".to_owned(), |name| format!("Difference to {name} by task")),
        &["figure and method", if base.is_some() { "difference [95 % interval]" } else { "mean ± sd" }, "unit"]
            .map(str::to_owned),
    );
    let mut pictures = Vec::new();
    for (column, marks) in columns.iter().filter(|(_, marks)| !marks.is_empty()) {
        let head = column.task.as_deref().unwrap_or_else(|| overall_name(column));
        let alike = columns.iter().filter(|(c, _)| c.unit == column.unit).flat_map(|(_, marks)| marks);
        let label = match base {
            Some(name) => format!("{head}, {} against {name}", column.figure),
            None => format!("{head}, {}", column.figure),
        };
        let unit = if base.is_some() { unit_name(column.unit) } else { column.unit.symbol() };
        pictures.push(dots(&Heads { head, unit, label }, marks, reach(alike), base));
        marks.iter().for_each(|m| table.row(&[format!("{head}, {}", m.name), m.text.clone(), unit.to_owned()]));
    }
    if pictures.is_empty() {
        return missing("Nothing to plot: no method has a figure to compare.");
    }
    let lines = match (base, seeds.seeds) {
        (Some(_), _) => " Lines: 95 % intervals, as above.",
        (None, 1) => "",
        (None, _) => " Lines: one standard deviation over seeds to either side.",
    };
    let losses = columns.iter().any(|(column, _)| column.unit == Unit::Nats);
    let losses = if losses { " Losses (nats) are better to the left." } else { "" };
    let what = base.map_or("Every method".to_owned(), |name| format!("Each method's difference to {name}"));
    let caption = format!("{what}, over all tasks first. One scale per unit.{lines}{losses}");
    figure(&pictures, &html! { (caption) }, &[table])
}

/// The name of a figure over all tasks.
fn overall_name(column: &Column) -> &str {
    if column.unit == Unit::Percent { "mean of the tasks" } else { &column.figure }
}

fn marks(seeds: &SeedScores, column: &Column, differences: bool) -> Vec<Mark> {
    let unit = column.unit;
    let of = |row: usize| {
        let name = &seeds.rows[row].name;
        if !differences {
            let spread = column.cells[row].spread()?;
            return Some(spread_mark(name, spread, unit, spread.text(unit)));
        }
        let delta = column.deltas[row].as_ref()?;
        let ends = delta.interval.map(|(low, high)| (unit.shown(low), unit.shown(high)));
        Some(Mark { name: name.clone(), value: unit.shown(delta.value), ends, text: delta.text(unit) })
    };
    (0..seeds.rows.len()).filter_map(of).collect()
}

/// One line per series: the figure over all tasks by x.
fn sweep(seeds: &SeedScores, axis: &Axis) -> Markup {
    let column = seeds.overall();
    let (head, unit) = (overall_name(column), column.unit);
    let mut all: Vec<Line> = Vec::new();
    for (row, cell) in seeds.rows.iter().zip(&column.cells) {
        let (Some(x), Some(spread)) = (row.x, cell.spread()) else { continue };
        let name = row.series.clone().unwrap_or_default();
        let point = (x, spread_mark(&row.name, spread, unit, spread.text(unit)));
        match all.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => all.push(Line { name, points: vec![point] }),
        }
    }
    if all.is_empty() {
        return missing("Nothing to plot: no method has a figure over all tasks.");
    }
    all.iter_mut().for_each(|line| line.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    let header = ["method", "series", &axis.label, head].map(str::to_owned);
    let mut table = Table::new(&format!("{head} ({}) by {}", unit.symbol(), axis.label), &header).name_column(1);
    for line in &all {
        line.points.iter().for_each(|(x, m)| {
            table.row(&[m.name.clone(), line.name.clone(), x.to_string(), m.text.clone()]);
        });
    }
    let heads = Heads { head, unit: unit.symbol(), label: head.to_owned() };
    let picture = lines(&heads, &axis.label, axis.log, &all);
    let named = all.len() > 1 || !all[0].name.is_empty();
    let bars = if seeds.seeds > 1 { " Upright lines: one standard deviation over seeds to either side." } else { "" };
    let scale = if axis.log { " (logarithmic)" } else { "" };
    let caption = html! {
        @if named { (series_legend(all.iter().map(|line| line.name.as_str()).enumerate())) }
        "By " (axis.label) (scale) ": " (head) "." (bars)
    };
    figure(&[picture], &caption, &[table])
}

/// Two bars per method: ΔA and ΔB.
fn changes(forgetting: &Forgetting) -> Markup {
    let unit = forgetting.unit;
    let mark = |name: &str, spread: &Spread| spread_mark(name, spread, unit, spread.signed(unit));
    let pairs: Vec<[Mark; 2]> =
        forgetting.methods.iter().map(|m| [mark(&m.name, &m.first), mark(&m.name, &m.second)]).collect();
    let header = ["method", "ΔA", "ΔB"].map(str::to_owned);
    let mut table = Table::new(&format!("ΔA and ΔB of every method ({})", unit_name(unit)), &header);
    pairs.iter().for_each(|[a, b]| table.row(&[a.name.clone(), a.text.clone(), b.text.clone()]));
    let heads = Heads { head: "ΔA and ΔB", unit: unit_name(unit), label: "ΔA and ΔB by method".to_owned() };
    let caption = html! {
        (series_legend([(0, "ΔA: the first task, after the second"), (1, "ΔB: the second task")]))
        "Bars to the left are losses, to the right gains. Thin lines: one standard deviation over pairs and seeds to either side."
    };
    figure(&[bars(&heads, &pairs)], &caption, &[table])
}
