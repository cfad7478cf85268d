//! Experiments over seeds on the page: for each its question, its tables and a picture.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::plots::{Heads, Line, Mark, bars, dots, lines, reach};
use super::scores::unit_words;
use super::{entries, file_name};
use crate::args::ReportArgs;
use crate::chart::{series, series_legend};
use crate::comparison::Question;
use crate::experiment::{Axis, Column, Experiment, Forgetting, Outcome, Seeds, Sheet, Spread};
use crate::html::{Table, escape, figure, missing, page, paragraph};
use crate::text::delta_text;
use crate::unit::Unit;

/// The experiments of a run, by name.
///
/// # Errors
/// A folder that cannot be listed.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = entries(&folder.join("experiments"))?;
    files.retain(|path| path.extension().is_some_and(|e| e == "json"));
    Ok(files)
}

/// All of them; one that cannot be read leaves its message in its place.
pub fn section(args: &ReportArgs, files: &[PathBuf]) -> String {
    let one = |path: &PathBuf| {
        let question = Question { baseline: None, resamples: args.resamples, seed: args.seed };
        match Experiment::read(path, question, false) {
            Ok(experiment) => format!("<h3>{}</h3>\n{}", escape(&experiment.head.title), body(&experiment)),
            Err(e) => format!(
                "<h3>{}</h3>\n{}",
                escape(&file_name(path)),
                missing(&format!("This experiment could not be shown: {e:#}"))
            ),
        }
    };
    files.iter().map(one).collect()
}

/// `cpift-eval experiment --format html`.
pub fn alone(experiment: &Experiment) -> String {
    let title = &experiment.head.title;
    let body = body(experiment);
    page(title, &format!("<main>\n<h1>{}</h1>\n{body}</main>\n", escape(title)))
}

fn body(experiment: &Experiment) -> String {
    let tables: String = experiment.sheets().into_iter().map(table).collect();
    let words: String = experiment.words().iter().map(|text| format!("<li>{}</li>\n", escape(text))).collect();
    let picture = match &experiment.outcome {
        Outcome::Scores(seeds) => match &seeds.axis {
            Some(axis) => sweep(seeds, axis),
            None => methods(experiment, seeds),
        },
        Outcome::Forgetting(forgetting) => changes(forgetting),
    };
    let question = paragraph(&experiment.head.question);
    format!("{question}{tables}<ul class=\"note\">\n{words}</ul>\n{picture}")
}

fn table(sheet: Sheet) -> String {
    let mut table = Table::new(&sheet.caption, &sheet.header);
    for column in 1..sheet.names {
        table = table.name_column(column);
    }
    for line in &sheet.lines {
        let cell = |(text, best): &(String, bool)| match best {
            true => format!("<strong>{}</strong>", escape(text)),
            false => escape(text),
        };
        table.html_row(line.iter().map(cell));
    }
    table.finish()
}

/// The mean and its standard deviation, as a picture shows them.
fn spread_mark(name: &str, spread: &Spread, unit: Unit, text: String) -> Mark {
    let (mean, sd) = (spread.mean(), spread.sd());
    let ends = sd.map(|sd| (unit.shown(mean - sd), unit.shown(mean + sd)));
    Mark { name: name.to_owned(), value: unit.shown(mean), ends, text }
}

