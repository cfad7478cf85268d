//! The scores of a run: those that can be compared, in tables and as gains over the baseline, and
//! sample outputs.

use anyhow::Result;
use cpift_core::error::usage;
use maud::{Markup, html};
use serde_json::Value;

use super::folder::{entries, file_name, rank};
use crate::args::ReportArgs;
use crate::html::{Table, details, figure, missing, notes, page, paragraph, section, verbatim};
use crate::statistics::comparison::{Column, Comparison, Question};
use crate::statistics::runs::{Output, Run, conflict, field_text};
use crate::statistics::unit::{ANS_FORMULA, Unit};
use crate::svg::{Heads, Mark, gains, reach};

/// The baseline if none is named.
const BASE: &str = "base";

/// The scores of a run.
pub(crate) struct Scored {
    /// The comparable ones; `None` if no scores can be read.
    pub(crate) comparison: Option<Comparison>,
    /// Names of the others, each with the reason.
    left_out: Vec<(String, String)>,
}

impl Scored {
    /// The sections with tables, gains and sample outputs (`samples` rows of each task).
    pub(crate) fn sections(&self, samples: usize) -> (Markup, Markup, Markup) {
        let others = !self.left_out.is_empty();
        match &self.comparison {
            Some(c) => {
                let tables = html! { (tables(c)) (self.left_out_list()) };
                (tables, seesaw(c, others), sample_outputs(c, samples))
            }
            None if others => {
                let table = html! { (missing("No scores: none of them can be read.")) (self.left_out_list()) };
                let again = missing("No scores can be read: see Scores.");
                (table, again.clone(), again)
            }
            None => {
                let none = missing(
                    "No scores: the directory scores/ contains no NAME/scores.json. cpift-eval run writes them.",
                );
                (none.clone(), none.clone(), none)
            }
        }
    }

    fn left_out_list(&self) -> Markup {
        let items = self.left_out.iter().map(|(name, reason)| format!("{name}: {reason}"));
        html! {
            @if !self.left_out.is_empty() {
                (paragraph("Scores under scores/ that are not in the tables:"))
                (notes("note left-out", items))
            }
        }
    }
}

