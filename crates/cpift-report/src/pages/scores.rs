//! The scores of a run: the best model and its lead, what each model lost where, and what each cost
//! in tokens and time; the scores that can be compared, in tables and as gains over the baseline;
//! and sample outputs.

use std::collections::BTreeSet;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::digest::Digest;
use cpift_core::record::provenance::Provenance;
use maud::{Markup, html};
use serde_json::Value;

use super::folder::{Record, entries, file_name, rank};
use crate::args::ReportArgs;
use crate::comparison::{ANS_FORMULA, Column, Comparison, Delta, Question, Unit};
use crate::html::{
    Heads, Mark, Table, details, figure, gains, missing, notes, page, paragraph, reach, section, verbatim,
};
use crate::runs::{Output, Run, conflict, field_text};

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

/// Training and other work behind a model.
#[derive(Debug, PartialEq)]
struct Cost {
    tokens: u64,
    seconds: f64,
}

/// The summary; none if fewer than two models have a mean over the tasks.
///
/// # Errors
/// Those of [`Comparison::new`].
pub(crate) fn summary(comparison: &Comparison, records: &[Record]) -> Result<Option<Markup>> {
    let has_values = |column: &Column| column.cells.iter().filter(|cell| cell.figure().is_some()).count() > 1;
    let mean = [&comparison.ans, &comparison.mean_loss].into_iter().find(|column| has_values(column));
    let Some(mean) = mean else { return Ok(None) };
    let direction = mean.unit.direction();
    let values = mean.cells.iter().enumerate().filter_map(|(i, cell)| Some((i, direction * cell.figure()?.value)));
    let mut order: Vec<(usize, f64)> = values.collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let best = order[0].0;
    let question = Question { baseline: Some(comparison.runs[best].name.clone()), ..comparison.question.clone() };
    let against_best = Comparison::new(comparison.runs.clone(), question)?;
    let name = mean.figure.as_str();
    let deltas = if name == against_best.ans.figure { &against_best.ans } else { &against_best.mean_loss };
    let delta = |run: usize| deltas.deltas[run].as_ref();
    let baseline = comparison.baseline();
    let mut header = vec!["model".to_owned(), name.to_owned(), "behind the best [95 %]".to_owned()];
    header.extend(baseline.map(|base| format!("lost against {}", comparison.runs[base].name)));
    header.extend(["tokens", "time"].map(str::to_owned));
    let mut table = Table::new("Models, the best first", &header).text_column(if baseline.is_some() { 3 } else { 2 });
    for (run, _) in &order {
        let model = &comparison.runs[*run].name;
        let cost = cost(records, model);
        let mut cells = vec![model.clone(), mean.text(*run)];
        cells.push(delta(*run).map_or("–".to_owned(), |delta| delta.text(mean.unit)));
        cells.extend(baseline.map(|_| lost(comparison, *run)));
        cells.push(cost.as_ref().map_or("–".to_owned(), |cost| grouped(cost.tokens)));
        cells.push(cost.as_ref().map_or("–".to_owned(), |cost| duration(cost.seconds)));
        table.row(&cells);
    }
    let words = "Tokens are those trained on, time is that of the commands, both with all that a model was made from \
                 (probes, masks, groups, an earlier model), each counted once. Lost: tasks whose figure is worse.";
    Ok(Some(html! {
        (paragraph(&verdict(comparison, mean, &order, delta)))
        (table.markup())
        (paragraph(words))
    }))
}

/// The best model and its lead over the next in a sentence.
fn verdict<'a>(
    comparison: &Comparison,
    mean: &Column,
    order: &[(usize, f64)],
    delta: impl Fn(usize) -> Option<&'a Delta>,
) -> String {
    let name = |place: usize| &comparison.runs[order[place].0].name;
    let of = |place: usize| mean.text(order[place].0);
    let word = if mean.unit.is_loss() { "lowest" } else { "highest" };
    let first = format!("{} has the {word} {}, {}", name(0), mean.figure, of(0));
    let Some(delta) = delta(order[1].0) else { return format!("{first}; {} follows with {}.", name(1), of(1)) };
    let decided = match delta.interval {
        None => "rows cannot be paired, so there is no interval",
        Some((low, high)) if low <= 0.0 && high >= 0.0 => {
            "the interval contains 0, so these rows do not decide between them"
        }
        Some(_) => "the interval excludes 0",
    };
    format!("{first}; {} follows with {}: {}, {decided}.", name(1), of(1), delta.text(mean.unit))
}

/// The tasks on which a model is worse than the baseline, with the differences.
fn lost(comparison: &Comparison, run: usize) -> String {
    if comparison.baseline() == Some(run) {
        return "–".to_owned();
    }
    let worse = comparison.scores.iter().filter_map(|column| {
        let delta = column.deltas.get(run)?.as_ref()?;
        let is_worse = column.unit.direction() * delta.value < 0.0;
        is_worse.then(|| format!("{} {}", column.task.as_deref().unwrap_or_default(), delta.text(column.unit)))
    });
    let worse: Vec<String> = worse.collect();
    if worse.is_empty() { "nothing".to_owned() } else { worse.join(", ") }
}

/// Tokens and seconds of the record of `model` and of all records whose outputs it was made from;
/// none without a record.
fn cost(records: &[Record], model: &str) -> Option<Cost> {
    let readable: Vec<&Provenance> = records.iter().filter_map(|(_, record)| record.as_ref().ok()).collect();
    let own = records.iter().find(|(path, _)| path == model)?.1.as_ref().ok()?;
    let (mut due, mut seen) = (vec![own], BTreeSet::new());
    let mut cost = Cost { tokens: 0, seconds: 0.0 };
    while let Some(record) = due.pop() {
        if !seen.insert(std::ptr::from_ref(record)) {
            continue;
        }
        cost.tokens += record.facts.get("tokens").and_then(serde_json::Value::as_u64).unwrap_or(0);
        cost.seconds += record.seconds;
        let made = |digest: &Digest| {
            let output = |other: &&&Provenance| other.output.as_ref().is_some_and(|output| output.blake3 == *digest);
            readable.iter().find(output).copied()
        };
        due.extend(record.inputs.values().filter_map(|input| made(&input.digest)));
    }
    Some(cost)
}

/// A number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let first = digits.len() % 3;
    let (head, tail) = digits.split_at(first);
    let groups = tail.as_bytes().chunks(3).map(|group| String::from_utf8_lossy(group).into_owned());
    [head.to_owned()].into_iter().filter(|head| !head.is_empty()).chain(groups).collect::<Vec<_>>().join(",")
}

fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_durations_are_readable() {
        let numbers = [0, 999, 1000, 550_204, 12_345_678].map(grouped);
        assert_eq!(numbers, ["0", "999", "1,000", "550,204", "12,345,678"]);
        let times = [0.44, 59.4, 61.0, 7325.0].map(duration);
        assert_eq!(times, ["0.4 s", "59.4 s", "1 min 1 s", "2 h 2 min"]);
    }
}
