//! The summary of a run: the best model and its lead, what each model lost where, and what each
//! cost in tokens and time.

use std::collections::BTreeSet;

use anyhow::Result;
use cpift_core::format::digest::Digest;
use cpift_core::record::provenance::Provenance;
use maud::{Markup, html};

use super::folder::Record;
use crate::html::{Table, paragraph};
use crate::statistics::comparison::{Column, Comparison, Delta, Question};

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