/// Compares the comparable scores under RUN_DIR/scores. `--force` replaces the page; it does not
/// make runs comparable.
///
/// # Errors
/// [`cpift_core::Usage`] for a baseline without scores; [`cpift_core::BadInput`] when the directory
/// cannot be listed.
pub(crate) fn compare(args: &ReportArgs) -> Result<Scored> {
    let (mut runs, mut left_out, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for path in entries(&args.run.join("scores"))?.into_iter().filter(|path| path.join("scores.json").is_file()) {
        let name = file_name(&path);
        match Run::read(&name, &path, false) {
            Ok(run) => runs.push(run),
            Err(e) => left_out.push((name.clone(), format!("{e:#}"))),
        }
        names.push(name);
    }
    if let Some(name) = args.baseline.as_ref().filter(|name| !names.contains(name)) {
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(usage(format!("--baseline {name} is not among the scores under {}: {known}", args.run.display())));
    }
    runs.sort_by_key(|run| rank(&run.name));
    let chosen = chosen(&runs, args.baseline.as_deref());
    let (set, others): (Vec<_>, Vec<_>) = runs.into_iter().enumerate().partition(|(i, _)| chosen.contains(i));
    let set: Vec<Run> = set.into_iter().map(|(_, run)| run).collect();
    let reason = |run: Run| conflict(&set, &run).map(|(other, difference)| (run.name.clone(), difference.text(other)));
    left_out.extend(others.into_iter().filter_map(|(_, run)| reason(run)));
    if set.is_empty() {
        return Ok(Scored { comparison: None, left_out });
    }
    // Without scores of the baseline there are no differences.
    let baseline = args.baseline.as_deref().unwrap_or(BASE);
    let baseline = set.iter().any(|run| run.name == baseline).then(|| baseline.to_owned());
    let question = Question { baseline, resamples: args.bootstrap.resamples, seed: args.bootstrap.seed };
    Ok(Scored { comparison: Some(Comparison::new(set, question)?), left_out })
}

/// Indices of the runs to compare: those comparable with the named baseline or, by default, with
/// `base`. If none is comparable with `base`, the first of the largest sets that are comparable
/// with each other.
fn chosen(runs: &[Run], baseline: Option<&str>) -> Vec<usize> {
    let set_of = |name: &str| runs.iter().position(|run| run.name == name).map(|at| alike(runs, at));
    if let Some(set) = baseline.and_then(set_of) {
        return set;
    }
    if let Some(set) = set_of(BASE).filter(|set| set.len() > 1) {
        return set;
    }
    let largest = |best: Vec<usize>, set: Vec<usize>| if set.len() > best.len() { set } else { best };
    (0..runs.len()).map(|at| alike(runs, at)).fold(Vec::new(), largest)
}

/// The run at `at` and those comparable with it and with each other, in order.
fn alike(runs: &[Run], at: usize) -> Vec<usize> {
    let mut set = vec![at];
    for (i, run) in runs.iter().enumerate().filter(|(i, _)| *i != at) {
        if conflict(set.iter().map(|i| &runs[*i]), run).is_none() {
            set.push(i);
        }
    }
    set.sort_unstable();
    set
}

/// The tables of scores and losses, with notes and formula.
fn tables(comparison: &Comparison) -> Markup {
    let scores: Vec<&Column> = comparison.scores.iter().chain([&comparison.ans]).collect();
    let losses: Vec<&Column> = comparison.losses.iter().chain([&comparison.mean_loss]).collect();
    html! {
        (paragraph(&format!("{} ± is one standard error; the best of each column is bold.", comparison.rows_text())))
        @if let Some(name) = &comparison.question.baseline {
            (paragraph(&format!(
                "Under each value: its difference to {name}, with an interval if rows can be paired ({}).",
                comparison.interval_text()
            )))
        }
        (table("Scores of every model on every task", &scores, comparison))
        h3 { "Loss on the reference answers" } "\n"
        (paragraph("Negative log-likelihood in nats per target token; less is better."))
        (table("Loss of every model on every task", &losses, comparison))
        @if !comparison.also.is_empty() { (details("Further figures of the same rows", &further(comparison))) }
        @if !comparison.notes.is_empty() { (notes("note", &comparison.notes)) }
        (paragraph(ANS_FORMULA))
    }
}

fn table(caption: &str, columns: &[&Column], comparison: &Comparison) -> Markup {
    let header: Vec<String> = ["model".to_owned()].into_iter().chain(columns.iter().map(|c| heading(c))).collect();
    let mut table = Table::new(caption, &header);
    for (i, run) in comparison.runs.iter().enumerate() {
        let cells = columns.iter().map(|column| cell(column, i));
        table.markup_row([html! { (run.name) }].into_iter().chain(cells));
    }
    table.markup()
}

/// A value, and under it its difference to the baseline.
fn cell(column: &Column, run: usize) -> Markup {
    let delta = column.deltas.get(run).and_then(Option::as_ref);
    html! {
        @if column.is_best(run) { strong { (column.text(run)) } } @else { (column.text(run)) }
        @if let Some(delta) = delta { small { (delta.text(column.unit)) } }
    }
}

/// One row per figure, as a task may have many.
fn further(comparison: &Comparison) -> Markup {
    let models = comparison.runs.iter().map(|run| run.name.clone());
    let header: Vec<String> = ["task".to_owned(), "figure".to_owned()].into_iter().chain(models).collect();
    let mut table = Table::new("Further figures of every model", &header).name_column(1);
    for column in &comparison.also {
        let task = column.task.as_deref().unwrap_or_default();
        let symbol = if column.unit == Unit::Count { "rows" } else { column.unit.symbol() };
        let figure = format!("{} {symbol}", column.figure);
        let cells = (0..comparison.runs.len()).map(|run| cell(column, run));
        table.markup_row([html! { (task) }, html! { (figure.trim_end()) }].into_iter().chain(cells));
    }
    table.markup()
}

/// The name of a column: the task, and under it the figure.
fn heading(column: &Column) -> String {
    match &column.task {
        Some(task) => format!("{task}\n{} {}", column.figure, column.unit.symbol()),
        None => column.figure.clone(),
    }
}

/// The page of `cpift-eval compare --format html`.
pub(crate) fn compared(comparison: &Comparison) -> String {
    let body = html! {
        main {
            "\n"
            h1 { "Scores compared" } "\n"
            (section("scores", "Scores", &tables(comparison)))
            @if comparison.question.baseline.is_some() {
                (section("seesaw", "Gain and loss by task", &seesaw(comparison, false)))
            }
        }
        "\n"
    };
    page("Scores compared", &body)
}

/// The differences of a column in the unit that tables show, with the sign that makes more better.
fn marks(comparison: &Comparison, column: &Column) -> Vec<Mark> {
    let (unit, sign) = (column.unit, column.unit.direction());
    let shown = |value: f64| sign * unit.shown(value) + 0.0;
    let deltas = comparison.runs.iter().zip(&column.deltas).filter_map(|(run, delta)| Some((run, delta.as_ref()?)));
    deltas
        .map(|(run, delta)| {
            let ends = delta.interval.map(|(a, b)| (shown(a).min(shown(b)), shown(a).max(shown(b))));
            Mark { name: run.name.clone(), value: shown(delta.value), ends, text: delta.text(unit) }
        })
        .collect()
}

/// One plot per task: bars to the right of the line are gains, to the left losses. `others` is true
/// if there are scores that are not in the comparison.
fn seesaw(comparison: &Comparison, others: bool) -> Markup {
    let Some(baseline) = &comparison.question.baseline else {
        return missing("No baseline among the scores, so there are no gains to show. Choose one with --baseline.");
    };
    let columns = comparison.scores.iter().map(|column| (column, marks(comparison, column)));
    let columns: Vec<(&Column, Vec<Mark>)> = columns.filter(|(_, marks)| !marks.is_empty()).collect();
    if columns.is_empty() {
        return missing(&match comparison.runs.len() {
            1 if others => format!("No other scores can be compared with those of {baseline}: see Scores."),
            1 => format!("Only {baseline} was scored: there is nothing to compare it with."),
            _ => format!("No other model has a figure that {baseline} has too: there is nothing to compare."),
        });
    }
    let range = |unit: Unit| {
        let (low, high) = reach(columns.iter().filter(|(c, _)| c.unit == unit).flat_map(|(_, marks)| marks));
        (low.min(0.0), high.max(0.0))
    };
    let header = ["task and model", "difference [95 % interval]", "unit"].map(str::to_owned);
    let mut table = Table::new(&format!("Difference of each model to {baseline}"), &header);
    let mut pictures = Vec::new();
    for (column, marks) in &columns {
        let (task, unit) = (column.task.as_deref().unwrap_or_default(), unit_name(column.unit));
        let label = format!("{task}, {} against {baseline}", column.figure);
        let heads = Heads { head: task, unit: &format!("{}, {unit}", column.figure), label };
        pictures.push(gains(&heads, marks, range(column.unit), baseline));
        marks.iter().for_each(|m| table.row(&[format!("{task}, {}", m.name), m.text.clone(), unit.to_owned()]));
    }
    let caption = format!(
        "Gain (right, blue) or loss (left, orange) of each model against {baseline} on each task. For losses (nats) the axis is \
         reversed, so that right is always better. Thin lines: {}.",
        comparison.interval_text()
    );
    figure(&pictures, &html! { (caption) }, &[table])
}

/// The unit of differences, in words.
pub(crate) fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Percent => "percentage points",
        Unit::Rating => "points of 10",
        Unit::Nats => "nats per token",
        Unit::Perplexity => "perplexity",
        Unit::Count => "rows",
    }
}