/// One picture for all tasks, then one a task: differences to the baseline where there is one.
fn methods(experiment: &Experiment, seeds: &Seeds) -> String {
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
        let head = column.task.as_deref().unwrap_or_else(|| overall_words(column));
        let alike = columns.iter().filter(|(c, _)| c.unit == column.unit).flat_map(|(_, marks)| marks);
        let label = match base {
            Some(name) => format!("{head}, {} against {name}", column.figure),
            None => format!("{head}, {}", column.figure),
        };
        let unit = if base.is_some() { unit_words(column.unit) } else { column.unit.symbol() };
        pictures.push(dots(&Heads { head, unit, label }, marks, reach(alike), base));
        marks.iter().for_each(|m| table.row(&[format!("{head}, {}", m.name), m.text.clone(), unit.to_owned()]));
    }
    if pictures.is_empty() {
        return missing("There is nothing to draw: no method has a figure that another could be held against.");
    }
    let lines = match (base, seeds.seeds) {
        (Some(_), _) => " Lines: 95 % intervals, as above.",
        (None, 1) => "",
        (None, _) => " Lines: one standard deviation over seeds to either side.",
    };
    let losses = columns.iter().any(|(column, _)| column.unit == Unit::Nats);
    let losses = if losses { " Losses (nats) are better to the left." } else { "" };
    let what = base.map_or("Every method".to_owned(), |name| format!("Each method's difference to {name}"));
    let caption = format!("{what}, over all tasks first. One scale for each unit.{lines}{losses}");
    figure(&pictures, &escape(&caption), vec![table])
}

/// What a figure over all tasks is called.
fn overall_words(column: &Column) -> &str {
    if column.unit == Unit::Percent { "mean of the tasks" } else { &column.figure }
}

fn marks(seeds: &Seeds, column: &Column, differences: bool) -> Vec<Mark> {
    let unit = column.unit;
    let of = |row: usize| {
        let name = &seeds.rows[row].name;
        if !differences {
            let spread = column.cells[row].spread()?;
            return Some(spread_mark(name, spread, unit, spread.text(unit)));
        }
        let delta = column.deltas[row].as_ref()?;
        let ends = delta.interval.map(|(low, high)| (unit.shown(low), unit.shown(high)));
        Some(Mark { name: name.clone(), value: unit.shown(delta.value), ends, text: delta_text(unit, delta) })
    };
    (0..seeds.rows.len()).filter_map(of).collect()
}

/// One line a series: the figure over all tasks by x.
fn sweep(seeds: &Seeds, axis: &Axis) -> String {
    let column = seeds.overall();
    let (head, unit) = (overall_words(column), column.unit);
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
        return missing("There is nothing to draw: no method has a figure over all tasks.");
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
    let legend = match all.as_slice() {
        [one] if one.name.is_empty() => String::new(),
        all => series_legend(all.iter().enumerate().map(|(i, line)| (series(i), line.name.as_str()))),
    };
    let bars = if seeds.seeds > 1 { " Upright lines: one standard deviation over seeds to either side." } else { "" };
    let scale = if axis.log { " (logarithmic)" } else { "" };
    let caption = format!("{legend}{}", escape(&format!("By {}{scale}: {head}.{bars}", axis.label)));
    figure(&[picture], &caption, vec![table])
}

/// Two bars a method.
fn changes(forgetting: &Forgetting) -> String {
    let unit = forgetting.unit;
    let mark = |name: &str, spread: &Spread| spread_mark(name, spread, unit, spread.signed(unit));
    let pairs: Vec<[Mark; 2]> =
        forgetting.methods.iter().map(|m| [mark(&m.name, &m.first), mark(&m.name, &m.second)]).collect();
    let header = ["method", "ΔA", "ΔB"].map(str::to_owned);
    let mut table = Table::new(&format!("ΔA and ΔB of every method ({})", unit_words(unit)), &header);
    pairs.iter().for_each(|[a, b]| table.row(&[a.name.clone(), a.text.clone(), b.text.clone()]));
    let names = ["ΔA: the first task, after the second", "ΔB: the second task"];
    let legend = series_legend(names.iter().enumerate().map(|(i, name)| (series(i), *name)));
    let heads = Heads { head: "ΔA and ΔB", unit: unit_words(unit), label: "ΔA and ΔB by method".to_owned() };
    let words = "Bars to the left are losses, to the right gains. Thin lines: one standard deviation over pairs and seeds to either side.";
    figure(&[bars(&heads, &pairs)], &format!("{legend}{}", escape(words)), vec![table])
}
