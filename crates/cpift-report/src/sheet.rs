//! Tables of experiments and the notes under them, the same for text and page.

use std::fmt::Write as _;

use crate::comparison::{ANS_FORMULA, Question, Spread, Unit};
use crate::experiment::{Cell, Column, Experiment, Forgetting, Method, Outcome, SeedScores};

/// A cell of a table, and true if it is the best of its column.
pub(crate) type Text = (String, bool);

/// A table of an experiment.
#[derive(Debug, Clone)]
pub(crate) struct Sheet {
    /// Caption.
    pub(crate) caption: String,
    /// Names of the columns; the part after a line break is the unit.
    pub(crate) header: Vec<String>,
    /// Rows of cells.
    pub(crate) lines: Vec<Vec<Text>>,
    /// Number of columns, from the left, that hold names.
    pub(crate) names: usize,
}

/// The tables of an experiment.
pub(crate) fn sheets(experiment: &Experiment) -> Vec<Sheet> {
    match &experiment.outcome {
        Outcome::Scores(seeds) => {
            let base = experiment.head.baseline.as_deref().filter(|_| seeds.compared());
            [scores(seeds)].into_iter().chain(base.map(|name| differences(seeds, name))).collect()
        }
        Outcome::Forgetting(forgetting) => vec![changes(forgetting), by_pair(forgetting)],
    }
}

/// The notes under the tables of an experiment: method, intervals, and what limits them.
pub(crate) fn notes(experiment: &Experiment) -> Vec<String> {
    match &experiment.outcome {
        Outcome::Scores(seeds) => seeds_notes(seeds, &experiment.head.baseline, &experiment.question),
        Outcome::Forgetting(forgetting) => forgetting_notes(forgetting, &experiment.question),
    }
}

fn plain(text: impl Into<String>) -> Text {
    (text.into(), false)
}

fn heading(column: &Column) -> String {
    match (&column.task, column.unit) {
        (Some(task), Unit::Nats) => format!("{task}\nnll"),
        (Some(task), unit) => format!("{task}\n{} {}", column.figure, unit.symbol()),
        (None, Unit::Percent) => format!("{}\n%", column.figure),
        (None, _) => column.figure.clone(),
    }
}

/// The cells that identify a row: its name, and its position on the axis.
fn named(seeds: &SeedScores, row: usize) -> impl Iterator<Item = Text> {
    let row = &seeds.rows[row];
    [plain(&row.name)].into_iter().chain(row.x.map(|x| plain(x.to_string())))
}

fn name_columns(seeds: &SeedScores) -> impl Iterator<Item = String> {
    ["method".to_owned()].into_iter().chain(seeds.axis.as_ref().map(|axis| axis.label.clone()))
}

fn scores(seeds: &SeedScores) -> Sheet {
    let tokens = seeds.rows.iter().any(|row| row.tokens.is_some());
    let more = tokens.then(|| "tokens".to_owned());
    let header = name_columns(seeds).chain(more).chain(seeds.columns().map(heading)).collect();
    let line = |row: usize| {
        let known = seeds.rows[row].tokens.map_or("-".to_owned(), |n| n.to_string());
        let cells = seeds.columns().map(|column| column.cells[row].text(column.unit));
        named(seeds, row).chain(tokens.then(|| plain(known))).chain(cells).collect()
    };
    let caption = match seeds.seeds {
        1 => "Scores of every method".to_owned(),
        n => format!("Scores of every method: mean ± standard deviation over {n} seeds"),
    };
    Sheet { caption, header, lines: (0..seeds.rows.len()).map(line).collect(), names: 1 }
}

fn differences(seeds: &SeedScores, baseline: &str) -> Sheet {
    let header = name_columns(seeds).chain(seeds.columns().map(heading)).collect();
    let line = |row: usize| {
        let cell =
            |column: &Column| plain(column.deltas[row].as_ref().map_or("-".into(), |delta| delta.text(column.unit)));
        named(seeds, row).chain(seeds.columns().map(cell)).collect()
    };
    let rows = (0..seeds.rows.len()).filter(|row| seeds.baselines[*row].is_some());
    let alone = seeds.rows.iter().filter(|row| row.name == baseline).count() == 1;
    let place = seeds.axis.as_ref().filter(|_| !alone);
    let place = place.map_or(String::new(), |axis| format!(" at the same {}", axis.label));
    Sheet { caption: format!("Difference to {baseline}{place}"), header, lines: rows.map(line).collect(), names: 1 }
}

fn seeds_notes(seeds: &SeedScores, baseline: &Option<String>, question: &Question) -> Vec<String> {
    let mut words = vec![format!("{} Best in bold.", seeds.spread_text())];
    if let Some(name) = baseline.as_ref().filter(|_| seeds.compared()) {
        words.push(format!("Differences to {name}: {}.", seeds.interval_text(question)));
        if seeds.seeds > 1 {
            let n = seeds.seeds;
            words.push(format!(
                "The seeds' part of such an interval is narrow: {n} draws of {n} have {}/{n} of their variance.",
                n - 1
            ));
        }
    }
    words.extend(seeds.notes.iter().cloned());
    let ans = seeds.ans.cells.iter().any(|cell| matches!(cell, Cell::Value(..)));
    words.extend(ans.then(|| ANS_FORMULA.to_owned()));
    words
}

/// For each of `values`, true if it is the largest; all false if all are equal.
fn best(values: &[Option<f64>]) -> Vec<bool> {
    let known = values.iter().flatten();
    let (low, high) = known.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    values.iter().map(|value| low < high && *value == Some(high)).collect()
}