/// Longest text that is shown whole, in characters.
const LONGEST: usize = 2000;

/// The outputs of the models on `count` rows of each task. All of this text is untrusted.
fn sample_outputs(comparison: &Comparison, count: usize) -> Markup {
    let runs: Vec<&Run> = comparison.runs.iter().filter(|run| run.outputs.is_some()).collect();
    let tasks = comparison.scores.iter().filter_map(|c| c.task.as_deref());
    let parts: Vec<Markup> = tasks.filter_map(|task| of_task(&runs, task, count)).collect();
    if parts.is_empty() {
        return missing("No outputs: no outputs.jsonl beside the scores contains a row.");
    }
    let words = "Rows on which the models' scores differ come first. Control characters are shown as symbols, long texts are cut.";
    html! { p.note { (words) } "\n" @for part in parts { (part) } }
}

fn of_task(runs: &[&Run], task: &str, count: usize) -> Option<Markup> {
    let rows_of = |run: &Run| run.outputs.as_ref().and_then(|o| o.get(task)).map_or(0, Vec::len);
    let longest = runs.iter().max_by_key(|run| rows_of(run))?;
    let rows = longest.outputs.as_ref()?.get(task)?;
    let mut chosen: Vec<(bool, u64)> = rows
        .iter()
        .map(|row| {
            let scores: Vec<Option<f64>> = outputs_of(runs, task, row.row).iter().map(|(_, o)| o.score).collect();
            (scores.windows(2).all(|pair| pair[0] == pair[1]), row.row)
        })
        .collect();
    chosen.sort_unstable();
    chosen.truncate(count);
    let summary = format!("{task}: {} of {} rows", chosen.len(), rows.len());
    let shown = html! {
        div { "\n" @for (_, row) in chosen { (sample(task, row, &outputs_of(runs, task, row))) } } "\n"
    };
    Some(details(&summary, &shown))
}

