//! The tables of scores, and the seesaw: what each method gained or lost on each task.

use cpift_core::format::svg::text_width;

use crate::chart::{Axis, Svg};
use crate::comparison::{Cell, Column, Comparison};
use crate::html::{Table, details, escape, figure, missing, page, paragraph};
use crate::text::{cell_text, delta_text};
use crate::unit::{ANS_FORMULA, Unit};

/// The tables of scores and losses, with notes and formula.
pub fn tables(comparison: &Comparison) -> String {
    let mut out =
        paragraph(&format!("{} ± is one standard error; the best of each column is bold.", comparison.rows_words()));
    if let Some(name) = &comparison.question.baseline {
        out.push_str(&paragraph(&format!(
            "Under each value: its difference to {name}, with its interval where rows can be paired ({}).",
            comparison.interval_words()
        )));
    }
    let columns: Vec<&Column> = comparison.scores.iter().chain([&comparison.ans]).collect();
    out.push_str(&table("Scores of every model on every task", &columns, comparison));
    let columns: Vec<&Column> = comparison.losses.iter().chain([&comparison.mean_loss]).collect();
    out.push_str("<h3>Loss on the reference answers</h3>\n");
    out.push_str(&paragraph("Negative log-likelihood in nats a target token; less is better."));
    out.push_str(&table("Loss of every model on every task", &columns, comparison));
    if !comparison.also.is_empty() {
        out.push_str(&details("Further figures of the same rows", &further(comparison)));
    }
    if !comparison.notes.is_empty() {
        let items: String = comparison.notes.iter().map(|note| format!("<li>{}</li>\n", escape(note))).collect();
        out.push_str(&format!("<ul class=\"note\">\n{items}</ul>\n"));
    }
    out + &paragraph(ANS_FORMULA)
}

fn table(caption: &str, columns: &[&Column], comparison: &Comparison) -> String {
    let header: Vec<String> = ["model".to_owned()].into_iter().chain(columns.iter().map(|c| heading(c))).collect();
    let mut table = Table::new(caption, &header);
    for (i, run) in comparison.runs.iter().enumerate() {
        let cells = columns.iter().map(|column| cell(column, i));
        table.html_row([escape(&run.name)].into_iter().chain(cells));
    }
    table.finish()
}

/// A value and under it its difference to the baseline.
fn cell(column: &Column, run: usize) -> String {
    let text = escape(&cell_text(column, run));
    let best = matches!(column.cells[run], Cell::Value(_, true));
    let text = if best { format!("<strong>{text}</strong>") } else { text };
    let delta = column.deltas.get(run).and_then(Option::as_ref);
    text + &delta.map_or(String::new(), |d| format!("<small>{}</small>", escape(&delta_text(column.unit, d))))
}

/// One line a figure, for a task may have many.
fn further(comparison: &Comparison) -> String {
    let models = comparison.runs.iter().map(|run| run.name.clone());
    let header: Vec<String> = ["task".to_owned(), "figure".to_owned()].into_iter().chain(models).collect();
    let mut table = Table::new("Further figures of every model", &header).name_column(1);
    for column in &comparison.also {
        let task = escape(column.task.as_deref().unwrap_or_default());
        let symbol = if column.unit == Unit::Count { "rows" } else { column.unit.symbol() };
        let figure = escape(format!("{} {symbol}", column.figure).trim_end());
        let cells = (0..comparison.runs.len()).map(|run| cell(column, run));
        table.html_row([task, figure].into_iter().chain(cells));
    }
    table.finish()
}

/// The name of a column: the task, and under it what is measured.
fn heading(column: &Column) -> String {
    match &column.task {
        Some(task) => format!("{task}\n{} {}", column.figure, column.unit.symbol()),
        None => column.figure.clone(),
    }
}

/// `cpift-eval compare --format html`.
pub fn compared(comparison: &Comparison) -> String {
    let seesaw = match comparison.question.baseline {
        Some(_) => format!(
            "<section aria-labelledby=\"seesaw\">\n<h2 id=\"seesaw\">Gain and loss by task</h2>\n{}</section>\n",
            seesaw(comparison, false)
        ),
        None => String::new(),
    };
    let body = format!(
        "<main>\n<h1>Scores compared</h1>\n<section aria-labelledby=\"scores\">\n<h2 id=\"scores\">Scores</h2>\n{}</section>\n{seesaw}</main>\n",
        tables(comparison)
    );
    page("Scores compared", &body)
}

/// A method's gain over the baseline on one task, in the unit that is shown: more is better.
struct Gain {
    model: String,
    value: f64,
    interval: Option<(f64, f64)>,
    /// The signed difference as the tables have it.
    text: String,
}

fn gains(comparison: &Comparison, column: &Column) -> Vec<Gain> {
    let (unit, sign) = (column.unit, column.unit.direction());
    let of = |(run, delta): (&crate::runs::Run, &Option<crate::comparison::Delta>)| {
        let delta = delta.as_ref()?;
        let shown = |value: f64| sign * unit.shown(value) + 0.0;
        let interval = delta.interval.map(|(a, b)| (shown(a).min(shown(b)), shown(a).max(shown(b))));
        Some(Gain { model: run.name.clone(), value: shown(delta.value), interval, text: delta_text(unit, delta) })
    };
    comparison.runs.iter().zip(&column.deltas).filter_map(of).collect()
}