fn changes(forgetting: &Forgetting) -> Sheet {
    let (unit, methods, seeds) = (forgetting.unit, &forgetting.methods, forgetting.has_seeds());
    let cuts = methods.iter().any(|method| method.cut.is_some());
    let symbol = unit.symbol();
    let header = ["method".to_owned(), format!("ΔA\n{symbol}"), format!("ΔB\n{symbol}"), "pairs".to_owned()];
    let more = [seeds.then(|| "pairs and seeds".to_owned()), cuts.then(|| "loss avoided\n%".to_owned())];
    let of = |value: fn(&Method) -> Option<f64>| best(&methods.iter().map(value).collect::<Vec<_>>());
    let (first, second) = (of(|m| Some(m.first.mean())), of(|m| Some(m.second.mean())));
    let cut = of(|m| m.cut.as_ref().map(|cut| cut.value));
    let line = |(i, method): (usize, &Method)| {
        let cells = [
            plain(&method.name),
            (method.first.signed(unit), first[i]),
            (method.second.signed(unit), second[i]),
            plain(method.pairs().to_string()),
        ];
        let more = [seeds.then(|| plain(method.changes.len().to_string())), cuts.then(|| (cut_text(method), cut[i]))];
        cells.into_iter().chain(more.into_iter().flatten()).collect()
    };
    Sheet {
        caption: "What training on a second task did to the first (ΔA) and to the second itself (ΔB)".to_owned(),
        header: header.into_iter().chain(more.into_iter().flatten()).collect(),
        lines: methods.iter().enumerate().map(line).collect(),
        names: 1,
    }
}

/// The share of the baseline's loss that a method avoids, in percent, with its interval.
pub(crate) fn cut_text(method: &Method) -> String {
    let percent = |share: f64| Unit::Percent.text(share).replace('-', "−");
    method.cut.as_ref().map_or("-".to_owned(), |cut| match cut.interval {
        Some((low, high)) => format!("{} [{}, {}]", percent(cut.value), percent(low), percent(high)),
        None => percent(cut.value),
    })
}

fn by_pair(forgetting: &Forgetting) -> Sheet {
    let methods = &forgetting.methods;
    let names = methods.iter().map(|method| method.name.clone());
    let header = ["first", "second"].map(str::to_owned).into_iter().chain(names).collect();
    let line = |pair: &(String, String)| {
        let spreads: Vec<Option<Spread>> = methods
            .iter()
            .map(|method| {
                let values: Vec<f64> = method.of_pair(pair).map(|change| change.first).collect();
                (!values.is_empty()).then_some(Spread { values })
            })
            .collect();
        let best = best(&spreads.iter().map(|s| s.as_ref().map(Spread::mean)).collect::<Vec<_>>());
        let cell = |(spread, best): (&Option<Spread>, bool)| {
            (spread.as_ref().map_or("-".to_owned(), |s| s.signed(forgetting.unit)), best)
        };
        [plain(&pair.0), plain(&pair.1)].into_iter().chain(spreads.iter().zip(best).map(cell)).collect()
    };
    Sheet {
        caption: format!("ΔA of every pair of tasks ({})", forgetting.unit.symbol()),
        header,
        lines: forgetting.pairs.iter().map(line).collect(),
        names: 2,
    }
}

fn forgetting_notes(forgetting: &Forgetting, question: &Question) -> Vec<String> {
    let over = if forgetting.has_seeds() { "pairs and seeds" } else { "pairs" };
    let unit = match forgetting.unit {
        Unit::Percent => "percentage points",
        _ => "points of 10, fractions times 10",
    };
    let mut words = vec![format!(
        "ΔA: the metric of the first task after the second, less that after the first (below zero: forgotten); ΔB: the same of the \
         second task. Both in {unit}; mean ± sample standard deviation over {over} ({} in all). Best in bold.",
        counted(forgetting.pairs.len(), "pair")
    )];
    if let Some(base) = forgetting.baseline.map(|base| &forgetting.methods[base].name) {
        words.push(format!(
            "Loss avoided: 1 − ΔA/ΔA of {base}, in percent, with its interval ({}).",
            forgetting.interval_text(question)
        ));
    }
    words.extend(forgetting.notes.iter().cloned());
    words
}

/// `1 seed`, `2 seeds`.
pub(crate) fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Text with control characters replaced by their symbols, and characters that change the writing
/// direction by their codes, so that a model's output cannot rearrange the text around it. Line
/// breaks and tabs stay.
pub(crate) fn symbols(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            '\u{7f}' => out.push('\u{2421}'),
            c if c < ' ' => out.push(char::from_u32(0x2400 + u32::from(c)).unwrap_or('\u{fffd}')),
            '\u{80}'..='\u{9f}'
            | '\u{61c}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{2066}'..='\u{2069}'
            | '\u{feff}'
            | '\u{fffe}'
            | '\u{ffff}' => {
                let _ = write!(out, "⟨U+{:04X}⟩", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_could_act_are_shown_as_symbols() {
        assert_eq!(symbols("\u{0}\u{1b}[1m\n\t\u{7f}"), "␀␛[1m\n\t␡");
        assert_eq!(symbols("a\u{202e}b\u{2066}"), "a⟨U+202E⟩b⟨U+2066⟩");
        assert_eq!(symbols("{{ 7 * 7 }} {% x %} ‘æ汉’"), "{{ 7 * 7 }} {% x %} ‘æ汉’");
    }
}