/// The outputs of every run on one row.
fn outputs_of<'a>(runs: &[&'a Run], task: &str, row: u64) -> Vec<(&'a str, &'a Output)> {
    let of = |run: &&'a Run| Some((run.name.as_str(), run.outputs.as_ref()?.get(task)?.iter().find(|o| o.row == row)?));
    runs.iter().filter_map(of).collect()
}

fn sample(task: &str, row: u64, outputs: &[(&str, &Output)]) -> Markup {
    let first = |of: fn(&Output) -> Option<&Value>| outputs.iter().find_map(|(_, output)| of(output));
    let facts = [("prompt", first(|o| o.prompt.as_ref())), ("reference", first(|o| o.reference.as_ref()))];
    let header = ["model", "output", "score"].map(str::to_owned);
    let mut table = Table::new(&format!("{task}, row {row}"), &header).text_column(1);
    for (name, output) in outputs {
        let extracted = output.extracted.as_ref().filter(|e| Some(*e) != output.output.as_ref());
        let text = html! {
            @if let Some(output) = &output.output { (shown(output)) }
            @if let Some(extracted) = extracted { small { "extracted: " (field_text(extracted)) } }
        };
        table.markup_row([html! { (name) }, text, html! { (output.score.map_or("–".to_owned(), number)) }]);
    }
    html! {
        div.sample {
            "\n"
            dl {
                "\n"
                @for (name, value) in facts {
                    @if let Some(value) = value { dt { (name) } dd { (shown(value)) } "\n" }
                }
            }
            "\n"
            (table.markup())
        }
        "\n"
    }
}

/// A score without trailing zeros.
fn number(score: f64) -> String {
    let text = format!("{score:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A field, cut if it is very long; a conversation as its turns.
fn shown(value: &Value) -> Markup {
    let turn = |turn: &Value| Some(format!("{}: {}", turn.get("role")?.as_str()?, turn.get("content")?.as_str()?));
    let turns = value.as_array().and_then(|turns| turns.iter().map(turn).collect::<Option<Vec<String>>>());
    let text = turns.map_or_else(|| field_text(value), |turns| turns.join("\n"));
    let more = text.chars().count().saturating_sub(LONGEST);
    let cut: String = text.chars().take(LONGEST).collect();
    html! { (verbatim(&cut)) @if more > 0 { small { "… " (more) " more characters" } } }
}