/// One picture a task: bars to the right of the line are gains, to the left losses. `others`: whether there are scores that are not in
/// the comparison.
pub fn seesaw(comparison: &Comparison, others: bool) -> String {
    let Some(baseline) = &comparison.question.baseline else {
        return missing("No baseline among the scores: nothing to measure gains against. --baseline names another.");
    };
    let columns: Vec<(&Column, Vec<Gain>)> = comparison
        .scores
        .iter()
        .map(|column| (column, gains(comparison, column)))
        .filter(|(_, g)| !g.is_empty())
        .collect();
    if columns.is_empty() {
        return missing(&match comparison.runs.len() {
            1 if others => format!("No other scores can be compared with those of {baseline}: see Scores."),
            1 => format!("Only {baseline} was scored: there is nothing to compare it with."),
            _ => format!("No other model has a figure that {baseline} has too: there is nothing to compare."),
        });
    }
    let range = |unit: Unit| {
        let all = columns.iter().filter(|(c, _)| c.unit == unit).flat_map(|(_, gains)| gains);
        let ends =
            all.flat_map(|g| [g.value, g.interval.map_or(g.value, |i| i.0), g.interval.map_or(g.value, |i| i.1)]);
        ends.fold((0f64, 0f64), |(low, high), v| (low.min(v), high.max(v)))
    };
    let pictures: Vec<String> =
        columns.iter().map(|(column, gains)| tile(column, gains, range(column.unit), baseline)).collect();
    let header = ["task and model", "difference [95 % interval]", "unit"].map(str::to_owned);
    let mut table = Table::new(&format!("Difference of each model to {baseline}"), &header);
    for (column, gains) in &columns {
        let task = column.task.as_deref().unwrap_or_default();
        gains
            .iter()
            .for_each(|g| table.row(&[format!("{task}, {}", g.model), g.text.clone(), unit_words(column.unit).into()]));
    }
    let caption = escape(&format!(
        "Gain (right, blue) or loss (left, orange) of each model against {baseline} on each task. Where less is better (nats), the \
         axis is turned round: right is better everywhere. Thin lines: {}.",
        comparison.interval_words()
    ));
    figure(&pictures, &caption, vec![table])
}

/// What differences are measured in.
pub fn unit_words(unit: Unit) -> &'static str {
    match unit {
        Unit::Percent => "percentage points",
        Unit::Rating => "points of 10",
        Unit::Nats => "nats a token",
        Unit::Perplexity => "perplexity",
        Unit::Count => "rows",
    }
}

const WIDTH: f64 = 336.0;
const ROW: f64 = 26.0;
/// What the names of models take at least and at most.
const NAMES: (usize, usize) = (92, 132);

fn tile(column: &Column, gains: &[Gain], (low, high): (f64, f64), baseline: &str) -> String {
    let task = column.task.as_deref().unwrap_or_default();
    let (top, bottom) = (34.0, 34.0 + ROW * gains.len() as f64);
    let mut svg = Svg::new(WIDTH, bottom + 42.0);
    svg.name(0.0, 14.0, "head", 200.0, task);
    svg.text(WIDTH, 14.0, "small soft end", &format!("{}, {}", column.figure, unit_words(column.unit)));
    let names = gains.iter().map(|gain| text_width(&gain.model)).max().unwrap_or(0).clamp(NAMES.0, NAMES.1) as f64;
    let axis = Axis::new(low, high, (names + 8.0, WIDTH - 58.0), 3);
    for (value, text) in axis.marks() {
        svg.line((axis.at(value), top), (axis.at(value), bottom), "grid");
        svg.text(axis.at(value), bottom + 16.0, "small soft middle", &text);
    }
    for (i, gain) in gains.iter().enumerate() {
        let middle = top + ROW * (i as f64 + 0.5);
        let (zero, end) = (axis.at(0.0), axis.at(gain.value));
        let (kind, words) = match gain.value {
            v if v < 0.0 => ("loss", "a loss"),
            v if v > 0.0 => ("gain", "a gain"),
            _ => ("gain", "no difference"),
        };
        svg.name(0.0, middle + 4.0, "", names, &gain.model);
        let title = format!("{} on {task}: {} against {baseline}, {words}", gain.model, gain.text);
        svg.rect((zero.min(end), middle - 7.0, (end - zero).abs().max(0.5), 14.0), kind, &title);
        if let Some((low, high)) = gain.interval {
            svg.line((axis.at(low), middle), (axis.at(high), middle), "whisker");
            [low, high]
                .iter()
                .for_each(|v| svg.line((axis.at(*v), middle - 3.5), (axis.at(*v), middle + 3.5), "whisker"));
        }
        let value = gain.text.split(" [").next().unwrap_or_default();
        svg.text(WIDTH, middle + 4.0, "small end", value);
    }
    svg.line((axis.at(0.0), top - 3.0), (axis.at(0.0), bottom + 3.0), "zero");
    let ends = (axis.at(0.0), bottom + 34.0);
    svg.text(ends.0, ends.1, "small soft middle", baseline);
    let list: Vec<String> = gains.iter().map(|g| format!("{} {}", g.model, g.text)).collect();
    svg.finish(&format!("{task}, {} against {baseline}: {}", column.figure, list.join("; ")))
}
